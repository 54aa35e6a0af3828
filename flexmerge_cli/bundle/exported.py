"""Finds the files of a folder that an export wrote: `export --force` replaces these alone."""

import re
from collections.abc import Sequence
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.libraries import STEMS
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.formats.manifest import Manifest


def exported_files(manifest: Manifest, folder: Path) -> set[str] | None:
    """Return the relative paths that an export of this or another bundle may have; None if no weights are among them.

    Weights are if they bear flexmerge's mark under a name that exports use, or are those of an adapter of this bundle;
    their index is; and so is what is called as a file beside some task of this bundle.
    """
    own = [path for task in manifest.tasks if (path := manifest.own_weights(task)) is not None]
    kept = {(path.rpartition("/")[2], manifest.files[path].sha256) for path in own}
    parts = {(part, stem) for task in manifest.tasks.values() for part, stem in task.parts.items()}
    stems = {"": STEMS} | {part: (stem,) for part, stem in parts}
    weights = {
        path.relative_to(folder).as_posix()
        for part in stems
        for path in _files_in(folder / part)
        if path.suffix in WEIGHT_SUFFIXES and (_bears_mark(path, stems[part]) or _is_kept(path, kept))
    }
    if not weights:
        return None
    indices = {f"{part}/{stem}.safetensors.index.json".lstrip("/") for part in stems for stem in stems[part]}
    beside = {name for task in manifest.tasks for name in manifest.side_files(task)} | manifest.base_files.keys()
    beside -= {name for name, _ in kept}
    return weights | indices | beside


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _bears_mark(path: Path, stems: Sequence[str]) -> bool:
    # Not any name: a bundle's own weights bear the mark, too.
    name = re.sub(r"(-\d{5}-of-\d{5})?\.safetensors\Z", "", path.name)
    try:
        return name in stems and "flexmerge" in read_header(path)[1]
    except (FlexmergeError, OSError):
        return False


def _is_kept(path: Path, kept: set[tuple[str, str]]) -> bool:
    """Return whether a file equals an adapter's weights byte by byte; these bear no mark of flexmerge."""
    digests = {digest for name, digest in kept if name == path.name}
    return bool(digests) and sha256_of(path) in digests
