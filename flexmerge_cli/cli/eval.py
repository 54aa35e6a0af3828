"""`flexmerge eval`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import JsonOption


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    as_json: JsonOption = False,
) -> None:
    """Score every task of a bundle.

    Example: flexmerge eval bundle/ --spec eval.yaml
    """
