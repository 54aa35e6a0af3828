"""`flexmerge push`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexmerge_cli.cli import options as o


def push(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")],
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPOSITORY", help="hf://org/name, created if it does not exist, or s3://bucket/folder."
        ),
    ],
    private: Annotated[bool, o.option("--private", "", "Create a private repository.")] = False,
    revision: Annotated[
        str | None, o.option("--revision", "NAME", "Branch to write; created if it does not exist.")
    ] = None,
    per_task: Annotated[
        bool, o.option("--per-task", "", "Write one repository per task, hf://org/name-TASK, with its checkpoint.")
    ] = False,
    dry_run: o.DryRun = False,
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Publish a bundle on the Hub in one commit, or in an object store: each weight once, and only what changed.

    \b
    Examples:
    flexmerge push bundle/ hf://org/name --dry-run
    flexmerge push bundle/ hf://org/name --private
    flexmerge push bundle/ hf://org/name --per-task
    flexmerge push bundle/ s3://bucket/folder
    """
    from flexmerge_cli.bundle.push import Push, push_bundle
    from flexmerge_cli.bundle.store import push_to_store
    from flexmerge_cli.checkpoint.place import is_hub, is_remote
    from flexmerge_cli.cli.output import emit, note, progress
    from flexmerge_cli.errors import UsageError

    if is_remote(repository) and not is_hub(repository):
        if private or per_task or revision is not None:
            raise UsageError(
                "--private, --revision and --per-task are for repositories of the Hub", hint="leave them out"
            )
        with progress(quiet=quiet or as_json) as on_progress:
            sent = push_to_store(
                bundle,
                repository,
                dry_run=dry_run,
                offline=offline,
                on_compared=lambda message: note(message, quiet=quiet),
                on_progress=on_progress,
            )
        found = {"pushed": not dry_run, "repositories": {repository: sent}}
        done = "nothing was sent" if dry_run else "complete"
        emit(found, as_json=as_json, quiet=quiet, show=lambda _found: print(f"{repository}: {done}"))
        return

    def on_compared(source: str, one: Push) -> None:
        for message in one.notes:
            note(f"warning: {message}", quiet=quiet)
        files = f"{len(one.changed)} changed and {len(one.removed)} removed files"
        note(f"{source}: {one.num_bytes:,} bytes to send, {files}", quiet=quiet)

    value = push_bundle(
        bundle,
        repository,
        private=private,
        revision=revision,
        per_task=per_task,
        dry_run=dry_run,
        offline=offline,
        on_compared=on_compared,
    )

    def show(value: dict[str, Any]) -> None:
        for source, sent in value["repositories"].items():
            done = f"commit {sent['commit']}" if sent["commit"] else "nothing was sent"
            print(f"{source}: {done}")

    emit(value, as_json=as_json, quiet=quiet, show=show)
