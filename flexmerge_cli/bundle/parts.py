"""Makes a bundle from parts: several processes write some tensors each into one partial folder, and one publishes it.

A part writes its bytes at their places in the weight files, which no two parts share, and has a journal of its own.
Joining resumes a merge (engine/journal.py) that has nothing left to compute: it checks the bytes against the journals.
A part that failed can be run again, and continues where it stopped.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.bundle.publish import partial_folder, shared
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.engine.device import arithmetic
from flexmerge_cli.engine.journal import Journal, holds_journal, read_journals, shares_of
from flexmerge_cli.engine.materialise import materialise
from flexmerge_cli.engine.output import PartOutput
from flexmerge_cli.engine.sources import Sources
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS
from flexmerge_cli.errors import IntegrityError, UsageError
from flexmerge_cli.request.part import Share

SHOWN = 20


def merge_key(layout: BundleLayout, device: torch.device) -> str:
    """Return a key that merges with the same bytes share, and most others do not: plan, request, methods, versions."""
    return hashlib.sha256(f"{arithmetic(str(device))}\n".encode() + layout.blank_manifest).hexdigest()


def share_of(layout: BundleLayout, part: Share) -> frozenset[str]:
    """Return the tensors of one part. The tensors of a unit are in one part, since they may merge as one."""
    unit_of = {name: unit.name for unit in layout.allocation.units for name in unit.tensors}
    by_unit: dict[tuple[str, str], list[str]] = {}
    for name, storage in layout.storages.items():
        if storage.parts:
            by_unit.setdefault(("unit", unit_of[name]) if name in unit_of else ("tensor", name), []).append(name)

    def read_bytes(name: str) -> int:
        tensor = layout.storages[name].tensor
        return tensor.num_elements * (len(tensor.present) + 1) * ITEM_BYTES[tensor.dtype]

    groups = list(by_unit.values())
    places = part.places([sum(map(read_bytes, names)) for names in groups])
    return frozenset(name for place in places for name in groups[place])


def write_part(
    layout: BundleLayout,
    sources: Sources,
    target: Path,
    part: Share,
    *,
    device: torch.device,
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
) -> None:
    """Write the tensors of one part where `join` finds them, except those that a killed run of it has finished.

    Every part computes the statistics that methods need of the whole model. Raises UsageError if parts of another merge
    are there, MachineError if another process is writing this part.
    """
    with shared(target) as folder:
        key = merge_key(layout, device)
        _require_same(folder, key)
        with Journal(folder, key, part) as journal:
            materialise(
                layout,
                sources,
                PartOutput(folder, layout.files, layout.total_bytes),
                device=device,
                threads=threads,
                chunk_elements=chunk_elements,
                on_bytes=on_bytes,
                on_stage=on_stage,
                journal=journal,
                share=share_of(layout, part),
            )


def require_parts(layout: BundleLayout, target: Path, device: torch.device) -> None:
    """Raise UsageError that names what is missing, unless the partial folder of a target has all parts."""
    folder, key = partial_folder(target), merge_key(layout, device)
    if not holds_journal(folder):
        raise UsageError(f"{folder} holds no parts", hint="write them with the same command and --part 1/N, 2/N, …")
    _require_same(folder, key)
    found = read_journals(folder, key).found
    missing = [name for name, storage in layout.storages.items() if storage.parts and name not in found]
    if missing:
        parts = parts_of(layout, folder, missing)
        raise UsageError(
            f"{folder} lacks {_listed(parts) if parts else f'{len(missing):,} tensors'} of the merge",
            hint=f"run {parts[0]} again" if parts else "run the parts that failed again",
        )


def damaged(layout: BundleLayout, folder: Path, names: Sequence[str]) -> IntegrityError:
    """Return the error for tensors whose bytes are not those that their parts wrote."""
    parts = parts_of(layout, folder, names)
    return IntegrityError(
        f"`{names[0]}` in {folder} is not what its part wrote, and {len(names) - 1:,} others",
        hint=f"run the parts again: {_listed(parts)}" if parts else "run its part again",
    )


def parts_of(layout: BundleLayout, folder: Path, names: Collection[str]) -> list[str]:
    """Return the parts that wrote these tensors, as `--part 3/16`; empty if the number of parts is unknown."""
    counts = {part.count for part in shares_of(folder)}
    if len(counts) != 1:
        return []
    count = counts.pop()
    every = (Share(number, count) for number in range(1, count + 1))
    return [f"--part {part}" for part in every if not share_of(layout, part).isdisjoint(names)]


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:SHOWN]) + (f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")


def _require_same(folder: Path, key: str) -> None:
    found = read_journals(folder, key)
    if found.of_another:
        raise UsageError(
            f"{folder} holds parts that cannot be joined with these: {found.useless}",
            hint="choose another place with -o, or remove that folder",
        )
