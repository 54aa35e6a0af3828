"""`plan`: sources in, all that a cut needs out. Every weight is read once; nothing is written."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli import keeping
from flexmerge_cli.allocation.plan_file import FORMAT, NO_DIGEST, Plan, plan_bytes, read_plan
from flexmerge_cli.allocation.plan_records import PlanTensor, Statistics
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, each_opened, open_checkpoint
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.family.adapters import Adapters, adapters_of, keep, models_of, partition_pairs, pool_base
from flexmerge_cli.family.blocks import Block
from flexmerge_cli.family.classes import TensorClass, aliases, tied_by_config
from flexmerge_cli.family.family import Family, FamilyTensor, make_family
from flexmerge_cli.family.vocabulary import split_vocabularies
from flexmerge_cli.order.linkage import Linkage, check_settings
from flexmerge_cli.order.order import Merge, Strategy, count_near_ties, merge_order
from flexmerge_cli.order.similarity import BlockMeasure, Similarity, comparison_unit
from flexmerge_cli.text import is_text
from flexmerge_cli.version import GENERATOR

OnProgress = Callable[[str, int, int], None]
"""(what, bytes done, bytes in all)"""


def silent(_what: str, _done: int, _total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """How blocks are made and merged; DESIGN words."""

    blocks: str = "component"
    """component, layer, tensor, model, or a path to one's own rules.yaml."""
    linkage: Linkage = Linkage.COMPLETE
    strategy: Strategy = Strategy.GREEDY
    similarity: Similarity = Similarity.COSINE
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `plan` is asked."""

    base: str
    tasks: Mapping[str, str]
    """Name -> source."""
    order: OrderSettings = field(default_factory=OrderSettings)
    private: tuple[str, ...] = ()
    """Name patterns of tensors that stay apart."""
    merge_heads: bool = False
    statistics: Statistics = "all"
    """`gram` leaves out what `--method auto` needs."""
    adapters: Adapters = "keep"
    """What becomes of tasks that are PEFT adapters."""
    assume_base: bool = False
    """Take the base for an adapter's own even if it names another."""
    relative_to: Path = field(default_factory=Path)
    """Folder that relative sources are relative to."""
    access: Access = ONLINE


def open_family(request: PlanRequest) -> Family:
    """Open all sources and align them: headers only. Reports every source that is not there at once."""

    def opened(source: str) -> Checkpoint | SourceError:
        try:
            return open_checkpoint(source, relative_to=request.relative_to, access=request.access)
        except SourceError as error:
            return error

    sources = {"": request.base, **request.tasks}
    found = dict(zip(sources, each_opened(opened, list(sources.values()), sources.values())))
    problems = [error for error in found.values() if isinstance(error, SourceError)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SourceError(
            "\n  ".join(["sources that cannot be had:", *(e.message for e in problems)]), hint=problems[0].hint
        )
    checkpoints = {name: checkpoint for name, checkpoint in found.items() if isinstance(checkpoint, Checkpoint)}
    base = checkpoints.pop("")
    if not checkpoints:
        raise UsageError("no tasks", hint="give --tasks DIR, or --task NAME=PATH")
    adapters = adapters_of(base, checkpoints, assume_base=request.assume_base)
    models = models_of(base, checkpoints, adapters)
    if request.adapters == "pool":
        pooled = {
            name: replace(found, adapter=adapters[name].kind.value)
            for name, found in checkpoints.items()
            if name in adapters
        }
        base = pool_base(base, checkpoints, adapters)
        return make_family(base, pooled, private=request.private, merge_heads=request.merge_heads)
    kept = [
        keep(base, name, adapter, models.pop(name)) for name, adapter in adapters.items() if request.adapters == "keep"
    ]
    return make_family(base, models, private=request.private, merge_heads=request.merge_heads, kept=kept)


def make_plan(
    request: PlanRequest,
    *,
    save_to: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress = silent,
) -> Plan:
    """Read every weight once and keep all that a cut needs. Writes nothing.

    save_to: where the plan will be saved; sources are told relative to its folder.
    Raises SourceError, DataError, UsageError.
    """
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.memory import survey_chunk
    from flexmerge_cli.engine.pool import default_threads
    from flexmerge_cli.engine.survey import SurveyItem, survey

    check_settings(request.order.linkage, request.order.similarity)
    where = choose_device(device)
    family = open_family(request)
    _blocks_of(family, request.order.blocks)  # a bad rules file is told before the weights are read
    keeping.check_on_disk(family.kept)
    fetch(to_fetch(family), request.access, on_progress)
    family = split_vocabularies(settle_ties(family))
    threads = threads or default_threads()
    items: list[SurveyItem] = []
    owners: list[FamilyTensor] = []
    if pools_lora(family, request):  # how factors code says nothing of their products
        request = replace(request, statistics="gram")
    for tensor in family.stored:
        for item in _survey_items(tensor):
            items.append(replace(item, codes=item.gram and request.statistics == "all"))
            owners.append(tensor)
    of_base, of_adapters = keeping.base_items(family), keeping.change_items(family)
    every = [*items, *of_base, *of_adapters]
    total = sum(t.num_bytes for item in every for _, t in item.tasks) + sum(i.base.num_bytes for i in every if i.base)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("compare", done, total)

    memory = request.access.memory_left(max_memory)
    measures = survey(
        every,
        device=where,
        threads=threads,
        signs=request.order.similarity is Similarity.SIGN,
        chunk_elements=survey_chunk(len(family.tasks), threads, memory, longest_row(items)),
        on_bytes=on_bytes,
    )
    tensors = _tensor_records(family, list(zip(owners, items, measures)))
    if family.kept:
        digests = {item.name: measure.base_digest for item, measure in zip(items, measures) if item.base is not None}
        digests |= {item.name: measure.digests[0] for item, measure in zip(of_base, measures[len(items) :])}
        for record in tensors:
            record["base_digest"] = digests.get(record["name"])
    if pools_lora(family, request):
        keeping.products_in_grams(family, tensors)
    low_rank = _low_rank(family, tensors)
    made = keeping.digests_of_changes(family, of_adapters, measures[len(items) + len(of_base) :])
    return _finish(family, tensors, request, save_to, made, low_rank)


def provisional_plan(family: Family, request: PlanRequest) -> Plan:
    """A plan from headers alone: no order, no digests, and whatever could be constant still as it seems. For prices."""
    family = split_vocabularies(family)
    records = [
        record | {"gram": [[0.0] * len(family.tasks)] * len(family.tasks)} for record in _tensor_records(family, [])
    ]
    for record, tensor in zip(records, family.stored):
        record["digests"] = [NO_DIGEST[:32] if found is not None else None for found in tensor.tasks]
        if tensor.tensor_class is not TensorClass.MERGEABLE:
            record["gram"] = None
        if family.kept and tensor.base is not None:
            record["base_digest"] = NO_DIGEST[:32]
    plan = _finish(family, records, replace(request, statistics="gram"), None)
    merged = [
        {"block": block.name, "left": list(range(end)), "right": [end], "similarity": 0.0}
        for block in plan.blocks
        for end in range(1, len(plan.tasks))
    ]
    fields = plan.model_dump(mode="json", by_alias=True) | {"order": merged}
    return Plan.model_validate_json(plan_bytes(fields))


def replan(plan: Plan, order: OrderSettings, *, without_statistics: bool = False) -> Plan:
    """The same measurements with other blocks, linkage, strategy or similarity. Reads no weights.

    without_statistics: without those that `auto` needs, for a smaller file.
    """
    mergeable = [tensor for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
    blocks = partition_pairs([tensor.name for tensor in mergeable], order.blocks)
    block_of = {name: block.name for block in blocks for name in block.tensors}
    fields = plan.model_dump(mode="json", by_alias=True)
    for tensor in fields["tensors"]:
        tensor["block"] = block_of.get(tensor["name"])
        tensor["coding"] = None if without_statistics else tensor["coding"]
    fields["settings"] |= {"statistics": "gram"} if without_statistics else {}
    fields |= _order_fields({tensor.name: tensor for tensor in mergeable}, blocks, order)
    fields["settings"] |= _settings(order)
    fields["generator"] = GENERATOR
    return Plan.model_validate_json(plan_bytes(fields))


def load_plan(path: Path | str) -> Plan:
    """Read a plan.json. Raises UsageError if it is none or was edited, SourceError if it is not there."""
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"no plan at {path}", hint="make one with `flexmerge plan`")
    return read_plan(path)


def to_fetch(family: Family) -> list[RemoteFile]:
    """Files of the Hub that hold a tensor which is compared or stored."""
    remote: dict[Path, RemoteFile] = {}
    for checkpoint in (family.base, *family.tasks, *(kept.model for kept in family.kept)):
        remote |= checkpoint.remote
    read = [task for tensor in family.tensors for task in tensor.tasks if task is not None]
    read += [
        tensor.base
        for tensor in family.tensors
        if tensor.base is not None and (tensor.tensor_class is TensorClass.MERGEABLE or tensor.resized)
    ]
    read += [tensor for kept in family.kept for tensor in kept.model.tensors.values()]
    return [remote[path] for path in dict.fromkeys(path for tensor in read for path in tensor.paths) if path in remote]


def settle_ties(family: Family) -> Family:
    """Class `tied` where every task that has a tensor has it as an alias: by shared storage, or by its config and bits.

    Compares only the pairs that a config ties, and stops at the first byte that differs. A task that lacks the alias,
    as one that is tied may, says nothing.
    """
    candidates: dict[str, list[str | None]] = {}
    by_name = {tensor.name: tensor for tensor in family.tensors}
    for task, checkpoint in enumerate(family.tasks):
        aligned = {own: name for name, own in family.own_names[task].items()}
        pairs = tied_by_config(checkpoint.config, checkpoint.tensors)
        ties = {alias: target for alias, target in pairs.items() if same_bits(checkpoint, alias, target)}
        for alias, target in (ties | aliases(checkpoint.tensors)).items():
            candidates.setdefault(aligned[alias], [None] * len(family.tasks))[task] = aligned[target]
    tied: dict[str, str] = {}
    for alias, targets in candidates.items():
        have = {targets[task] for task in by_name[alias].present}
        if family.kept and by_name[alias].base is not None:
            continue  # what the tasks tie the base need not, and adapters have the base's
        only = have.pop() if len(have) == 1 else None
        if only is not None and set(by_name[alias].present) <= set(by_name[only].present):
            tied[alias] = only
    tensors = tuple(
        replace(tensor, tensor_class=TensorClass.TIED, reason=tied[tensor.name])
        if tensor.name in tied and tied[tensor.name] not in tied
        else tensor
        for tensor in family.tensors
    )
    return replace(family, tensors=tensors)


def same_bits(checkpoint: Checkpoint, left: str, right: str, chunk: int = 1 << 20) -> bool:
    """Whether two tensors of one model, of one shape and dtype, hold the same bytes."""
    from flexmerge_cli.checkpoint.reader import Reader

    a, b = checkpoint.tensors[left], checkpoint.tensors[right]
    buffers = [np.empty(chunk * a.item_bytes, np.uint8) for _ in range(2)]
    with Reader() as reader:
        for start in range(0, a.num_elements, chunk):
            stop = min(start + chunk, a.num_elements)
            if not np.array_equal(reader.read(a, start, stop, buffers[0]), reader.read(b, start, stop, buffers[1])):
                return False
    return True


def _survey_items(tensor: FamilyTensor) -> list[Any]:
    """What to read of a tensor: one item over base and tasks, or one per form (shape, dtype) of a private tensor."""
    from flexmerge_cli.engine.survey import SurveyItem

    tasks = [(index, found) for index, found in enumerate(tensor.tasks) if found is not None]
    if tensor.tensor_class in (TensorClass.BASE_ONLY, TensorClass.TIED):
        return []
    if tensor.tensor_class is TensorClass.MERGEABLE:
        return [SurveyItem(name=tensor.name, base=tensor.base, tasks=tuple(tasks), gram=True)]
    forms: dict[Any, list[Any]] = {}
    for index, found in tasks:
        forms.setdefault((found.shape, found.dtype), []).append((index, found))
    return [SurveyItem(name=tensor.name, base=None, tasks=tuple(of_form), gram=False) for of_form in forms.values()]


def longest_row(items: Sequence[Any]) -> int | None:
    """Elements of the longest row that is coded; None if none is."""
    from flexmerge_cli.engine.survey_codes import view_of

    return max((view_of(item.base.shape)[1] for item in items if item.codes), default=None)


def _tensor_records(family: Family, found: Sequence[tuple[FamilyTensor, Any, Any]]) -> list[dict[str, Any]]:
    """One record per tensor, its class settled by the bits. Raises DataError with every value that is not finite."""
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
            digests = ["0" * 32 if found is not None else None for found in tensor.tasks]
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
    """Whether the numbers of finite weights are finite, too."""
    sums = [[measure.base_energy]]
    sums += [measure.gram.ravel()] if measure.gram is not None else []
    coding = measure.coding
    sums += [list(each.values()) for each in (coding.base, coding.average, coding.ratio)] if coding is not None else []
    return bool(np.isfinite(np.concatenate(sums)).all())


def _low_rank(family: Family, records: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """Task -> what is found of it, for full fine-tunes that are the base plus matrices of low rank."""
    from flexmerge_cli.checkpoint.reader import Reader
    from flexmerge_cli.engine.low_rank_sketch import Pair, low_rank_of, matrix_shape

    found = {}
    with Reader() as reader:
        for task, checkpoint in enumerate(family.tasks):
            pairs = []
            for tensor, record in zip(family.tensors, records):
                own = tensor.tasks[task]
                changed = record["class"] is TensorClass.MERGEABLE and not record["is_base"][task]
                if changed and own is not None and tensor.base is not None and len(own.shape) >= 2:
                    pairs.append(Pair(base=tensor.base, task=own))
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


def pools_lora(family: Family, request: PlanRequest) -> bool:
    return request.adapters == "pool" and any(task.adapter == "lora" for task in family.tasks)


def _not_finite(family: Family, tensor: FamilyTensor, found: Sequence[tuple[Any, Any]]) -> list[str]:
    lines = []
    for item, measure in found:
        for position, index in measure.not_finite:
            stored = item.base if position < 0 else item.tasks[position][1]
            who = "the base" if position < 0 else f"task `{family.task_names[item.tasks[position][0]]}`"
            place = [int(axis) for axis in np.unravel_index(index, stored.shape)] if stored.shape else []
            lines.append(f"{who} has NaN or Inf in `{stored.name}` at {place} ({stored.path})")
    return lines


def _finish(
    family: Family,
    records: list[dict[str, Any]],
    request: PlanRequest,
    save_to: Path | None,
    made: Mapping[tuple[int, str], str] | None = None,
    low_rank: Mapping[int, dict[str, int]] | None = None,
) -> Plan:
    """Blocks, order and names to the measurements: the plan. made: digests of what kept adapters make."""
    mergeable = [record for record in records if record["class"] is TensorClass.MERGEABLE]
    blocks = partition_pairs([record["name"] for record in mergeable], request.order.blocks)
    block_of = {name: block.name for block in blocks for name in block.tensors}
    for record in records:
        record["block"] = block_of.get(record["name"])
    tensors = {record["name"]: PlanTensor.model_validate(record) for record in mergeable}
    folder = (save_to.absolute().parent if save_to else Path.cwd()).resolve()
    base_fingerprint = _fingerprint(family.base, [(r["name"], r["base_digest"]) for r in records])
    of_base = keeping.base_side_files(family.base) if family.kept else {}
    fields: dict[str, Any] = {
        "format": FORMAT,
        "generator": GENERATOR,
        "sha256": NO_DIGEST,
        "one_model_bytes": family.one_model_bytes,
        "base": {
            "source": _relative(family.base, folder),
            "fingerprint": base_fingerprint,
            "files": _side_files(of_base),
            "names": {t.name: t.base.name for t in family.tensors if t.base and t.name not in family.base.tensors},
        },
        "tasks": [
            {
                "name": name,
                "source": _relative(checkpoint, folder),
                "fingerprint": _fingerprint(checkpoint, [(r["name"], r["digests"][task]) for r in records]),
                "bytes": checkpoint.num_bytes,
                "files": _side_files(checkpoint.side_files),
                "names": {a: own for a, own in family.own_names[task].items() if a != own},
                "config_base": _config_base(checkpoint),
                "adapter": checkpoint.adapter,
                "low_rank": (low_rank or {}).get(task),
            }
            for task, (name, checkpoint) in enumerate(zip(family.task_names, family.tasks))
        ],
        "adapters": keeping.adapter_records(
            family, made or {}, base_fingerprint, [_relative(kept.model, folder) for kept in family.kept]
        ),
        "tensors": records[: len(family.tensors)],
        "rows": records[len(family.tensors) :],
        "vocabularies": [asdict(vocabulary) for vocabulary in family.vocabularies],
        "settings": {
            "adapters": request.adapters,
            "assume_base": request.assume_base,
            "private": list(request.private),
            "merge_heads": request.merge_heads,
            "statistics": request.statistics,
            "variant": request.access.variant,
            **_settings(request.order),
        },
        **_order_fields(tensors, blocks, request.order),
    }
    return Plan.model_validate_json(plan_bytes(fields))


def _settings(order: OrderSettings) -> dict[str, Any]:
    own = Path(order.blocks).is_file()
    return {
        "blocks": "rules" if own else order.blocks,
        "rules": Path(order.blocks).read_text() if own else None,
        "linkage": str(order.linkage),
        "strategy": str(order.strategy),
        "similarity": str(order.similarity),
        "seed": order.seed,
    }


def _order_fields(tensors: Mapping[str, PlanTensor], blocks: Sequence[Block], order: OrderSettings) -> dict[str, Any]:
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


def block_measure(name: str, tensors: Sequence[PlanTensor]) -> BlockMeasure:
    """What the order needs to know of a block: its tensors' Gram matrices, added in the block's order."""
    count = len(tensors[0].same)
    gram, identical = np.zeros((count, count)), np.ones((count, count), bool)
    agreement = np.zeros((count, count), np.int64) if all(t.agreement is not None for t in tensors) else None
    for tensor in tensors:
        gram = gram + np.array(tensor.gram, np.float64)
        same = np.array(tensor.same)
        identical &= same[:, None] == same[None, :]
        if agreement is not None:
            agreement += np.array(tensor.agreement, np.int64)
    elements = sum(tensor.num_elements for tensor in tensors)
    return BlockMeasure(name=name, gram=gram, num_elements=elements, identical=identical, agreement=agreement)


def _blocks_of(family: Family, blocks: str) -> tuple[Block, ...]:
    return partition_pairs([t.name for t in family.tensors if t.tensor_class is TensorClass.MERGEABLE], blocks)


def _relative(checkpoint: Checkpoint, folder: Path) -> str:
    if is_remote(checkpoint.source):
        return checkpoint.source
    return os.path.relpath(checkpoint.path.resolve() if checkpoint.path.is_dir() else checkpoint.path, folder)


def _fingerprint(checkpoint: Checkpoint, digests: Sequence[tuple[str, str | None]]) -> str:
    """Digest of every tensor's name and digest."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{name} {digest}" for name, digest in digests if digest).encode())


def _config_base(checkpoint: Checkpoint) -> str | None:
    """What the config names as the model it comes from, where it does so in text."""
    named = checkpoint.config.get("_name_or_path")
    return named[:200] if isinstance(named, str) and named and is_text(named) else None


def _side_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": path.stat().st_size, "digest": digest_bytes(path.read_bytes())} for name, path in files.items()
    }
