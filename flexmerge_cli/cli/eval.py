"""`flexmerge eval`."""

from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import JsonOption, OfflineOption, QuietOption


def evaluate(
    bundle: Annotated[str, typer.Argument(help="Folder of the bundle, or hf://org/name.")],
    spec: Annotated[Path, typer.Option("--spec", help="eval.yaml: what to score each task on.")],
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score every task of a bundle on its own model, beside the fine-tuned one.

    Example: flexmerge eval bundle/ --spec eval.yaml
    """
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.cli.options import access_of, emit, note, progress
    from flexmerge_cli.evaluation.spec import read_spec

    with progress(quiet=quiet or as_json) as on_progress:
        opened = locate(bundle, access_of(offline=offline, quiet=quiet), on_progress=on_progress).open()
    checked = read_spec(spec, opened.tasks)

    from flexmerge_cli.evaluation.evaluate import evaluate as score
    from flexmerge_cli.report.evaluation import show_evaluation

    def on_task(name: str, done: int, total: int) -> None:
        note(f"scoring {name} ({done + 1} of {total})", quiet=quiet or as_json)

    emit(score(opened, checked, on_task=on_task), as_json=as_json, show=show_evaluation)
