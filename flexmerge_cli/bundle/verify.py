"""Whether a bundle's bytes are those its manifest tells of. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexmerge_cli.bundle.manifest_file import file_inside, read_manifest, sha256_of
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.errors import FlexmergeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found."""

    bad: dict[str, str]
    """Path, or `tensor of task`, -> what is wrong."""
    broken_tasks: tuple[str, ...]
    sound_tasks: tuple[str, ...]
    num_files: int
    num_tensors: int
    """Decoded and compared; 0 if only files were."""
    unknown: tuple[str, ...]
    """Files in the folder that the manifest does not tell of."""


def verify(path: Path, *, decode: bool = False, on_bytes: Callable[[int], None] = lambda _count: None) -> Verification:
    """Compare every file's size and sha256, with `decode` also the digest of every tensor of every task.

    All bad parts are found before this returns. Raises only if there is no sound manifest to compare with.
    """
    manifest = read_manifest(path)
    bad, broken = {}, set()
    for name, entry in manifest.files.items():
        file = file_inside(path, name)
        problem = None
        if not file.is_file():
            problem = "missing"
        elif file.stat().st_size != entry.bytes:
            problem = f"{file.stat().st_size:,} bytes, {entry.bytes:,} by the manifest"
        elif sha256_of(file) != entry.sha256:
            problem = "sha256 differs"
        on_bytes(entry.bytes)
        if problem:
            bad[name] = problem
            broken |= set(entry.tasks)
    num_tensors = 0
    if decode:
        found, num_tensors = _decode(path, set(manifest.tasks) - broken)
        bad |= {f"{tensor} of {task}": problem for (task, tensor), problem in found.items()}
        broken |= {task for task, _ in found}
    known = {path / name for name in manifest.files} | {path / "manifest.json"}
    unknown = sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir() and p not in known)
    return Verification(
        bad=bad,
        broken_tasks=tuple(task for task in manifest.tasks if task in broken),
        sound_tasks=tuple(task for task in manifest.tasks if task not in broken),
        num_files=len(manifest.files),
        num_tensors=num_tensors,
        unknown=tuple(unknown),
    )


def _decode(path: Path, tasks: set[str]) -> tuple[dict[tuple[str, str], str], int]:
    """(task, tensor) -> what is wrong, of tasks whose files are sound."""
    try:
        bundle = Bundle.open(path)
    except FlexmergeError:
        return {}, 0  # some file is bad, and named already
    found, count = {}, 0
    for tensor in bundle.manifest.stored:
        for task, digest in tensor.digests.items():
            if task in tasks:
                count += 1
                bits = np.ascontiguousarray(bundle.stored(task, tensor.name))
                if digest_bytes(bits.reshape(-1).view(np.uint8)) != digest:
                    found[task, tensor.name] = "decodes to other bits than were written"
    return found, count
