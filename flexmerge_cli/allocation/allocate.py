"""Chooses the allocation of a request on a plan, and lays it out. Reads no weights."""

import numpy as np

from flexmerge_cli.allocation.allocation import Allocation, copies
from flexmerge_cli.allocation.auto_allocation import MAX_DISTANCE, AutoFound, AutoSearch, auto
from flexmerge_cli.allocation.block_measure import block_measure
from flexmerge_cli.allocation.clusters import cluster_channels
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.servable import ServableAllocation, servable
from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.calibration import CalibrationData
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.duplicates import near_duplicate_warning
from flexmerge_cli.methods.linear import require_known, require_weight
from flexmerge_cli.methods.registry import all_methods
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.order.similarity import Similarity, similarity
from flexmerge_cli.request.choices import Auto, Clusters, Cut, Exact, Servable
from flexmerge_cli.request.merge import MergeRequest, typed

# The part of --max-distance that `auto` aims at when no size is given: the measured distance may exceed the predicted
# one.
PREDICTED_PART = 0.95


def allocate(plan: Plan, request: MergeRequest, pricer: Pricer | None = None) -> BundleLayout:
    """Choose what the bundle stores, and price it to the byte.

    Raises UsageError for a request that does not fit the plan, DataError for coefficients of other models, and
    GateError for a size that cannot be reached.
    """
    layout = _chosen(plan, request, (pricer or Pricer(plan)).asked(request))
    _require_weights(layout)
    _require_same_groups(layout, request)
    return layout


def _chosen(plan: Plan, request: MergeRequest, pricer: Pricer) -> BundleLayout:
    plan.check_request(request)
    tasks = {task.name: task.fingerprint for task in plan.tasks}
    for use in request.uses:
        if (call := _weighing(use)) is not None:
            require_known(call, base=plan.base.fingerprint, tasks=tasks, blocks=[block.name for block in plan.blocks])
    match request.choice:
        case Exact():
            return pricer.layout(copies(plan, request.dtype))
        case Auto():
            found = auto_found(pricer, request)
            assert found is not None
            return found[1].layout
        case Servable():
            served = servable_found(pricer, request)
            assert served is not None
            return served.layout
        case Clusters() as choice:
            choice.size.target(num_tasks=len(plan.tasks), one_model_bytes=plan.one_model_bytes)
            count = int(choice.size.value)
            return pricer.layout(cluster_channels(plan, count, choice.use, seed=choice.seed, dtype=request.dtype))
        case Cut() as choice:
            return pricer.layout(_cut(pricer, choice, request.dtype))


def _weighing(use: MethodUse) -> Call | None:
    """Return the call of `weighted_average` that makes a method's values; None for other methods."""
    return use.maker if "weighted_average" in use.text else None


def _require_weights(layout: BundleLayout) -> None:
    """Raise UsageError for a group whose weights have no sum to divide by."""
    plan, calls = layout.plan, [_weighing(use) for use in layout.allocation.methods]
    if not any(calls):
        return
    block_of = {name: block.name for block in plan.blocks for name in block.tensors}
    for unit in layout.allocation.units:
        for group in unit.groups:
            if group.method is not None and (call := calls[group.method]) is not None:
                require_weight(call, block_of[unit.tensors[0]], [plan.task_names[task] for task in group.tasks])


def _require_same_groups(layout: BundleLayout, request: MergeRequest) -> None:
    """Raise UsageError for a calibration that was measured through a merge with other groups."""
    data = layout.calibration
    through = data.index.settings.through if isinstance(data, CalibrationData) else None
    if through is not None and isinstance(data, CalibrationData) and through.groups != layout.allocation.digest():
        raise UsageError(
            f"{data.path} was measured through a merge by `{through.request}`, and `{typed(request)}` has other groups "
            "or another method",
            hint=f"merge with {through.request}, or calibrate --through anew",
        )


def auto_found(pricer: Pricer, request: MergeRequest) -> tuple[AutoSearch, AutoFound] | None:
    """Return the search of `auto`, which each pricer makes once, and what it finds; None for any other choice.

    If no size is given, it finds the smallest bundle whose predicted distances stay under the request's limit, or
    MAX_DISTANCE.
    """
    choice = request.choice
    if not isinstance(choice, Auto):
        return None
    search = auto(
        pricer.asked(request),
        choice.limits,
        request.dtype,
        tuple((item.pattern, item.use) for item in choice.block_methods),
    )
    if choice.size is not None:
        return search, search.cut(pricer.plan.target(choice.size))
    limit = MAX_DISTANCE if request.max_distance is None else request.max_distance * PREDICTED_PART
    return search, search.within(limit)


def servable_found(pricer: Pricer, request: MergeRequest) -> ServableAllocation | None:
    """Return what `--servable` chooses; None for any other choice."""
    choice = request.choice
    if not isinstance(choice, Servable):
        return None
    size = None if choice.size is None else pricer.plan.target(choice.size)
    return servable(pricer.asked(request), choice.rank, size, request.dtype)


def offers(plan: Plan, dtype: str | None) -> str:
    """List every method, one per line, with the smallest size that it reaches."""
    pricer, lines = Pricer(plan).asked(MergeRequest()), []
    for name in all_methods():
        layout = pricer.layout(Cutter(pricer, parse_use(name), dtype).smallest())
        factor = layout.tensor_bytes / max(1, plan.one_model_bytes)
        lines.append(f"  {name:18} down to {factor:.2f}x, {layout.total_bytes:,} bytes on disk")
    return "\n".join(lines)


def advice(plan: Plan, layout: BundleLayout, pricer: Pricer | None = None) -> list[str]:
    """Warn of near-identical tasks, and of an exact or cast bundle that is no larger than the chosen lossy one."""
    if not layout.allocation.methods:
        return []
    found = near_duplicates(plan, layout)
    if layout.allocation.dtype is not None:
        return found
    pricer = (pricer or Pricer(plan)).asked(MergeRequest())
    for dtype, what, command in ((None, "exact deduplication", ""), ("BF16", "a cast to bf16", " --dtype bf16")):
        other = pricer.layout(copies(plan, dtype))
        if other.total_bytes <= layout.total_bytes:
            found.append(
                f"{what} takes {other.total_bytes:,} bytes, no more than this bundle with {layout.total_bytes:,}, and "
                f"merges nothing: flexmerge merge PLAN{command} -o BUNDLE"
            )
            break
    return found


def near_duplicates(plan: Plan, layout: BundleLayout) -> list[str]:
    """Return one warning per method about groups of near-identical tasks that a sum multiplies, or whose masks stay
    empty."""
    texts_of: dict[int, list[str]] = {}
    for unit in layout.allocation.units:
        groups = [group for group in unit.groups if group.method is not None]
        if not groups:
            continue
        cosines = similarity(block_measure(unit.name, [plan.tensor(name) for name in unit.tensors]), Similarity.COSINE)
        for group in groups:
            assert group.method is not None
            smallest = float(cosines[np.ix_(group.tasks, group.tasks)].min())
            names = [plan.tasks[task].name for task in group.tasks]
            text = near_duplicate_warning(layout.calls[group.method], names, smallest)
            if text:
                texts_of.setdefault(group.method, []).append(f"{text} (in {unit.name})")
    return [texts[0] + (f", and {len(texts) - 1} more groups" if len(texts) > 1 else "") for texts in texts_of.values()]


def _cut(pricer: Pricer, choice: Cut, dtype: str | None) -> Allocation:
    cutter = Cutter(pricer, choice.use, dtype, block_methods=choice.block_methods)
    if choice.merges is not None:
        return cutter.prefix(choice.merges)
    return cutter.smallest() if choice.size is None else cutter.cut(pricer.plan.target(choice.size), choice.fit)
