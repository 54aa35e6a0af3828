"""Finds a bundle in a folder, in a repository of the Hub, or at an address, and fetches the files of the wanted tasks.

A manifest tells what a task reads, so one task of a bundle of thirty is fetched without the others' bytes.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexmerge_cli.bundle.files import Verify
from flexmerge_cli.bundle.links import linker
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, MAX_MANIFEST_BYTES, is_bundle, read_manifest
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.hub import list_names, open_tree
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.checkpoint.urls import new_folder, open_url
from flexmerge_cli.errors import DataError, IntegrityError, SourceError, show_as
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.text import expanded
from flexmerge_cli.writing import no_space

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A bundle's folder, and which of its files are not on this disk."""

    path: Path
    tasks: Sequence[str] | None = None
    """The tasks whose files are here and were asked for; None for all."""
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Files that were left where they are; only their headers can be read."""

    def open(self, *, verify: Verify = "sha256") -> Bundle:
        """Open the bundle. Arguments and errors: `Bundle.open`."""
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
    Files at another address are copied into a folder that is removed when the process ends.

    Raises SourceError, IntegrityError if the repository has not what its manifest tells of.
    """
    if is_remote(source) and not is_hub(source):
        return _at_address(source, access, tasks, headers_only, on_progress)
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
    here = {name for name in needed if (tree.path / name).is_file()}
    problems = _problems(manifest, needed, {name: file.size for name, file in tree.files.items()}, here)
    if problems and not tree.files:
        raise SourceError(_not_whole(tree.source, problems), hint="run it once without --offline and HF_HUB_OFFLINE")
    if problems:
        hint = "take another revision, or merge and upload it again"
        raise IntegrityError(_not_whole(tree.source, problems), hint=hint)
    remote = {name: tree.files[name] for name in needed if not (tree.path / name).is_file()}
    if headers_only:
        return Located(path=tree.path, remote=remote)
    fetch(remote.values(), replace(access, stream=None), on_progress)  # a bundle's files are verified whole
    return Located(path=tree.path, tasks=tasks)


def _at_address(
    source: str, access: Access, tasks: Sequence[str] | None, headers_only: bool, on_progress: OnProgress
) -> Located:
    folder, path = open_url(source, access)[0], new_folder()
    show_as(path, source)
    if not folder.is_file(MANIFEST_NAME):
        raise SourceError(f"no bundle at {source}: it has no {MANIFEST_NAME}", hint=f"flexmerge inspect {source}")
    if folder.size(MANIFEST_NAME) > MAX_MANIFEST_BYTES:
        raise DataError(f"{source}/{MANIFEST_NAME} is too large for a manifest", hint="do not use this bundle")
    folder.copy(MANIFEST_NAME, path / MANIFEST_NAME, lambda _count: None)
    manifest = read_manifest(path)
    needed = _needed(path, manifest, tasks)
    sizes = {name: folder.size(name) for name in needed if folder.is_file(name)}
    if problems := _problems(manifest, needed, sizes, set()):
        raise IntegrityError(_not_whole(source, problems), hint="push it again")
    if headers_only:
        return Located(path=path, remote={name: folder.remote(name) for name in needed})
    total = sum(sizes.values())
    if shutil.disk_usage(path).free < total:
        raise no_space(path, total)
    access.on_message(f"fetching {total:,} bytes in {len(needed)} files from {source} into {path}")
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("fetch", done, total)

    for name in needed:
        folder.copy(name, path / name, on_bytes)
    if links := {link: name for link, name in manifest.all_links.items() if name in sizes}:
        make = linker(path)
        for link, name in links.items():
            (path / link).parent.mkdir(parents=True, exist_ok=True)
            make(path / name, path / link)
    return Located(path=path, tasks=tasks)


def holds_bundle(source: str, access: Access = ONLINE) -> bool:
    """Return whether a repository of the Hub or an address is a bundle, judged by the names of its files."""
    if is_hub(source):
        return {MANIFEST_NAME, "weights"} <= set(list_names(source, access))
    folder, named = open_url(source, access)
    return named is None and folder.is_file(MANIFEST_NAME) and is_bundle(folder.local(MANIFEST_NAME).parent)


def _problems(manifest: Manifest, needed: Sequence[str], sizes: Mapping[str, int], here: Collection[str]) -> list[str]:
    """Return what is wrong with the listed files. here: those that are on this disk."""
    found = []
    for name in needed:
        if name in sizes and sizes[name] != manifest.files[name].bytes:
            found.append(f"{name} has {sizes[name]:,} bytes, {manifest.files[name].bytes:,} by the manifest")
        elif name not in sizes and name not in here:
            found.append(f"{name} is missing")
    return found


def _not_whole(source: str, problems: Sequence[str]) -> str:
    return f"{source} is not whole:\n  " + "\n  ".join(problems)


def _needed(path: Path, manifest: Manifest, tasks: Sequence[str] | None) -> list[str]:
    for task in tasks or ():
        if task not in manifest.tasks:
            raise SourceError(f"no task `{task}` in {path}", hint=f"it has: {', '.join(manifest.tasks)}")
    wanted = set(manifest.tasks if tasks is None else tasks)
    added = {path for task in wanted for path in manifest.added_files(task)}
    return [name for name, file in manifest.files.items() if tasks is None or wanted & set(file.tasks) or name in added]
