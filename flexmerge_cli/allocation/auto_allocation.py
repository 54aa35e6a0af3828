"""Turns a plan and a size into an allocation for `--method auto`, by the search of auto.py. Pure; reads no weights.

The search covers every mergeable tensor, one unit each, except those of blocks that `--method-for` names. Those are
stored by their method with all tasks in one group or, with `keep`, as copies, and their bytes are subtracted first.
"""

import copy
import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from flexmerge_cli.allocation.allocation import Allocation, Group, Tasks, Unit
from flexmerge_cli.allocation.auto import Search, Solution, search
from flexmerge_cli.allocation.auto_centres import CentreBits
from flexmerge_cli.allocation.auto_merged import merged
from flexmerge_cli.allocation.auto_statistics import TensorStatistics, partitions
from flexmerge_cli.allocation.auto_table import TensorChoice
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.storage import copy_is_base, effective_dtype
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.formats.plan_records import PlanBlock, PlanTensor
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.request.auto_options import Kind, Limits
from flexmerge_cli.request.size import Target
from flexmerge_cli.residuals.scales import Scales
from flexmerge_cli.stored.form import Bits

# About two bits per weight: the default for a first user, who need not know a number.
MAX_DISTANCE = 0.35

ByPattern = tuple[tuple[str, MethodUse | None], ...]
"""Pairs of a pattern of block names and its method, or None for copies. The first match counts."""

Kept = tuple[MethodUse | None] | None
"""What stores a block that is not searched: its method, or None for copies. None itself: the block is searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoFound:
    """What the search chose, and the layout that stores it."""

    solution: Solution
    layout: BundleLayout


class AutoSearch:
    """Searches of one plan: any number of sizes from one set of tables."""

    def __init__(self, pricer: Pricer, limits: Limits, dtype: str | None = None, by_pattern: ByPattern = ()) -> None:
        """Make the tables. Raises UsageError if the plan lacks the statistics, or for a pattern that no block
        matches."""
        plan = pricer.plan
        if plan.settings.statistics != "all" and plan.blocks:
            raise UsageError(
                "`auto` needs to know how well tensors can be coded, which this plan did not measure",
                hint="flexmerge plan plan.json --statistics all -o with-statistics.json",
            )
        self.pricer, self.plan, self.dtype = pricer, plan, dtype
        self.scales = limits.scales
        self._may_merge = limits.allows(0) and "average" in limits.centres and not by_pattern
        self._calibration = pricer.calibrated
        self._groups_of = functools.cache(self._groups)
        self._disk_bytes = functools.cache(lambda solution: self._found(solution).layout.total_bytes)
        self._kept = {block.name: self._unit_by_pattern(block, by_pattern) for block in plan.blocks}
        self.searched = [block for block in plan.blocks if self._kept[block.name] is None]
        self.search = self._search(limits)
        self._averages: Cutter | None = None
        self._exact: AutoFound | None = None
        self._smallest_on_disk: AutoFound | None = None
        self.fixed_bytes = pricer.tensor_bytes(self._allocation(())) + self._base_bytes()
        """Bytes of everything that the search does not decide."""

    def priced_by(self, pricer: Pricer) -> "AutoSearch":
        """Return the same search for bundles that record another request."""
        other = copy.copy(self)
        other.pricer, other._averages, other._exact, other._smallest_on_disk = pricer, None, None, None
        other._disk_bytes = functools.cache(lambda solution: other._found(solution).layout.total_bytes)
        return other

    def cut(self, size: Target) -> AutoFound:
        """Find the least predicted damage within a size, which is never exceeded: never more than that of merging by
        `average`. Raises GateError with the smallest possible size."""
        exact = self.exact()
        if (exact.layout.total_bytes if size.on_disk else exact.layout.tensor_bytes) <= size.max_bytes:
            return exact
        return self._or_merged(self._searched(size), size)

    def _searched(self, size: Target) -> AutoFound:
        if size.on_disk:
            smallest = (least() for least in (self.smallest, self.smallest_on_disk))
            fitting = next((found for found in smallest if found.layout.total_bytes <= size.max_bytes), None)
            if fitting is None:
                self._refuse(size)
            return self._found(self.search.solve_priced(size.max_bytes, self._disk_bytes, fitting.solution))
        budget = self._budget(size.max_bytes)
        if budget < self.search.smallest_bytes:
            self._refuse(size)
        return self._found(self.search.solve(budget))

    def _or_merged(self, found: AutoFound, size: Target) -> AutoFound:
        """Return what merging by `average` stores in a size instead, if that is predicted to be better and allowed."""
        if not self._may_merge:
            return found
        if self._averages is None:
            self._averages = Cutter(self.pricer, parse_use("average"), self.dtype)
        if (other := merged(self._averages, self.search, size)) is None:
            return found
        solution, layout = other
        return AutoFound(solution=solution, layout=layout) if solution.cost < found.solution.cost else found

    def smallest(self) -> AutoFound:
        return self._found(self.search.solve(self.search.smallest_bytes))

    def smallest_on_disk(self) -> AutoFound:
        """Return the smallest bundle with headers and names counted, which may hold more data than `smallest`."""
        if self._smallest_on_disk is None:
            self._smallest_on_disk = self._found(self.search.smallest_priced(self._disk_bytes))
        return self._smallest_on_disk

    def within(self, max_distance: float) -> AutoFound:
        """Return the smallest bundle whose predicted distances stay under a limit, among those that are best for some
        price of a byte."""
        found, exact = self._found(self.search.solve_distance(max_distance)), self.exact()
        if found.layout.total_bytes >= exact.layout.total_bytes:
            return exact
        size = Target(text="", max_bytes=found.layout.total_bytes, on_disk=True, all_merges=False)
        other = self._or_merged(found, size)
        return other if (self.search.distances(other.solution) <= max_distance).all() else found

    def exact(self) -> AutoFound:
        """Return a bundle that loses nothing of the searched blocks: copies, or the search's own choices if these are
        smaller."""
        if self._exact is None:
            solution = self.search.solve(self._most_bytes)
            kept: dict[str, Kept] = {name: use or (None,) for name, use in self._kept.items()}
            copied = AutoFound(solution=solution, layout=self.pricer.layout(self._allocation((), kept)))
            chosen = self._found(solution)
            self._exact = copied if copied.layout.total_bytes <= chosen.layout.total_bytes else chosen
        return self._exact

    @property
    def _most_bytes(self) -> int:
        return sum(int(table.num_bytes[-1]) for table in self.search.tables)

    def _budget(self, max_bytes: float) -> int:
        """Return how many of these bytes of tensor data are left for the tensors of the search."""
        most = self._most_bytes
        return min(most, math.floor(max_bytes) - self.fixed_bytes) if math.isfinite(max_bytes) else most

    def _base_bytes(self) -> int:
        """Return the bytes that kept adapters need of the base in the blocks of the search."""
        tensors = [self.plan.tensor(name) for block in self.searched for name in block.tensors]
        forms = [tensor.base_form for tensor in tensors if self.plan.base_readers(tensor)]
        return sum(math.prod(form[1]) * ITEM_BYTES[form[0]] for form in forms if form is not None)

    def _refuse(self, size: Target) -> NoReturn:
        one = max(1, self.plan.one_model_bytes)
        layouts = [(self.smallest_on_disk() if size.on_disk else self.smallest()).layout, self.exact().layout]
        layout = min(layouts, key=lambda layout: layout.total_bytes if size.on_disk else layout.tensor_bytes)
        raise GateError(
            f"`auto` does not reach {size.text}: its smallest is {layout.tensor_bytes / one:.4f}x, "
            f"{layout.total_bytes}B on disk",
            hint=f"--size {smallest_factor(layout):g}x"
            + (", or --dtype bf16" if self.dtype is None and self.pricer.cast_saves else ""),
        )

    def _found(self, solution: Solution) -> AutoFound:
        return AutoFound(solution=solution, layout=self.pricer.layout(self._allocation(solution.choices)))

    def _search(self, limits: Limits) -> Search:
        merges: dict[str, list[tuple[Tasks, Tasks]]] = {}
        for merge in self.plan.order:
            merges.setdefault(merge.block, []).append((merge.left, merge.right))
        count = len(self.plan.tasks)
        return search(
            [
                self._statistics(self.plan.tensor(name))
                for block in self.searched
                for name in block.tensors
                if self.plan.tensor(name).num_elements
            ],
            {name: block.name for block in self.searched for name in block.tensors},
            {block.name: partitions(count, merges.get(block.name, [])) for block in self.searched},
            limits,
        )

    def _statistics(self, tensor: PlanTensor) -> TensorStatistics:
        errors, dtype = tensor.coding_error, effective_dtype(str(tensor.base_dtype), self.dtype)
        assert errors is not None
        is_stored = bool(self.plan.base_readers(tensor)) and tensor.base_form == (dtype, tensor.shape)
        return TensorStatistics(
            name=tensor.name,
            shape=tensor.shape,
            base_dtype=dtype,
            dtypes=tuple(effective_dtype(tensor.dtype_of(task), self.dtype) for task in tensor.present),
            gram=self.plan.gram(tensor),
            same=tensor.same,
            is_base=tensor.is_base,
            errors=errors,
            base_is_stored=is_stored,
            copy_is_stored=tuple(is_stored and copy_is_base(tensor, task) for task in tensor.present),
            importance=self._calibration.importance(tensor.name) if self._calibration is not None else None,
        )

    def _unit_by_pattern(self, block: PlanBlock, by_pattern: ByPattern) -> tuple[MethodUse | None] | None:
        for pattern, _ in by_pattern:
            if not any(fnmatch.fnmatchcase(other.name, pattern) for other in self.plan.blocks):
                some = ", ".join(other.name for other in self.plan.blocks[:3])
                raise UsageError(f"no block matches `{pattern}`", hint=f"blocks are {some}, …")
        found = [use for pattern, use in by_pattern if fnmatch.fnmatchcase(block.name, pattern)]
        return (found[0],) if found else None

    def _allocation(self, choices: Sequence[TensorChoice], by_pattern: Mapping[str, Kept] | None = None) -> Allocation:
        """Build the allocation from the choices for all searched tensors. Without choices, it leaves these tensors out,
        to price the rest."""
        plan, of_tensor = self.plan, {choice.tensor: choice for choice in choices}
        by_pattern = self._kept if by_pattern is None else by_pattern
        uses = dict.fromkeys(kept[0] for kept in by_pattern.values() if kept is not None and kept[0] is not None)
        uses |= dict.fromkeys(use for choice in choices for use, _, _ in self._groups_of(choice) if use is not None)
        methods = {use: index for index, use in enumerate(uses)}
        everyone = plan.all_tasks
        units = []
        for block in plan.blocks:
            kept = by_pattern[block.name]
            if kept is not None:
                apart = [((task,), None) for task in everyone]
                groups = apart if kept[0] is None else [(everyone, methods[kept[0]] if len(everyone) > 1 else None)]
                found = tuple(Group(tasks=tasks, method=method) for tasks, method in groups)
                units.append(Unit(name=block.name, tensors=block.tensors, groups=found))
            for name in block.tensors if kept is None and choices else ():
                if name in of_tensor:
                    found = tuple(
                        Group(tasks=tasks, method=None if use is None else methods[use], bits=bits)
                        for use, tasks, bits in self._groups_of(of_tensor[name])
                    )
                else:  # without an element
                    found = tuple(Group(tasks=(task,), method=None) for task in everyone)
                units.append(Unit(name=name, tensors=(name,), groups=found))
        return Allocation(methods=tuple(uses), units=tuple(units), dtype=self.dtype)

    def _groups(self, choice: TensorChoice) -> list[tuple[MethodUse | None, Tasks, tuple[Bits, ...] | None]]:
        """Return (method, tasks, bits) by smallest task. Tasks of a class are together; a class alone has no centre."""
        same = self.plan.tensor(choice.tensor).same
        members: dict[int, list[int]] = {}
        for task, first in enumerate(same):
            members.setdefault(first, []).append(task)
        everyone = tuple(range(len(same)))
        found: list[tuple[Kind, Tasks]] = []
        for group in {"none": (), "base": (everyone,), "average": choice.centre.groups}[choice.centre.kind]:
            shares = choice.centre.kind == "base" or len({same[task] for task in group}) > 1
            found.append((choice.centre.kind if shares else "none", group))
        if choice.centre.kind == "none":
            found += [("none", tuple(tasks)) for tasks in members.values()]
        groups: list[tuple[MethodUse | None, Tasks, tuple[Bits, ...] | None]] = []
        for kind, tasks in found:
            bits = tuple(choice.bits[task] for task in tasks)
            if set(bits) == {"exact"}:
                groups += [(None, tuple(members[first]), None) for first in dict.fromkeys(same[task] for task in tasks)]
            else:
                groups.append((_use(kind, choice.centre.bits, self.scales), tasks, bits))
        return sorted(groups, key=lambda group: group[1])


def auto(pricer: Pricer, limits: Limits, dtype: str | None = None, by_pattern: ByPattern = ()) -> AutoSearch:
    """Return the search, which each pricer makes once, because its tables take longer than any size asked of them."""
    key = (limits, dtype, by_pattern, pricer.calibrated is not None)
    if key not in pricer.searches:
        pricer.searches[key] = AutoSearch(pricer, limits, dtype, by_pattern)
    found = pricer.searches[key]
    assert isinstance(found, AutoSearch)
    return found if found.pricer.request == pricer.request else found.priced_by(pricer)


def smallest_factor(layout: BundleLayout) -> float:
    """Return a factor to four decimals that the layout fits."""
    return -(-layout.tensor_bytes * 10000 // max(1, layout.plan.one_model_bytes)) / 10000


@functools.cache
def _use(kind: Kind, centre_bits: CentreBits, scales: Scales) -> MethodUse:
    """Return the method of a group. The group's own `bits` decide; those of the text have no effect."""
    if kind == "none":
        return parse_use("low_bit:centre=none,scales=bfloat16,clip=search")
    return parse_use(f"low_bit:centre={kind},centre_bits={centre_bits},scales={scales},clip=search")
