"""Prices a unit's tensors in bytes while groups come and go, without making their parts. Pure.

A cut asks for thousands of prices, each one merge away from the one before: two groups go, and one comes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

from flexmerge_cli.allocation.allocation import Group
from flexmerge_cli.allocation.storage import (
    GroupPrice,
    base_array,
    copy_bytes,
    copy_is_base,
    effective_dtype,
    group_price,
)
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coded import declare, has_gate


class GroupPrices:
    """What single groups store under the methods of an allocation. Tensors that are alike share one answer."""

    def __init__(self, calls: Sequence[Call], cast: str | None) -> None:
        self.calls, self.cast = calls, cast
        self._likes: dict[tuple[object, ...], dict[Group, GroupPrice]] = {}
        self._has_mixture = any((coded := declare(call)) is not None and coded.top is not None for call in calls)

    def known(self, tensor: PlanTensor) -> dict[Group, GroupPrice]:
        """Return the prices so far of tensors like this one; `of` adds to them."""
        gated = self._has_mixture and has_gate(tensor.name, tensor.shape)
        like = (tensor.shape, tensor.dtype, tensor.dtypes, tensor.base_dtype, tensor.same, gated)
        return self._likes.setdefault(like, {})

    def of(self, tensor: PlanTensor, group: Group, known: dict[Group, GroupPrice]) -> GroupPrice:
        found = known.get(group)
        if found is None:
            found = known[group] = group_price(tensor, group, self.calls, self.cast)
        return found


class UnitPrice:
    """The bytes of one unit, as its groups change."""

    def __init__(self, plan: Plan, tensors: Iterable[str], prices: GroupPrices, groups: Iterable[Group] = ()) -> None:
        self._tensors = [_TensorPrice(plan, plan.tensor(name), prices) for name in tensors]
        self.num_bytes = sum(price.base_bytes() for price in self._tensors)
        for group in groups:
            self.put(group)

    def put(self, group: Group) -> None:
        self._change(group, 1)

    def take(self, group: Group) -> None:
        """Take out a group that was put in."""
        self._change(group, -1)

    def _change(self, group: Group, sign: int) -> None:
        of_unit = 0
        for price in self._tensors:
            change, once = price.change(group, sign)
            self.num_bytes += change
            of_unit = max(of_unit, once)  # the same in all tensors that have it
        self.num_bytes += sign * of_unit


class _TensorPrice:
    """The bytes of one tensor: distinct copies are stored once, and so is the base if a group or a kept adapter reads
    it and no copy equals it."""

    def __init__(self, plan: Plan, tensor: PlanTensor, prices: GroupPrices) -> None:
        self.tensor, self.prices, self.known = tensor, prices, prices.known(tensor)
        self.copies: Counter[int] = Counter()
        """The number of groups that hold a copy, by the first task with its bits."""
        self.readers = 0
        """The number of groups that read the base."""
        self.base = base_array(tensor, prices.cast)
        self.kept_bytes, self.base_is_whole = 0, False
        self.holders: tuple[int, ...] = ()
        if plan.base_readers(tensor) and tensor.base_form is not None:
            dtype, shape = tensor.base_form
            self.kept_bytes = prod(shape) * ITEM_BYTES[dtype]
            self.base_is_whole = (self.base.dtype, self.base.shape) == tensor.base_form
            self.holders = tuple({tensor.same[task] for task in plan.all_tasks if self._holds_base(task)})

    def _holds_base(self, task: int) -> bool:
        """Return whether a copy of the task's tensor has the base's own bits."""
        dtype = effective_dtype(self.tensor.dtype_of(task), self.prices.cast)
        return copy_is_base(self.tensor, task) and (dtype, self.tensor.shape_of(task)) == self.tensor.base_form

    def base_bytes(self) -> int:
        own = self.base.num_bytes if self.readers else 0
        has_base = (self.readers and self.base_is_whole) or any(
            self.copies[representative] for representative in self.holders
        )
        return own + (0 if has_base else self.kept_bytes)

    def change(self, group: Group, sign: int) -> tuple[int, int]:
        """Return how a group that comes (1) or goes (-1) changes the bytes, and what the group stores once per unit."""
        before, price = self.base_bytes(), self.prices.of(self.tensor, group, self.known)
        change = sign * price.num_bytes
        self.readers += sign * price.base
        for representative in price.copied:
            count = self.copies[representative]
            self.copies[representative] = count + sign
            if 0 in (count, count + sign):
                change += sign * copy_bytes(self.tensor, representative, self.prices.cast)
        return change + self.base_bytes() - before, price.unit_bytes
