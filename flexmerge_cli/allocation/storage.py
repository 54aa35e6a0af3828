"""Decides which arrays hold one tensor of the family, given its groups. Pure; no weights, no files.

Whether a group is stored as copies or by its method depends on its tasks, the shape and the dtype alone: it is copies
where they take no more bytes. Copies with the same bits are one part with more readers, whatever their groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flexmerge_cli.allocation.allocation import Group, Tasks, Unit
from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.stored.dense import COPY
from flexmerge_cli.stored.form import Array, Bits, GroupForm, GroupLayout, GroupTensor
from flexmerge_cli.stored.forms import form_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One stored array and the tasks that need it."""

    name: str
    """The name in its file: the tensor's plain name if dense, otherwise `<tensor>@<role>[.<task>]`."""
    array: Array
    readers: Tasks
    tensor: str
    """The aligned name of the tensor, or the unit's name if `of_unit`."""
    task: int | None
    """The task whose residual it is."""
    of_unit: bool = False
    """Whether it is stored once for all tensors of a unit."""

    @cached_property
    def num_bytes(self) -> int:
        return self.array.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """How the tasks of one group of one tensor are stored."""

    tasks: Tasks
    form: GroupForm
    method: int | None
    """The index of the method; None for exact copies."""
    parts: tuple[Part, ...]
    """The parts that decode it; for copies, one part per distinct tensor."""
    coded_tasks: Tasks
    """All tasks except those stored as exact copies."""
    bits: tuple[Bits, ...] | None = None
    """The bits of each task, if they have their own: `Group.bits`."""

    def has_copy(self, part: Part) -> bool:
        """Return whether a part is an exact copy of its readers' tensor."""
        return part.array.role == "dense" and part.readers[0] not in self.coded_tasks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """How one tensor is stored."""

    tensor: PlanTensor
    groups: tuple[StoredGroup, ...]
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def effective_dtype(dtype: str, cast: str | None) -> str:
    """Return the dtype in which a tensor's values are stored and returned, after `--dtype`."""
    return cast if cast is not None and dtype in FLOATING else dtype


def store_whole(plan: Plan, tensor: PlanTensor, cast: str | None) -> Storage:
    """Store a tensor that does not merge, which is constant or private. Tied and base-only ones store nothing."""
    if tensor.class_ in (TensorClass.TIED, TensorClass.BASE_ONLY):
        return with_base(plan, Storage(tensor=tensor, groups=(), parts=()))
    group = tuple(_copies(plan, tensor, [tensor.present], cast))
    return with_base(
        plan, Storage(tensor=tensor, groups=group, parts=tuple(dict.fromkeys(p for g in group for p in g.parts)))
    )


def store_tensor(
    plan: Plan, tensor: PlanTensor, groups: Sequence[Group], calls: Sequence[Call], cast: str | None
) -> Storage:
    """Store a mergeable tensor under the groups of its unit."""
    stored: list[StoredGroup] = []
    copied: list[Tasks] = []
    base = Part(
        name=f"{tensor.name}@base",
        array=base_array(tensor, cast),
        readers=(),
        tensor=tensor.name,
        task=None,
    )
    merged = [(group, _merged(plan, tensor, group, calls, cast, base)) for group in groups]
    needs_base = tuple(
        sorted(task for _, found in merged if found and base in found.parts for task in found.coded_tasks)
    )
    shared_base = Part(name=base.name, array=base.array, readers=needs_base, tensor=tensor.name, task=None)
    for group, found in merged:
        if found is None:
            copied.append(group.tasks)
        else:
            parts = tuple(shared_base if part is base else part for part in found.parts)
            stored.append(replace(found, parts=parts))
    exact = [tuple(task for task in group.tasks if task not in group.coded_tasks) for group in stored]
    copies = _copies(plan, tensor, [*copied, *exact], cast)
    dense = {task: part for group in copies for part in group.parts for task in part.readers}
    stored = [
        replace(group, parts=tuple(dict.fromkeys((*group.parts, *(dense[task] for task in tasks)))))
        for group, tasks in zip(stored, exact)
    ]
    stored += copies[: len(copied)]
    stored.sort(key=lambda group: group.tasks)
    parts = tuple(dict.fromkeys(part for group in stored for part in group.parts))
    return with_base(plan, Storage(tensor=tensor, groups=tuple(stored), parts=parts))


def with_base(plan: Plan, storage: Storage) -> Storage:
    """Add what kept adapters need of the base: a part with its bits gets more readers, or else a part is added."""
    tensor, readers = storage.tensor, plan.base_readers(storage.tensor)
    if not readers or tensor.base_form is None:
        return storage
    dtype, shape = tensor.base_form
    bases = [part for part in storage.parts if part.array.role == "base"]
    copies = [part for group in storage.groups for part in group.parts if group.has_copy(part)]
    found = next((part for part in [*bases, *copies] if _holds_base(tensor, part)), None)
    if found is None:
        array = Array(role="base", dtype=dtype, shape=shape)
        # A plain name, so that the base loads as it lies. Tasks that decode with the base must not read this part: they
        # would take it for their own tensor.
        part = Part(name=tensor.name, array=array, readers=readers, tensor=tensor.name, task=None)
        return replace(storage, parts=(*storage.parts, part))
    wider = replace(found, readers=(*found.readers, *readers))
    groups = tuple(
        replace(group, parts=tuple(wider if part is found else part for part in group.parts))
        for group in storage.groups
    )
    return replace(storage, groups=groups, parts=tuple(wider if part is found else part for part in storage.parts))


def _holds_base(tensor: PlanTensor, part: Part) -> bool:
    """Return whether the base, or a copy of a task's tensor, has the base's own bits."""
    if (part.array.dtype, part.array.shape) != tensor.base_form:
        return False
    own = [task for task in part.readers if task < len(tensor.is_base)]
    return part.array.role == "base" or any(copy_is_base(tensor, task) for task in own)


def reads_base(tensor: PlanTensor, group: StoredGroup, task: int) -> bool:
    """Return whether a task of the group reads the dense base, and nothing else, and gets its own bits.

    Readers cast by way of float32, in which float64 is not whole.
    """
    roles = {part.array.role for part in group.parts if task in part.readers}
    return roles == {"base"} and tensor.is_base[task] and not tensor.base_dtype == tensor.dtype_of(task) == "F64"


def copy_is_base(tensor: PlanTensor, task: int) -> bool:
    """Return whether a task's tensor, uncast, is the base's, bit by bit."""
    return tensor.is_base[task] and tensor.dtype_of(task) == tensor.base_dtype


def unit_parts(plan: Plan, unit: Unit, storages: Sequence[Storage], calls: Sequence[Call]) -> list[Part]:
    """Make the parts `<unit>@<role>.<task>`, which each task of a group has once for all tensors of the unit."""
    methods = {group.tasks: group for storage in storages for group in storage.groups if group.method is not None}
    return [
        Part(
            name=f"{unit.name}@{array.role}.{plan.tasks[task].name}",
            array=array,
            readers=(task,),
            tensor=unit.name,
            task=task,
            of_unit=True,
        )
        for tasks, group in methods.items()
        for task in tasks
        for array in _of_unit(group, calls)
    ]


def unit_bytes(group: Group | StoredGroup, calls: Sequence[Call]) -> int:
    """Return the bytes that a group that is not copied stores once for all tensors of a unit."""
    return len(group.tasks) * sum(array.num_bytes for array in _of_unit(group, calls))


def _of_unit(group: Group | StoredGroup, calls: Sequence[Call]) -> tuple[Array, ...]:
    """Return the arrays that one task of the group stores once for all tensors of a unit."""
    return () if group.method is None else form_of(calls[group.method]).of_unit(calls[group.method])


@dataclass(frozen=True, slots=True)
class GroupPrice:
    """What a group of one tensor stores under its method."""

    num_bytes: int
    """Bytes without the base and the copies, which groups of a tensor share, and without what the unit stores once."""
    base: bool
    copied: frozenset[int]
    """The tasks stored as exact copies, each as the first task with the same bits; all if the method stores nothing."""
    unit_bytes: int
    """The bytes that the group stores once for all tensors of a unit."""


def group_price(tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None) -> GroupPrice:
    found = group_layout(tensor, group, calls, cast)
    coded = {place for places, _ in found.own for place in places} if found is not None else set()
    copied = frozenset(tensor.same[task] for place, task in enumerate(group.tasks) if place not in coded)
    if found is None:
        return GroupPrice(0, False, copied, 0)
    return GroupPrice(found.num_bytes, found.base, copied, unit_bytes(group, calls))


def group_layout(tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None) -> GroupLayout | None:
    """Return the arrays of a group under its method; None where copies are exact, or take no more bytes."""
    same = tuple(tensor.same[task] for task in group.tasks)
    if group.method is None or (len(set(same)) == 1 and not group.bits):
        return None
    call = calls[group.method]
    dtypes = tuple(effective_dtype(tensor.dtype_of(task), cast) for task in group.tasks)
    base_dtype = base_array(tensor, cast).dtype
    return form_of(call).layout(
        GroupTensor(
            call=call,
            name=tensor.name,
            shape=tensor.shape,
            dtypes=dtypes,
            base_dtype=base_dtype,
            same=same,
            bits=group.bits,
        )
    )


def base_array(tensor: PlanTensor, cast: str | None) -> Array:
    """Return the array of the base's tensor, as `@base` stores it."""
    return Array(role="base", dtype=effective_dtype(str(tensor.base_dtype), cast), shape=tensor.shape)


def copy_bytes(tensor: PlanTensor, task: int, cast: str | None) -> int:
    dtype = effective_dtype(tensor.dtype_of(task), cast)
    return math.prod(tensor.shape_of(task)) * ITEM_BYTES[dtype]


def _merged(
    plan: Plan, tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None, base: Part
) -> StoredGroup | None:
    """Store the group under its method, without copies of exact tasks; None where all are copies."""
    found = group_layout(tensor, group, calls, cast)
    if found is None or group.method is None:
        return None
    coded = tuple(sorted(group.tasks[place] for places, _ in found.own for place in places))
    parts = [
        Part(
            name=plan.own_name(group.tasks[0], tensor.name) if array.role == "dense" else f"{tensor.name}@{array.role}",
            array=array,
            readers=coded,
            tensor=tensor.name,
            task=None,
        )
        for array in found.centre
    ]
    parts += [base] if found.base else []
    for places, arrays in found.own:
        sharing = tuple(group.tasks[place] for place in places)
        owner = plan.tasks[sharing[0]].name
        parts += [
            Part(
                name=f"{tensor.name}@{array.role}.{owner}",
                array=array,
                readers=coded if found.is_mixture else sharing,
                tensor=tensor.name,
                task=sharing[0],
            )
            for array in arrays
        ]
    return StoredGroup(
        tasks=group.tasks,
        form=form_of(calls[group.method]),
        method=group.method,
        parts=tuple(parts),
        coded_tasks=coded,
        bits=group.bits,
    )


def _copies(plan: Plan, tensor: PlanTensor, groups: Sequence[Tasks], cast: str | None) -> list[StoredGroup]:
    """Store dense copies: one part per distinct tensor, read by every task that has its bits."""
    readers: dict[int, list[int]] = {}
    for task in sorted(task for group in groups for task in group):
        readers.setdefault(tensor.same[task], []).append(task)
    parts = {
        representative: Part(
            name=plan.own_name(tasks[0], tensor.name),
            array=Array(
                role="dense",
                dtype=effective_dtype(tensor.dtype_of(tasks[0]), cast),
                shape=tensor.shape_of(tasks[0]),
            ),
            readers=tuple(tasks),
            tensor=tensor.name,
            task=None,
        )
        for representative, tasks in readers.items()
    }
    return [
        StoredGroup(
            tasks=tuple(group),
            form=COPY,
            method=None,
            coded_tasks=(),
            parts=tuple(dict.fromkeys(parts[tensor.same[task]] for task in group)),
        )
        for group in groups
    ]
