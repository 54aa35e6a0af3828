"""Handles kept adapters between sources and plan: what `plan` reads and records of them, and where `merge` finds them.

`plan` computes what an adapter makes once, for its digests; `merge` copies its files, and what it needs from the
base.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.digest import digest_file
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.survey_item import Measure, SurveyItem
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family.adapters import KeptAdapter
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import Family
from flexmerge_cli.formats.members import kept_record
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.record import NO_DIGEST


def base_items(family: Family) -> list[SurveyItem]:
    """List the base's tensors that are not read beside tasks, each as a task of its own."""
    return [
        SurveyItem(name=tensor.name, base=None, tasks=((0, tensor.base),), gram=False)
        for tensor in family.tensors
        if family.kept and tensor.base is not None and tensor.tensor_class is not TensorClass.MERGEABLE
    ]


def change_items(family: Family) -> list[SurveyItem]:
    """List what the adapters make, by tensor: those of one form together, with the adapters' numbers as tasks."""
    forms: dict[Any, list[tuple[int, StoredTensor]]] = {}
    for number, kept in enumerate(family.kept):
        for name, tensor in kept.changed().items():
            forms.setdefault((name, tensor.shape, tensor.dtype), []).append((number, tensor))
    return [SurveyItem(name=key[0], base=None, tasks=tuple(found), gram=False) for key, found in forms.items()]


def digests_of_changes(
    family: Family, items: Sequence[SurveyItem], measures: Sequence[Measure]
) -> dict[tuple[int, str], str]:
    """Map (adapter, aligned name) to the digest. Raises DataError with every value that is not finite, except in
    tensors that the adapter holds whole."""
    bad, found = [], {}
    for item, measure in zip(items, measures, strict=True):
        for position, (number, _) in enumerate(item.tasks):
            found[number, item.name] = measure.digests[position]
        for position, index in measure.not_finite:
            number, tensor = item.tasks[position]
            if tensor.change is not None:
                place = [int(axis) for axis in np.unravel_index(index, tensor.shape)]
                kept = family.kept[number]
                bad.append(f"adapter `{kept.name}` makes NaN or Inf of `{item.name}` at {place} ({kept.weights})")
    if bad:
        raise DataError("not finite:\n  " + "\n  ".join(bad[:20]), hint="get sound copies, or leave these tasks out")
    return found


def adapter_records(
    family: Family, digests: Mapping[tuple[int, str], str], base_fingerprint: str, sources: Sequence[str]
) -> list[dict[str, Any]]:
    """Make the plan's records of adapters. digests: empty for a plan from headers alone."""
    records, of_kept = [], [dict[str, str]() for _ in family.kept]
    for (number, name), digest in digests.items():
        of_kept[number][name] = digest
    for number, (kept, source) in enumerate(zip(family.kept, sources, strict=True)):
        files = {
            name: {"bytes": size, "digest": digest_file(path) if digests else NO_DIGEST}
            for name, (path, size) in sorted(kept.files().items())
        }
        text = "\n".join(f"{name} {files[name]['digest']}" for name in kept.identity)
        fingerprint = xxhash.xxh3_128_hexdigest(f"{text}\n{base_fingerprint}".encode())
        record = kept_record(kept, of_kept[number], source=source, files=files, fingerprint=fingerprint)
        records.append(record.model_dump(mode="json"))
    return records


def located(plan: Plan, kept: Sequence[KeptAdapter]) -> dict[tuple[str, str], Path]:
    """Map (adapter, file name) to the file. Raises DataError if an adapter is not the one that the plan saw."""
    check_on_disk(kept)
    files, problems = {}, []
    for record, found in zip(plan.adapters, kept, strict=True):
        if not record.is_of(found):
            problems.append(f"adapter `{record.name}`: {found.checkpoint.path}")
            continue
        there = found.files()
        for name, file in record.files.items():
            path, size = there.get(name, (found.weights, -1))
            if size != file.bytes:
                problems.append(f"adapter `{record.name}`: {found.checkpoint.path / name}")
            else:
                files[record.name, name] = path
    if problems:
        raise DataError("changed since the plan:\n  " + "\n  ".join(problems), hint="make the plan again")
    return files


def check_on_disk(kept: Sequence[KeptAdapter]) -> None:
    """Raise UsageError for adapters that are streamed: their files go into the bundle as they are."""
    streamed = [each.name for each in kept if any(t.stream for t in each.checkpoint.tensors.values())]
    if streamed:
        raise UsageError(
            f"adapters are kept as files, but --stream stores no files: {', '.join(streamed)}",
            hint="leave out --stream, or --adapters merge",
        )


def base_side_files(base: Checkpoint) -> dict[str, Path]:
    """Return the files that a merged model takes from the base."""
    return {name: path for name, path in base.side_files.items() if name != "README.md"}
