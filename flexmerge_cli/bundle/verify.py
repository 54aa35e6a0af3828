"""Verifies a bundle's bytes against its manifest. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexmerge_cli.bundle.files import FETCH_AGAIN, DigestError
from flexmerge_cli.bundle.links import MISSING, link_problem
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.folder import hub_blobs
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.errors import FlexmergeError, IntegrityError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verification found."""

    bad: dict[str, str]
    """Path, or `tensor of task`, -> what is wrong."""
    broken_tasks: tuple[str, ...]
    sound_tasks: tuple[str, ...]
    num_files: int
    num_tensors: int
    """Decoded and compared; 0 if only files were."""
    unknown: tuple[str, ...]
    """Files in the folder that the manifest does not tell of, but for its card."""


def verify(path: Path, *, decode: bool = False, on_bytes: Callable[[int], None] = lambda _count: None) -> Verification:
    """Compare every file's size and sha256, with `decode` also the digest of every tensor of every task.

    All bad parts are found before this returns. Raises only if there is no sound manifest to compare with.
    """
    return verify_bundle(Bundle.look(path), decode=decode, on_bytes=on_bytes)


def verify_bundle(
    bundle: Bundle, *, decode: bool = False, on_bytes: Callable[[int], None] = lambda _count: None
) -> Verification:
    """Verify a bundle that was looked at; what is digested here is not digested again when it is read."""
    assert bundle.files is not None
    manifest = bundle.manifest
    problems = {name: bundle.problem(name) for name in manifest.files}
    there = [name for name in manifest.files if problems[name] is None]
    for name, problem in zip(there, bundle.files.problems(there)):
        on_bytes(manifest.files[name].bytes)
        problems[name] = problem
    bad = {name: _said(bundle.path / name, problem) for name, problem in problems.items() if problem is not None}
    broken = {task for name in bad for task in manifest.files[name].tasks}
    is_download = bool(hub_blobs(bundle.path))  # what flexmerge needs, and it needs no links
    linked = [([task], manifest.links(task)) for task in manifest.tasks] + [(manifest.kept, manifest.base_links)]
    for tasks, links in linked:
        for link, name in links.items():
            said = link_problem(bundle.path / link, bundle.path / name, manifest.files[name])
            if said is not None and not (is_download and said == MISSING):
                bad[link] = said
                broken.update(tasks)
    for task in [name for name in manifest.tasks if name not in broken]:
        problem = bundle.problem(task)
        if problem is not None:
            bad[f"task {task}"] = problem.message
            broken.add(task)
    num_tensors = 0
    if decode:
        found, num_tensors = _decode(bundle, set(manifest.tasks) - broken)
        bad |= {f"{tensor} of {task}": problem for (task, tensor), problem in found.items()}
        broken |= {task for task, _ in found}
    known = {bundle.path / name for name in (*manifest.files, *manifest.all_links, MANIFEST_NAME, CARD_NAME)}
    unknown = sorted(
        str(p.relative_to(bundle.path)) for p in bundle.path.rglob("*") if not p.is_dir() and p not in known
    )
    return Verification(
        bad=bad,
        broken_tasks=tuple(task for task in manifest.tasks if task in broken),
        sound_tasks=tuple(task for task in manifest.tasks if task not in broken),
        num_files=len(manifest.files),
        num_tensors=num_tensors,
        unknown=tuple(unknown),
    )


def require_sound(bundle: Bundle) -> None:
    """Raise IntegrityError that names all bad files, the tasks that they break, and those that are sound."""
    found = verify_bundle(bundle)
    if found.bad:
        lines = [f"{name}: {problem}" for name, problem in found.bad.items()]
        lines.append(f"broken: {', '.join(found.broken_tasks)}; sound: {', '.join(found.sound_tasks) or 'none'}")
        raise IntegrityError(f"{bundle.path} is damaged:\n  " + "\n  ".join(lines), hint=FETCH_AGAIN)


def _said(file: Path, problem: FlexmergeError) -> str:
    """Return what is wrong, without the name of the file."""
    if isinstance(problem, DigestError):
        return "sha256 differs"
    return problem.message.removeprefix(str(file)).lstrip(": ").removeprefix("is ").removeprefix("has ")


def _decode(bundle: Bundle, tasks: set[str]) -> tuple[dict[tuple[str, str], str], int]:
    """Map (task, tensor) to what is wrong, for tasks whose files are sound."""
    found, count = {}, 0
    for tensor in bundle.manifest.stored:
        for task, digest in tensor.digests.items():
            if task not in tasks:
                continue
            count += 1
            try:
                bits = np.ascontiguousarray(bundle.stored(task, tensor.name))
            except FlexmergeError as error:
                found[task, tensor.name] = error.message
                continue
            if digest_bytes(bits.reshape(-1).view(np.uint8)) != digest:
                found[task, tensor.name] = "decodes to other bits than were written"
    return found, count
