"""`flexmerge push`."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flexmerge_cli.cli import options as o


def push(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="hf://org/name; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch to write; created if it does not exist.")
    ] = None,
    per_task: Annotated[
        bool, typer.Option("--per-task", help="Write one repository per task, hf://org/name-TASK, with its checkpoint.")
    ] = False,
    dry_run: o.DryRun = False,
    offline: o.Offline = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Publish a bundle on the Hub: each weight once, only what changed, in one commit.

    \b
    Examples:
    flexmerge push bundle/ hf://org/name --dry-run
    flexmerge push bundle/ hf://org/name --private
    flexmerge push bundle/ hf://org/name --per-task
    """
    from flexmerge_cli.bundle import push as pushing
    from flexmerge_cli.bundle.read import Bundle
    from flexmerge_cli.bundle.verify import require_sound
    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.checkpoint.hub import is_offline
    from flexmerge_cli.checkpoint.place import HubPlace
    from flexmerge_cli.cli.output import emit, note
    from flexmerge_cli.errors import SourceError

    target = HubPlace.of(repository)
    pushing.repositories(target, None)
    if is_offline(Access(offline=offline)):
        raise SourceError(
            f"{target.source} cannot be written in offline mode",
            hint="leave out --offline and HF_HUB_OFFLINE",
        )
    opened = Bundle.open(bundle)
    if not dry_run:
        require_sound(opened)
    found = {}
    for task, place in pushing.repositories(target, opened.tasks if per_task else None).items():
        with tempfile.TemporaryDirectory() as scratch:
            if task is None:
                uploads = pushing.bundle_uploads(opened)
            else:
                uploads = pushing.task_uploads(opened, task, Path(scratch) / "out")
            one = pushing.compare(place, uploads, private=private, revision=revision)
            for message in one.notes:
                note(f"warning: {message}", quiet=quiet)
            files = f"{len(one.changed)} changed and {len(one.removed)} removed files"
            note(f"{place.source}: {one.num_bytes:,} bytes to send, {files}", quiet=quiet)
            if not dry_run:
                one = replace(one, commit=pushing.carry_out(one, place, private=private))
            found[place.source] = one

    def show(value: dict[str, Any]) -> None:
        for source, told in value["repositories"].items():
            done = f"commit {told['commit']}" if told["commit"] else "nothing was sent"
            print(f"{source}: {done}")

    value = {"pushed": not dry_run, "repositories": {source: one.summary for source, one in found.items()}}
    emit(value, as_json=as_json, quiet=quiet, show=show)
