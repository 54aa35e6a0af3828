"""`flexmerge export`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import ForceOption, JsonOption, QuietOption


def export(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write; with --all one folder per task in it.")
    ],
    task: Annotated[str | None, typer.Option("--task", help="The task to give back.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every task.")] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard links or reflinks; nothing must need decoding.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give a task back as an ordinary checkpoint folder.

    Example: flexmerge export bundle/ --task sst2 -o sst2/
    """
    from flexmerge_cli.bundle.export import export_all, export_task
    from flexmerge_cli.bundle.read import Bundle
    from flexmerge_cli.cli.options import emit
    from flexmerge_cli.errors import UsageError

    if (task is None) == (not every):
        raise UsageError("say which task", hint="--task NAME, or --all")
    opened = Bundle.open(bundle)
    if task is not None:
        export_task(opened, task, output, force=force, link=link)
        places = {task: output}
    else:
        places = export_all(opened, output, force=force, link=link)
    value = {"exported": {name: str(place) for name, place in places.items()}}

    def show(found: dict[str, dict[str, str]]) -> None:
        for name, place in found["exported"].items():
            print(f"{name}: {place}")

    emit(value, as_json=as_json, show=show)
