"""Cuts the merge order for a method and a size into an allocation. Pure: every price comes from the layout.

A cut is the shortest prefix of the order that fits. With `tight`, merges are then undone where the layout still fits:
blocks are coarse, and a prefix can jump far below the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flexmerge_cli.allocation.allocation import Allocation, Group, Tasks, from_groups
from flexmerge_cli.allocation.block_methods import uses_of_blocks
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.prices import UnitPrice
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.order.order import Merge, groups_after
from flexmerge_cli.request.choices import BlockMethod, Fit
from flexmerge_cli.request.size import Target

# One undo shrinks headers and manifest by far less than this. The exact amount takes a layout, which this bound saves.
OVERHEAD_SLACK_BYTES = 1 << 20


@dataclass(slots=True)
class _State:
    """The groups of each block, and their prices."""

    groups: list[list[Tasks]]
    prices: list[UnitPrice]
    tensor_bytes: int


class Cutter:
    """Cuts of one plan for one method, or for several by block."""

    def __init__(
        self,
        pricer: Pricer,
        method: MethodUse,
        dtype: str | None = None,
        *,
        block_methods: Sequence[BlockMethod] = (),
    ) -> None:
        """Prepare the cuts. block_methods: the methods of some blocks. Raises UsageError for a pattern that no block
        matches."""
        self.pricer, self.dtype, self.plan = pricer, dtype, pricer.plan
        use_of = uses_of_blocks(self.plan, block_methods, method)
        self.methods = tuple(dict.fromkeys(use for use in (method, *use_of) if use is not None))
        self.method_of = [None if use is None else self.methods.index(use) for use in use_of]
        self.order = tuple(merge for merge in self.plan.merges() if self.method_of[merge.block] is not None)

    def state(self) -> _State:
        """Return the state in which no tasks are merged."""
        groups: list[list[Tasks]] = [[(task,) for task in self.plan.all_tasks] for _ in self.plan.blocks]
        prices = [
            self.pricer.price(
                block.tensors, self.methods, self.dtype, [self._group(number, group) for group in of_block]
            )
            for number, (block, of_block) in enumerate(zip(self.plan.blocks, groups))
        ]
        whole = self.pricer.whole_bytes(self.dtype)
        return _State(groups, prices, whole + sum(price.num_bytes for price in prices))

    def sizes(self) -> list[int]:
        """Return the tensor bytes after 0, 1, … all merges."""
        return self._sizes

    @cached_property
    def _sizes(self) -> list[int]:
        state = self.state()
        sizes = [state.tensor_bytes]
        for merge in self.order:
            self._apply(state, merge.block, _joined(state.groups[merge.block], merge))
            sizes.append(state.tensor_bytes)
        return sizes

    def smallest(self) -> Allocation:
        """Return the smallest allocation on the order, with the fewest merges among equals."""
        sizes = self.sizes()
        return self.prefix(sizes.index(min(sizes)))

    def prefix(self, num_merges: int, fit: str = "prefix") -> Allocation:
        if not 0 <= num_merges <= len(self.order):
            raise UsageError(
                f"--merges {num_merges} is outside 0 to {len(self.order)}", hint="choose a number in this range"
            )
        groups = groups_after(len(self.plan.blocks), len(self.plan.tasks), self.order[:num_merges])
        return from_groups(
            self.plan,
            groups,
            methods=self.methods,
            method_of=self.method_of,
            dtype=self.dtype,
            merges=num_merges,
            fit=str(fit),
        )

    def cut(self, size: Target, fit: Fit = Fit.TIGHT) -> Allocation:
        """Return the allocation for a target. Raises GateError with the smallest size if nothing fits."""
        if size.all_merges and not any(use.stores_per_task for use in self.methods):
            return self.prefix(len(self.order), fit)
        sizes, state = self.sizes(), self.state()
        applied = 0
        while not (sizes[applied] <= size.max_bytes and self._fits(state, size, applied, 0, fit)):
            if applied == len(self.order):
                self._refuse(size, sizes, fit)
            merge = self.order[applied]
            self._apply(state, merge.block, _joined(state.groups[merge.block], merge))
            applied += 1
        kept = list(self.order[:applied])
        if fit is Fit.TIGHT:
            kept = self._undo(state, kept, size)
        return self._allocation(state, len(kept), applied - len(kept), fit)

    def _undo(self, state: _State, kept: list[Merge], size: Target) -> list[Merge]:
        """Pass from the latest merge to the earliest and undo those that fit, until none can be undone."""
        applied = len(kept)
        overhead = self._total(state, applied, 0, Fit.TIGHT) - state.tensor_bytes if size.on_disk else 0
        again = True
        while again:
            again = False
            for merge in reversed(kept.copy()):
                result = tuple(sorted(merge.left + merge.right))
                before = state.groups[merge.block]
                if result not in before:
                    continue  # a kept merge joins it further
                after = sorted([group for group in before if group != result] + [merge.left, merge.right])
                self._apply(state, merge.block, after)
                hopeless = state.tensor_bytes + max(0, overhead - OVERHEAD_SLACK_BYTES) > size.max_bytes
                remaining = len(kept) - 1
                if not hopeless and self._fits(state, size, remaining, applied - remaining, Fit.TIGHT):
                    kept.remove(merge)
                    again = True
                else:
                    self._apply(state, merge.block, before)
        return kept

    def _fits(self, state: _State, size: Target, merges: int, undone: int, fit: Fit) -> bool:
        total = self._total(state, merges, undone, fit) if size.on_disk else state.tensor_bytes
        return total <= size.max_bytes

    def _total(self, state: _State, merges: int, undone: int, fit: Fit) -> int:
        return self.pricer.layout(self._allocation(state, merges, undone, fit)).total_bytes

    def _refuse(self, size: Target, sizes: Sequence[int], fit: Fit) -> None:
        smallest = self.prefix(sizes.index(min(sizes)), fit)
        layout = self.pricer.layout(smallest)
        factor = layout.tensor_bytes / max(1, self.plan.one_model_bytes)
        cast = self.dtype is None and self.pricer.cast_saves
        raise GateError(
            f"`{self.methods[0].text}` does not reach {size.text}: its smallest is {factor:.4f}x, "
            f"{layout.total_bytes}B on disk",
            hint=f"--size {-(-layout.tensor_bytes * 10000 // max(1, self.plan.one_model_bytes)) / 10000:g}x, "
            + ("another method, or --dtype bf16" if cast else "or another method"),
        )

    def _group(self, block: int, tasks: Tasks) -> Group:
        return Group(tasks=tasks, method=self.method_of[block] if len(tasks) > 1 else None)

    def _apply(self, state: _State, block: int, groups: list[Tasks]) -> None:
        price = state.prices[block]
        before = price.num_bytes
        for gone in set(state.groups[block]).difference(groups):
            price.take(self._group(block, gone))
        for new in set(groups).difference(state.groups[block]):
            price.put(self._group(block, new))
        state.tensor_bytes += price.num_bytes - before
        state.groups[block] = groups

    def _allocation(self, state: _State, merges: int, undone: int, fit: str) -> Allocation:
        return from_groups(
            self.plan,
            state.groups,
            methods=self.methods,
            method_of=self.method_of,
            dtype=self.dtype,
            merges=merges,
            undone=undone,
            fit=str(fit),
        )


def _joined(groups: list[Tasks], merge: Merge) -> list[Tasks]:
    rest = [group for group in groups if group not in (merge.left, merge.right)]
    return sorted([*rest, tuple(sorted(merge.left + merge.right))])
