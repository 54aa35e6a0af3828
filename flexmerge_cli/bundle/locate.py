"""Finds a bundle in a folder, or in a repository of the Hub, from which it fetches the files of the wanted tasks.

A manifest tells what a task reads, so one task of a bundle of thirty is fetched without the others' bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, read_manifest
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.hub import list_names, open_tree
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.errors import IntegrityError, SourceError, UsageError
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.text import expanded

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A bundle's folder, and which of its files are not on this disk."""

    path: Path
    tasks: Sequence[str] | None = None
    """The tasks whose files are here and were asked for; None for all."""
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Files that were left on the Hub; only their headers can be read."""

    def open(self, *, verify: bool = True) -> Bundle:
        """Open the bundle. Raises like `Bundle.open`."""
        return Bundle.open(self.path, tasks=self.tasks, remote=self.remote, verify=verify)


def locate(
    source: str,
    access: Access = ONLINE,
    *,
    tasks: Sequence[str] | None = None,
    headers_only: bool = False,
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> Located:
    """Find the bundle. From the Hub, fetch its manifest and, unless headers_only, the files of `tasks` (None: of all).

    Raises SourceError, IntegrityError if the repository has not what its manifest tells of.
    """
    if is_remote(source) and not is_hub(source):
        raise UsageError(f"{source}: a bundle is a folder, or of the Hub", hint="copy it to this disk")
    if not is_hub(source):
        return Located(path=expanded(source), tasks=tasks)
    tree = open_tree(source, access)
    if MANIFEST_NAME not in tree.files and not (tree.path / MANIFEST_NAME).is_file():
        raise SourceError(
            f"no bundle at {tree.source}: it has no {MANIFEST_NAME}", hint=f"flexmerge inspect {tree.source}"
        )
    tree.local(MANIFEST_NAME)
    manifest = read_manifest(tree.path)
    needed = _needed(tree.path, manifest, tasks)
    problems = []
    for name in needed:
        listed = tree.files.get(name)
        if listed is not None and listed.size != manifest.files[name].bytes:
            problems.append(f"{name} has {listed.size:,} bytes, {manifest.files[name].bytes:,} by the manifest")
        elif listed is None and not (tree.path / name).is_file():
            problems.append(f"{name} is missing")
    if problems:
        text = f"{tree.source} is not whole:\n  " + "\n  ".join(problems)
        if not tree.files:
            raise SourceError(text, hint="run it once without --offline and HF_HUB_OFFLINE")
        raise IntegrityError(text, hint="take another revision, or merge and upload it again")
    remote = {name: tree.files[name] for name in needed if not (tree.path / name).is_file()}
    if headers_only:
        return Located(path=tree.path, remote=remote)
    fetch(remote.values(), replace(access, stream=None), on_progress)  # a bundle's files are verified whole
    return Located(path=tree.path, tasks=tasks)


def holds_bundle(source: str, access: Access = ONLINE) -> bool:
    """Return whether a repository of the Hub is a bundle, judged by the names of its files."""
    return {MANIFEST_NAME, "weights"} <= set(list_names(source, access))


def _needed(path: Path, manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    for task in tasks or ():
        if task not in manifest.tasks:
            raise SourceError(f"no task `{task}` in {path}", hint=f"it has: {', '.join(manifest.tasks)}")
    return [name for name, file in manifest.files.items() if tasks is None or set(tasks) & set(file.tasks)]
