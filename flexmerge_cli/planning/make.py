"""Makes a plan: sources in, all that a cut needs out. Reads every weight once and writes nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.engine.survey_item import Measure, SurveyItem
from flexmerge_cli.errors import SourceError
from flexmerge_cli.family.blocks import Block
from flexmerge_cli.family.classes import TensorClass, aliases, tied_by_config
from flexmerge_cli.family.factors import partition_pairs
from flexmerge_cli.family.family import Family, FamilyTensor
from flexmerge_cli.family.splitting import divided, require_splits, split_tensors
from flexmerge_cli.formats.plan_file import Plan, read_plan, sealed_plan
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.planning import kept_adapters
from flexmerge_cli.planning.fields import (
    low_rank_records,
    order_fields,
    plan_of,
    products_in_grams,
    settings_fields,
    tensor_records,
)
from flexmerge_cli.planning.known import Known
from flexmerge_cli.planning.measuring import OnProgress, measure, silent
from flexmerge_cli.planning.sources import files_to_fetch, open_family
from flexmerge_cli.record import NO_DIGEST
from flexmerge_cli.request.plan import OrderSettings, PlanRequest
from flexmerge_cli.version import GENERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The sources of a plan, and what to measure in them."""

    family: Family
    request: PlanRequest
    owners: list[FamilyTensor]
    """The tensor that each of `compared` belongs to."""
    compared: list[SurveyItem]
    of_base: list[SurveyItem]
    of_adapters: list[SurveyItem]

    @property
    def items(self) -> list[SurveyItem]:
        """All items, in the order of the pass."""
        return [*self.compared, *self.of_base, *self.of_adapters]


def opened(
    request: PlanRequest,
    *,
    on_open: Callable[[Family], None] = lambda _family: None,
    on_progress: OnProgress = silent,
    known: Known | None = None,
) -> Opened:
    """Open all sources and list what to measure. Raises SourceError, DataError, UsageError."""
    family = open_family(request, may_ignore=known.plan.settings.ignore if known is not None else ())
    on_open(family)
    if known is not None:
        known.check_headers(family)
    _blocks_of(family, request.order.blocks)  # reports a bad rules file before the weights are read
    split_tensors(family, request.order.blocks)
    kept_adapters.check_on_disk(family.kept)
    fetch(to_fetch(family), request.access, on_progress)
    family = divided(settle_ties(family, known), request.order.blocks)
    if family.merges_products:  # how well factors code says nothing about their products
        request = replace(request, statistics="gram")
    owners, items = survey_items(family, request)
    return Opened(
        family=family,
        request=request,
        owners=owners,
        compared=items,
        of_base=kept_adapters.base_items(family),
        of_adapters=kept_adapters.change_items(family),
    )


def measured_alone(
    items: Sequence[SurveyItem],
    request: PlanRequest,
    what: str = "compare",
    *,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress = silent,
) -> list[Measure]:
    """Read these items once. Each is measured by itself."""
    return measure(
        items,
        what,
        device=device,
        threads=threads,
        max_memory=request.access.memory_left(max_memory),
        signs=request.order.similarity is Similarity.SIGN,
        on_progress=on_progress,
    )


def make_plan(
    request: PlanRequest,
    *,
    save_to: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress = silent,
    on_open: Callable[[Family], None] = lambda _family: None,
    known: Known | None = None,
    measured: Callable[[Family, Sequence[SurveyItem]], list[Measure]] | None = None,
) -> Plan:
    """Read every weight once and keep all that a cut needs. Writes nothing.

    save_to: where the plan will be saved; sources are stored relative to its folder. on_open: called before the weights
    are read, with all sources; left_out.py says which of their files are not carried. known: what an earlier plan
    knows, which is not read again. measured: returns what parts.py has of all items, which then are not read. Raises
    SourceError, DataError, UsageError.
    """
    if measured is None:
        from flexmerge_cli.engine.device import choose_device

        choose_device(device)  # reports a missing device before any source is opened
    asked = opened(request, on_open=on_open, on_progress=on_progress, known=known)
    family, request, owners, items = asked.family, asked.request, asked.owners, asked.compared
    of_base, of_adapters = asked.of_base, asked.of_adapters

    def run(chosen: Sequence[SurveyItem], what: str = "compare") -> list[Measure]:
        return measured_alone(
            chosen, request, what, device=device, threads=threads, max_memory=max_memory, on_progress=on_progress
        )

    if known is None:
        found = run(asked.items) if measured is None else measured(family, asked.items)
        measures, more = found[: len(items)], found[len(items) :]
    else:
        kept = [each.name for each in family.kept]
        measures = known.measure(family, owners, items, run)
        more = known.measure_alone(of_base, known.base_digest, run)
        more += known.measure_alone(of_adapters, lambda name, task: known.change_digest(kept[task], name), run)
    tensors = tensor_records(family, list(zip(owners, items, measures)))
    if family.kept:
        digests = {item.name: measure.base_digest for item, measure in zip(items, measures) if item.base is not None}
        digests |= {item.name: measure.digests[0] for item, measure in zip(of_base, more)}
        for record in tensors:
            record["base_digest"] = digests.get(record["name"])
    if family.merges_products:
        products_in_grams(family, tensors)
    low_rank = low_rank_records(family, tensors, known.low_rank(family) if known is not None else {})
    made = kept_adapters.digests_of_changes(family, of_adapters, more[len(of_base) :])
    plan = plan_of(family, tensors, request, save_to, made, low_rank)
    if known is not None:
        known.check_files(plan)
    return plan


def provisional_plan(family: Family, request: PlanRequest) -> Plan:
    """Make a plan from headers alone, for prices: no order, no digests, and whatever could be constant as it
    appears."""
    family = divided(family, request.order.blocks)
    records = [
        record | {"gram": [[0.0] * len(family.tasks)] * len(family.tasks)} for record in tensor_records(family, [])
    ]
    for record, tensor in zip(records, family.stored):
        record["digests"] = [NO_DIGEST if found is not None else None for found in tensor.tasks]
        if tensor.tensor_class is not TensorClass.MERGEABLE:
            record["gram"] = None
        if family.kept and tensor.base is not None:
            record["base_digest"] = NO_DIGEST
    plan = plan_of(family, records, replace(request, statistics="gram"), None)
    merged = [
        {"block": block.name, "left": list(range(end)), "right": [end], "similarity": 0.0}
        for block in plan.blocks
        for end in range(1, len(plan.tasks))
    ]
    fields = plan.model_dump(mode="json", by_alias=True) | {"order": merged}
    return sealed_plan(fields)


def replan(plan: Plan, order: OrderSettings, *, without_statistics: bool = False) -> Plan:
    """Make a plan from the same measurements with other blocks, linkage, strategy or similarity. Reads no weights.

    without_statistics: leave out those that `auto` needs, for a smaller file.
    """
    mergeable = [tensor for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
    require_splits({tensor.name: tensor.shape for tensor in mergeable}, plan.splits, order.blocks)
    blocks = partition_pairs([tensor.name for tensor in mergeable], order.blocks)
    block_of = {name: block.name for block in blocks for name in block.tensors}
    fields = plan.model_dump(mode="json", by_alias=True)
    for tensor in fields["tensors"]:
        tensor["block"] = block_of.get(tensor["name"])
        tensor["coding"] = None if without_statistics else tensor["coding"]
    fields["settings"] |= {"statistics": "gram"} if without_statistics else {}
    fields |= order_fields({tensor.name: tensor for tensor in mergeable}, blocks, order)
    fields["settings"] |= settings_fields(order)
    fields["generator"] = GENERATOR
    return sealed_plan(fields)


def load_plan(path: Path | str) -> Plan:
    """Read a plan.json. Raises UsageError if it is not a plan or was edited, SourceError if it does not exist."""
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"no plan at {path}", hint="make one with `flexmerge plan`")
    return read_plan(path)


def to_fetch(family: Family) -> list[RemoteFile]:
    """List the files on the Hub that hold a tensor that is compared or stored."""
    read = [task for tensor in family.tensors for task in tensor.tasks if task is not None]
    read += [
        tensor.base
        for tensor in family.tensors
        if tensor.base is not None and (tensor.tensor_class is TensorClass.MERGEABLE or tensor.resized)
    ]
    read += [tensor for kept in family.kept for tensor in kept.model.tensors.values()]
    return files_to_fetch([family.base, *family.models.values()], read)


def settle_ties(family: Family, known: Known | None = None) -> Family:
    """Classify a tensor as `tied` if it is an alias in every task that has it, by shared storage or by config and bits.

    Compares only the pairs that a config ties, and stops at the first byte that differs. A task that lacks the alias,
    as a tied one may, does not count.
    """
    candidates: dict[str, list[str | None]] = {}
    by_name = {tensor.name: tensor for tensor in family.tensors}
    for task, checkpoint in enumerate(family.tasks):
        aligned = {own: name for name, own in family.own_names[task].items()}
        pairs = tied_by_config(checkpoint.config, checkpoint.tensors)
        ties = {}
        for alias, target in pairs.items():
            is_tied = known.is_tied(family.task_names[task], aligned[alias], aligned[target]) if known else None
            if same_bits(checkpoint, alias, target) if is_tied is None else is_tied:
                ties[alias] = target
        for alias, target in (ties | aliases(checkpoint.tensors)).items():
            candidates.setdefault(aligned[alias], [None] * len(family.tasks))[task] = aligned[target]
    tied: dict[str, str] = {}
    for alias, targets in candidates.items():
        have = {targets[task] for task in by_name[alias].present}
        if family.kept and by_name[alias].base is not None:
            continue  # the base need not tie what the tasks tie, and adapters have the base's
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


def same_bits(checkpoint: Checkpoint, left: str, right: str) -> bool:
    """Return whether two tensors of one model, of one shape and dtype, hold the same bytes."""
    from flexmerge_cli.checkpoint.reader import Reader

    chunk = 1 << 20  # elements
    a, b = checkpoint.tensors[left], checkpoint.tensors[right]
    buffers = [np.empty(chunk * a.item_bytes, np.uint8) for _ in range(2)]
    with Reader() as reader:
        for start in range(0, a.num_elements, chunk):
            stop = min(start + chunk, a.num_elements)
            if not np.array_equal(reader.read(a, start, stop, buffers[0]), reader.read(b, start, stop, buffers[1])):
                return False
    return True


def _survey_items(tensor: FamilyTensor) -> list[Any]:
    """List what to read of a tensor: one item over base and tasks, or one per form (shape, dtype) if it is private."""
    tasks = [(index, found) for index, found in enumerate(tensor.tasks) if found is not None]
    if tensor.tensor_class in (TensorClass.BASE_ONLY, TensorClass.TIED):
        return []
    if tensor.tensor_class is TensorClass.MERGEABLE:
        return [SurveyItem(name=tensor.name, base=tensor.base, tasks=tuple(tasks), gram=True)]
    forms: dict[Any, list[Any]] = {}
    for index, found in tasks:
        forms.setdefault((found.shape, found.dtype), []).append((index, found))
    return [SurveyItem(name=tensor.name, base=None, tasks=tuple(of_form), gram=False) for of_form in forms.values()]


def survey_items(family: Family, request: PlanRequest) -> tuple[list[FamilyTensor], list[SurveyItem]]:
    """List the items to compare of each stored tensor, and the tensor each belongs to. The family is `divided`."""
    found = [(tensor, item) for tensor in family.stored for item in _survey_items(tensor)]
    codes = request.statistics == "all"
    return [owner for owner, _ in found], [replace(item, codes=item.gram and codes) for _, item in found]


def _blocks_of(family: Family, blocks: str) -> tuple[Block, ...]:
    return partition_pairs([t.name for t in family.tensors if t.tensor_class is TensorClass.MERGEABLE], blocks)
