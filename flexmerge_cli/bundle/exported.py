"""Finds the files of a folder that an export wrote: `export --force` replaces these alone."""

import re
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.libraries import STEMS
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.formats.folders import BASE_FOLDER, WEIGHTS
from flexmerge_cli.formats.manifest import Manifest


def exported_files(manifest: Manifest, folder: Path) -> set[str] | None:
    """Return the relative paths that an export of this or another bundle may have; None if no weights are among them.

    Weights are if they bear flexmerge's mark under a name that exports use, are a weight file of this bundle under such
    a name, as `export --link` makes them, or are those of an adapter of this bundle; their index is; and so is what is
    called as a file beside some task of this bundle.
    """
    own = [path for task in manifest.tasks if (path := manifest.own_weights(task)) is not None]
    kept = {(path.rpartition("/")[2], manifest.files[path].sha256) for path in own}
    parts = {(part, stem) for task in manifest.tasks.values() for part, stem in task.parts.items()}
    stems = {"": STEMS} | {part: (stem,) for part, stem in parts}
    weights = {
        path.relative_to(folder).as_posix()
        for part in stems
        for path in _files_in(folder / part)
        if path.suffix in WEIGHT_SUFFIXES
        and (_is_kept(path, kept) or (_stem(path) in stems[part] and (_bears_mark(path) or _is_linked(path, manifest))))
    }
    if not weights:
        return None
    indices = {f"{part}/{stem}.safetensors.index.json".lstrip("/") for part in stems for stem in stems[part]}
    beside = {_name_beside(path) for path in manifest.files} - {name for name, _ in kept}
    return weights | indices | beside


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _stem(path: Path) -> str:
    return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors\Z", "", path.name)


def _bears_mark(path: Path) -> bool:
    try:
        return "flexmerge" in read_header(path)[1]
    except (FlexmergeError, OSError):
        return False


def _is_linked(path: Path, manifest: Manifest) -> bool:
    """Return whether a file equals a weight file of the bundle byte by byte; these bear no mark of flexmerge."""
    size = path.stat().st_size
    digests = {
        entry.sha256 for name, entry in manifest.files.items() if name.startswith(WEIGHTS) and entry.bytes == size
    }
    return bool(digests) and sha256_of(path) in digests


def _is_kept(path: Path, kept: set[tuple[str, str]]) -> bool:
    """Return whether a file equals an adapter's weights byte by byte; these bear no mark of flexmerge."""
    digests = {digest for name, digest in kept if name == path.name}
    return bool(digests) and sha256_of(path) in digests


def _name_beside(path: str) -> str:
    """Return what a side file of the bundle is called in an export, and None for a weight file."""
    folder, _, name = path.partition("/")
    match folder:
        case "tasks":
            return name.partition("/")[2]
        case "coded":
            return name.partition("/files/")[2]
        case _:
            return name.removeprefix("files/") if folder == BASE_FOLDER else ""
