"""Allocates what an engine can serve that holds one base and a LoRA adapter per task (`merge --servable`). Pure; reads
no weights.

Every tensor has one value that all tasks share: the base's own, or the average of all tasks. Beside it, a matrix has
residuals of low rank, which `export --as-lora` writes as adapters. Of both centres, each tensor has the one whose
residuals are predicted to lose less. A residual of rank r keeps at least r/min(m, n) of its energy, and all of it where
the plan found the task to be its base plus matrices of no greater rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.allocation import Allocation, Group, Unit
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.storage import effective_dtype
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, promote
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.request.size import Target

# M tasks

UNKNOWN_RANK = 1 << 30
TABLES = ("wte", "wpe", "shared", "emb")
"""Modules whose weight is a table, besides those with `embed` or `bias` in their names."""
HINT = "leave out --servable: `merge --method auto` stores any family"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServableAllocation:
    """What an engine would serve, and the bundle that stores it."""

    layout: BundleLayout
    rank: int
    """The largest rank of an adapter's matrices, kept adapters included; 0 if the tasks are merged into one model."""
    base_bytes: int
    """The bytes of the tensors of the base that the engine holds."""
    adapter_bytes: int
    """The bytes of the factors of one task, or of the largest kept adapter if these are more."""
    captured_M: np.ndarray
    """The least part of each task vector's energy that is predicted to be kept, in [0, 1] unless the average is farther
    from a task than the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """How one tensor is stored."""

    use: MethodUse | None
    """None: all tasks have the same bits, and the group is a copy."""
    lost_M: np.ndarray
    """The predicted squared error of each task."""
    centre_bytes: int
    """The bytes of the value that all tasks share."""
    rank: int = 0
    factor_bytes: int = 0
    """The bytes of one task's factors."""


def servable(pricer: Pricer, rank: int, size: Target | None, dtype: str | None = None) -> ServableAllocation:
    """Choose for the largest rank up to `rank` that fits the size.

    Raises UsageError, naming the first tensor, for a family that no such engine can serve, or for a kept adapter of a
    larger rank, and GateError if even one merged model exceeds the size.
    """
    plan = pricer.plan
    for tensor, why in _not_servable(plan, dtype):
        raise UsageError(f"`{tensor}` {why}: no engine with one base and adapters can serve it", hint=HINT)
    for member in plan.readers:
        own, _ = member.own_factors
        if own > rank:
            raise UsageError(
                f"task `{member.name}` is kept as an adapter of rank {own}, and --servable allows {rank}",
                hint=f"--servable lora:rank={own}",
            )
    known = [task.low_rank.rank if task.low_rank is not None else UNKNOWN_RANK for task in plan.tasks]
    rank = min(rank, max(known, default=rank))
    found = _of_rank(pricer, known, rank, dtype)
    if size is None or _fits(found, size):
        return found
    least, most = min(rank, 1 if plan.kept else 0), rank - 1  # beside kept adapters nothing can be averaged
    best = _of_rank(pricer, known, least, dtype)
    if not _fits(best, size):
        factor = -(-best.layout.tensor_bytes * 10000 // max(1, plan.one_model_bytes)) / 10000
        raise GateError(
            f"--servable does not reach {size.text}: its smallest is {factor:.4f}x, {best.layout.total_bytes}B on disk",
            hint=f"--size {factor:g}x",
        )
    while least < most:
        middle = (least + most + 1) // 2
        tried = _of_rank(pricer, known, middle, dtype)
        if _fits(tried, size):
            least, best = middle, tried
        else:
            most = middle - 1
    return best


def _fits(found: ServableAllocation, size: Target) -> bool:
    return (found.layout.total_bytes if size.on_disk else found.layout.tensor_bytes) <= size.max_bytes


def _not_servable(plan: Plan, dtype: str | None) -> Iterator[tuple[str, str]]:
    """Yield each tensor that is not one for all tasks, and why."""
    yield from plan.not_low_rank()
    for tensor in plan.stored:
        if tensor.class_ in (TensorClass.TIED, TensorClass.BASE_ONLY):
            continue
        if len(tensor.present) < len(plan.tasks):
            yield tensor.name, "is not in every task"
        forms = {(effective_dtype(tensor.dtype_of(task), dtype), tensor.shape_of(task)) for task in tensor.present}
        if len(forms) > 1 or (tensor.class_ is not TensorClass.MERGEABLE and len(set(tensor.same)) > 1):
            yield tensor.name, "is each task's own"
        has_factors = _is_matrix(tensor) and len(set(tensor.same)) > 1  # what all tasks share is stored whole
        over_base = forms == {tensor.base_form} and (has_factors or all(tensor.is_base))
        if plan.kept and plan.tasks and not over_base:
            yield tensor.name, "is not the base's, over which adapters are kept"


def _is_matrix(tensor: PlanTensor) -> bool:
    """Return whether a LoRA can change a tensor, as far as names and shapes tell: the weight of a linear layer."""
    *modules, last = tensor.name.split(".")
    is_table = any(word in TABLES or "embed" in word or "bias" in word for word in modules)
    return len(tensor.shape) == 2 and min(tensor.shape) > 1 and last == "weight" and not is_table


def _of_rank(pricer: Pricer, known: list[int], rank: int, dtype: str | None) -> ServableAllocation:
    plan = pricer.plan
    everyone, uses = plan.all_tasks, dict[MethodUse, int]()
    units, lost_M, energy_M = [], np.zeros(len(everyone)), np.zeros(len(everyone))
    largest = base_bytes = adapter_bytes = 0
    for tensor in (plan.tensor(name) for block in plan.blocks for name in block.tensors):
        choice = _choice(plan, tensor, known, rank, dtype)
        method = None if choice.use is None else uses.setdefault(choice.use, len(uses))
        groups = (Group(tasks=everyone, method=method),) if everyone else ()
        units.append(Unit(name=tensor.name, tensors=(tensor.name,), groups=groups))
        lost_M += choice.lost_M
        energy_M += _energies(plan.gram(tensor))
        largest, adapter_bytes = max(largest, choice.rank), adapter_bytes + choice.factor_bytes
        base_bytes += choice.centre_bytes
    for own, num_bytes in (member.own_factors for member in plan.readers):
        largest, adapter_bytes = max(largest, own), max(adapter_bytes, num_bytes)
    layout = pricer.layout(Allocation(methods=tuple(uses), units=tuple(units), dtype=dtype))
    apart = {TensorClass.TIED, TensorClass.MERGEABLE} | (set() if plan.kept else {TensorClass.BASE_ONLY})
    base_bytes += sum(_dense_bytes(t, t.dtype, dtype) for t in plan.stored if t.class_ not in apart)
    return ServableAllocation(
        layout=layout,
        rank=largest,
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        captured_M=1 - np.divide(lost_M, energy_M, out=np.zeros_like(lost_M), where=energy_M > 0),
    )


def _choice(plan: Plan, tensor: PlanTensor, known: list[int], rank: int, dtype: str | None) -> _Choice:
    own_bytes = _dense_bytes(tensor, tensor.dtype, dtype)
    if len(set(tensor.same)) < 2 or not tensor.num_elements:
        return _Choice(use=None, lost_M=np.zeros(len(tensor.same)), centre_bytes=own_bytes)
    gram, found = plan.gram(tensor), list[_Choice]()
    of_base_M = _energies(gram)
    of_mean_M = np.maximum(of_base_M - 2 * gram.mean(axis=1) + gram.mean(), 0.0)
    for centre, energy_M in (("base", of_base_M), ("average", of_mean_M)):
        if centre == "average" and plan.kept:
            continue
        own = _rank_of(tensor, rank, centre, dtype) if _is_matrix(tensor) else 0
        if own:
            m, n = tensor.shape
            is_whole_M = np.array(known) <= own if centre == "base" else np.zeros(len(known), bool)
            lost_M = np.where(is_whole_M, 0.0, energy_M * (1 - own / min(m, n)))
            factor_bytes = own * (m + n) * ITEM_BYTES[effective_dtype(tensor.dtype, dtype)]
            use = parse_use(f"low_rank:rank={own},centre={centre}")
            centre_bytes = own_bytes if centre == "average" else _dense_bytes(tensor, str(tensor.base_dtype), dtype)
            choice = _Choice(use=use, lost_M=lost_M, centre_bytes=centre_bytes, rank=own, factor_bytes=factor_bytes)
            found.append(choice)
        elif centre == "average":
            found.append(_Choice(use=parse_use("average"), lost_M=of_mean_M, centre_bytes=own_bytes))
    if not found:
        raise UsageError(f"`{tensor.name}` is too small for factors: no engine can serve it over the base", hint=HINT)
    return min(found, key=lambda choice: float(choice.lost_M.sum()))


def _rank_of(tensor: PlanTensor, rank: int, centre: str, dtype: str | None) -> int:
    """Return the largest rank up to `rank` with which factors take fewer bytes than copies, which could not be
    served."""
    (m, n), dtypes = tensor.shape, [effective_dtype(tensor.dtype_of(task), dtype) for task in tensor.present]
    each = sum(ITEM_BYTES[own] for own in dtypes)
    left = m * n * (each - (ITEM_BYTES[promote(tuple(dtypes))] if centre == "average" else 0))
    return min(rank, m, n, (left - 1) // ((m + n) * each))


def _dense_bytes(tensor: PlanTensor, own_dtype: str, dtype: str | None) -> int:
    return tensor.num_elements * ITEM_BYTES[effective_dtype(own_dtype, dtype)]


def _energies(gram: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.maximum(np.diag(gram), 0.0)
    return found
