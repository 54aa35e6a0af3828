"""`flexmerge inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import JsonOption


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, a plan.json, or a bundle.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint, a plan or a bundle holds.

    Example: flexmerge inspect bundle/
    """
