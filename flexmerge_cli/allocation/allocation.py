"""Says what a bundle stores, but not how that was decided: unit -> groups -> method.

A unit is a block, or one tensor of it. An allocation is canonical, hashable and can be written as JSON. The layout, the
engine and the manifest read it; a cut of the order makes one, and so do clustering, a pattern in the recipe, and a
search.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.stored.form import Bits

Tasks = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tasks that share one stored value of a unit."""

    tasks: Tasks
    """Task numbers in ascending order."""
    method: int | None
    """Index into the allocation's methods; None for a group of one, which is copied."""
    bits: tuple[Bits, ...] | None = None
    """The bits of each task, if the method is `low_bit` and they differ between tasks, as those of `auto` do. They
    replace the method's own, and the tensor is coded as docs/methods.md describes for `auto`. None: the method
    decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Tensors that are stored alike."""

    name: str
    tensors: tuple[str, ...]
    groups: tuple[Group, ...]
    """A partition of the tasks, ordered by smallest task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Everything that decides what a bundle stores."""

    methods: tuple[MethodUse, ...]
    units: tuple[Unit, ...]
    dtype: str | None = None
    """The dtype that floating tensors are cast to; None keeps their own."""
    merges: int = 0
    undone: int = 0
    fit: str = "none"
    """How the cut was fitted. It is recorded in the manifest and has no effect."""

    def digest(self) -> str:
        """Return the SHA-256 of what decides the stored values: methods, groups and cast."""
        methods = [
            [use.text, [step.text for step in use.steps], use.calibrate and use.calibrate.text] for use in self.methods
        ]
        units = [
            [unit.name, unit.tensors, [[group.tasks, group.method, group.bits] for group in unit.groups]]
            for unit in self.units
        ]
        return hashlib.sha256(json.dumps([methods, units, self.dtype]).encode()).hexdigest()


def copies(plan: Plan, dtype: str | None = None) -> Allocation:
    """Return an allocation that merges nothing: exact deduplication, or that with a cast."""
    return from_groups(plan, [[(task,) for task in plan.all_tasks]] * len(plan.blocks), methods=(), dtype=dtype)


def from_groups(
    plan: Plan,
    groups: list[list[Tasks]],
    *,
    methods: tuple[MethodUse, ...],
    method_of: Sequence[int | None] | None = None,
    dtype: str | None = None,
    merges: int = 0,
    undone: int = 0,
    fit: str = "none",
) -> Allocation:
    """Make an allocation from the groups of each block of the plan. method_of: the index of each block's method; by
    default the first for all."""
    units = tuple(
        Unit(
            name=block.name,
            tensors=block.tensors,
            groups=tuple(
                Group(tasks=group, method=(method_of[index] if method_of else 0) if len(group) > 1 else None)
                for group in of_block
            ),
        )
        for index, (block, of_block) in enumerate(zip(plan.blocks, groups, strict=True))
    )
    return Allocation(methods=methods, units=units, dtype=dtype, merges=merges, undone=undone, fit=fit)
