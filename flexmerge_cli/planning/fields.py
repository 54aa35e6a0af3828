"""Makes the fields of a plan from a family and what the pass measured: tensors, tasks, blocks and the order.

Reads the files beside the weights, for digests, and a few matrices of full fine-tunes (low_rank_sketch.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.allocation.block_measure import block_measure
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.libraries import library_of
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.blocks import Block
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.factors import factor_pairs, partition_pairs
from flexmerge_cli.family.family import Family, FamilyTensor
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.plan_file import FORMAT, Plan, sealed_plan
from flexmerge_cli.formats.plan_records import PlanSettings, PlanTensor
from flexmerge_cli.order.order import Merge, count_near_ties, merge_order
from flexmerge_cli.order.similarity import comparison_unit
from flexmerge_cli.planning import kept_adapters
from flexmerge_cli.record import NO_DIGEST, NO_SHA256
from flexmerge_cli.request.plan import OrderSettings, PlanRequest
from flexmerge_cli.text import is_text
from flexmerge_cli.version import GENERATOR

SETTINGS_OF_REQUEST = ("adapters", "assume_base", "private", "merge_heads", "statistics")
SETTINGS_OF_ACCESS = ("variant", "ignore", "with_code", "follow_links")


def tensor_records(family: Family, found: Sequence[tuple[FamilyTensor, Any, Any]]) -> list[dict[str, Any]]:
    """Make one record per tensor, its class settled by the bits. Raises DataError with every value that is not
    finite."""
    count = len(family.tasks)
    by_name: dict[str, list[tuple[Any, Any]]] = {}
    for owner, item, measure in found:
        by_name.setdefault(owner.name, []).append((item, measure))
    records, bad = [], []
    for tensor in family.stored:
        first = next((t for t in tensor.tasks if t is not None), tensor.base)
        assert first is not None
        digests: list[str | None] = [None] * count
        same, is_base = list(range(count)), [False] * count
        unmeasured = {"gram": None, "agreement": None, "base_digest": None, "base_energy": 0.0, "coding": None}
        record: dict[str, Any] = dict(unmeasured)
        finite = True
        for item, measure in by_name.get(tensor.name, []):
            tasks = [task for task, _ in item.tasks]
            for position, task in enumerate(tasks):
                digests[task] = measure.digests[position]
                same[task] = tasks[measure.same[position]]
                is_base[task] = measure.is_base[position]
            finite &= not measure.not_finite
            if measure.gram is not None:
                record |= {"gram": measure.gram.tolist(), "base_digest": measure.base_digest}
                record["base_energy"] = measure.base_energy
                record["coding"] = measure.coding.to_dict() if measure.coding is not None else None
                record["agreement"] = measure.agreement.tolist() if measure.agreement is not None else None
        tensor_class, reason = tensor.tensor_class, tensor.reason
        settled = tensor_class in (TensorClass.MERGEABLE, TensorClass.PRIVATE)
        if settled and tensor.could_be_constant and set(same) == {0}:
            tensor_class, reason = TensorClass.CONSTANT, ""
            record |= unmeasured
        if tensor_class is TensorClass.TIED:
            digests = [NO_DIGEST if found is not None else None for found in tensor.tasks]
        measured = by_name.get(tensor.name, []) if tensor_class is TensorClass.MERGEABLE else []
        if measured and not finite:
            bad += _not_finite(family, tensor, measured)
        elif not all(_is_measured(measure) for _, measure in measured):
            bad.append(f"`{tensor.name}` holds values, or differs from the base's by some, that float32 cannot hold")
        dtypes = [found.dtype if found else None for found in tensor.tasks]
        shapes = [list(found.shape) if found else None for found in tensor.tasks]
        records.append(
            record
            | {
                "name": tensor.name,
                "class": tensor_class,
                "reason": reason,
                "dtype": first.dtype,
                "shape": list(first.shape),
                "base_dtype": tensor.base.dtype if tensor.base else None,
                "dtypes": dtypes if set(dtypes) - {None, first.dtype} else None,
                "shapes": shapes if any(s is not None and s != list(first.shape) for s in shapes) else None,
                "block": None,
                "digests": digests,
                "same": same,
                "is_base": is_base,
                "finite": finite,
                "base_shape": list(tensor.base.shape)
                if family.kept and tensor.base is not None and tensor.base.shape != first.shape
                else None,
            }
        )
    if bad:
        raise DataError("not finite:\n  " + "\n  ".join(bad), hint="get sound copies, or leave these tasks out")
    return records


def _is_measured(measure: Any) -> bool:
    """Return whether the numbers of finite weights are finite, too."""
    sums = [[measure.base_energy]]
    sums += [measure.gram.ravel()] if measure.gram is not None else []
    coding = measure.coding
    sums += [list(each.values()) for each in (coding.base, coding.average, coding.ratio)] if coding is not None else []
    return bool(np.isfinite(np.concatenate(sums)).all())


def low_rank_records(
    family: Family,
    records: Sequence[Mapping[str, Any]],
    known: Mapping[str, tuple[frozenset[str], dict[str, int] | None]],
) -> dict[int, dict[str, int]]:
    """Map each task that is a full fine-tune, and the base plus low-rank matrices, to what is found about them.

    known: maps a task to the names of its matrices, and to what was found about these.
    """
    from flexmerge_cli.checkpoint.reader import Reader
    from flexmerge_cli.engine.low_rank_sketch import Pair, low_rank_of, matrix_shape

    found: dict[int, dict[str, int]] = {}
    with Reader() as reader:
        for task, checkpoint in enumerate(family.tasks):
            pairs, names = [], list[str]()
            for tensor, record in zip(family.tensors, records):
                own = tensor.tasks[task]
                changed = record["class"] is TensorClass.MERGEABLE and not record["is_base"][task]
                if changed and own is not None and tensor.base is not None and len(own.shape) >= 2:
                    pairs.append(Pair(base=tensor.base, task=own))
                    names.append(tensor.name)
            then, of_then = known.get(family.task_names[task], (None, None))
            if then == frozenset(names):
                found |= {task: of_then} if of_then is not None else {}
                continue
            rank = None if checkpoint.adapter is not None else low_rank_of(pairs, reader)
            if rank is not None:
                as_residuals = [rank * sum(matrix_shape(pair.task)) * pair.task.item_bytes for pair in pairs]
                found[task] = {
                    "rank": rank,
                    "matrices": len(pairs),
                    "bytes": sum(pair.task.num_bytes for pair in pairs),
                    "residual_bytes": sum(min(r, pair.task.num_bytes) for r, pair in zip(as_residuals, pairs)),
                }
    return found


def products_in_grams(family: Family, records: Sequence[dict[str, Any]]) -> None:
    """Put the Gram matrix of products at the second factor of each pair, and zeros at the first. Reads the factors
    again."""
    from flexmerge_cli.checkpoint.reader import Reader
    from flexmerge_cli.engine.device import as_tensor
    from flexmerge_cli.methods.products import product_gram

    by_name = {record["name"]: (tensor, record) for tensor, record in zip(family.tensors, records)}
    merging = [name for name, (_, record) in by_name.items() if record["class"] is TensorClass.MERGEABLE]
    zero = [[0.0] * len(family.tasks)] * len(family.tasks)
    with Reader() as reader:

        def values(name: str) -> list[Any]:
            own = [tensor for tensor in by_name[name][0].tasks if tensor is not None]  # what merges is in every task
            read = [reader.read(each, 0, each.num_elements, np.empty(each.num_bytes, np.uint8)) for each in own]
            return [as_tensor(data, each.dtype).view(each.shape) for each, data in zip(own, read)]

        for a, b in factor_pairs(merging):
            by_name[b][1]["gram"] = product_gram(values(a), values(b)).tolist()
            by_name[a][1]["gram"] = zero


def _not_finite(family: Family, tensor: FamilyTensor, found: Sequence[tuple[Any, Any]]) -> list[str]:
    lines = []
    for item, measure in found:
        for position, index in measure.not_finite:
            stored = item.base if position < 0 else item.tasks[position][1]
            who = "the base" if position < 0 else f"task `{family.task_names[item.tasks[position][0]]}`"
            place = [int(axis) for axis in np.unravel_index(index, stored.shape)] if stored.shape else []
            part = "" if whole_of(tensor.name)[1] is None else f", in its part `{tensor.name}`,"
            lines.append(f"{who} has NaN or Inf in `{stored.name}`{part} at {place} ({stored.path})")
    return lines


def plan_of(
    family: Family,
    records: list[dict[str, Any]],
    request: PlanRequest,
    save_to: Path | None,
    made: Mapping[tuple[int, str], str] | None = None,
    low_rank: Mapping[int, dict[str, int]] | None = None,
) -> Plan:
    """Make the plan: add blocks, order and names to the measurements. made: digests of the kept adapters' tensors."""
    mergeable = [record for record in records if record["class"] is TensorClass.MERGEABLE]
    blocks = partition_pairs([record["name"] for record in mergeable], request.order.blocks)
    block_of = {name: block.name for block in blocks for name in block.tensors}
    for record in records:
        record["block"] = block_of.get(record["name"])
    tensors = {record["name"]: PlanTensor.model_validate(record) for record in mergeable}
    folder = (save_to.absolute().parent if save_to else Path.cwd()).resolve()
    base_fingerprint = _fingerprint(family.base, [(r["name"], r["base_digest"]) for r in records])
    of_base = kept_adapters.base_side_files(family.base) if family.kept else {}
    fields: dict[str, Any] = {
        "format": FORMAT,
        "generator": GENERATOR,
        "sha256": NO_SHA256,
        "one_model_bytes": family.one_model_bytes,
        "base": {
            "source": _relative(family.base, folder),
            "fingerprint": base_fingerprint,
            "files": _side_files(of_base),
            "names": {
                whole_of(t.name)[0]: t.base.name
                for t in family.tensors
                if t.base and whole_of(t.name)[0] not in family.base.tensors
            },
            "library": library_of(family.base.config, family.base.side_files),
            "license": family.base.license,
        },
        "tasks": [
            {
                "name": name,
                "source": _relative(checkpoint, folder),
                "fingerprint": _fingerprint(checkpoint, [(r["name"], r["digests"][task]) for r in records]),
                "bytes": checkpoint.num_bytes,
                "files": _side_files(checkpoint.side_files),
                "names": {a: own for a, own in family.own_names[task].items() if a != own},
                "parts": checkpoint.parts,
                "config_base": _config_base(checkpoint),
                "adapter": checkpoint.adapter,
                "low_rank": (low_rank or {}).get(task),
                "library": library_of(checkpoint.config, checkpoint.side_files),
                "license": checkpoint.license,
            }
            for task, (name, checkpoint) in enumerate(zip(family.task_names, family.tasks))
        ],
        "adapters": kept_adapters.adapter_records(
            family, made or {}, base_fingerprint, [_relative(kept.model, folder) for kept in family.kept]
        ),
        "tensors": [tensors.get(record["name"], record) for record in records[: len(family.tensors)]],
        "rows": records[len(family.tensors) :],
        "settings": requested_settings(request).model_dump(mode="json"),
        **family.division,
        **order_fields(tensors, blocks, request.order),
    }
    return sealed_plan(fields)


def requested_settings(request: PlanRequest) -> PlanSettings:
    """Return the settings of the plan that a request asks for."""
    asked = {name: getattr(request, name) for name in SETTINGS_OF_REQUEST}
    access = {name: getattr(request.access, name) for name in SETTINGS_OF_ACCESS}
    return PlanSettings(**settings_fields(request.order), **asked, **access)


def settings_fields(order: OrderSettings) -> dict[str, Any]:
    """Return the fields of `settings` that describe how the order was made."""
    own = Path(order.blocks).is_file()
    rules = Path(order.blocks).read_text() if own else None
    return asdict(order) | {"blocks": "rules" if own else order.blocks, "rules": rules}


def order_fields(tensors: Mapping[str, PlanTensor], blocks: Sequence[Block], order: OrderSettings) -> dict[str, Any]:
    """Return the fields `blocks`, `order` and `near_ties`."""
    measures = [block_measure(block.name, [tensors[name] for name in block.tensors]) for block in blocks]
    merges: tuple[Merge, ...] = merge_order(
        measures, linkage=order.linkage, strategy=order.strategy, similarity=order.similarity, seed=order.seed
    )
    return {
        "blocks": [
            {"name": block.name, "tensors": list(block.tensors), "elements": measure.num_elements}
            for block, measure in zip(blocks, measures)
        ],
        "order": [
            {
                "block": blocks[merge.block].name,
                "left": list(merge.left),
                "right": list(merge.right),
                "similarity": merge.similarity,
            }
            for merge in merges
        ],
        "near_ties": count_near_ties(merges, unit=comparison_unit(measures, order.similarity)),
    }


def _relative(checkpoint: Checkpoint, folder: Path) -> str:
    if is_remote(checkpoint.source):
        return checkpoint.source
    return os.path.relpath(checkpoint.path.resolve() if checkpoint.path.is_dir() else checkpoint.path, folder)


def _fingerprint(checkpoint: Checkpoint, digests: Sequence[tuple[str, str | None]]) -> str:
    """Return the digest of every tensor's name and digest."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{name} {digest}" for name, digest in digests if digest).encode())


def _config_base(checkpoint: Checkpoint) -> str | None:
    """Return the model that the config names as its origin, if it does so in text."""
    named = checkpoint.config.get("_name_or_path")
    return named[:200] if isinstance(named, str) and named and is_text(named) else None


def _side_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": path.stat().st_size, "digest": digest_bytes(path.read_bytes())} for name, path in files.items()
    }
