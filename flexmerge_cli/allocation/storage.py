"""One tensor of the family and its groups in, the arrays that hold it out. Pure; no weights, no files.

Copies or a method is decided per tensor and group from k, shape and dtype alone: copies where they cost no more. Copies
with the same bits are one part with more readers, whatever their groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexmerge_cli.allocation.allocation import Bits, Group, Tasks, Unit
from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.allocation.plan_records import PlanTensor
from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES, promote
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.methods.coded import declare
from flexmerge_cli.methods.layout import Array, Kind, Layout, bits_arrays, centre_arrays, layout
from flexmerge_cli.methods.method import Call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One stored array and the tasks that need it."""

    name: str
    """In its file: the tensor's plain name if dense, else `<tensor>@<role>[.<task>]`."""
    array: Array
    readers: Tasks
    tensor: str
    """Aligned name; for `gamma` the unit's."""
    task: int | None
    """Whose residual it is."""

    @property
    def num_bytes(self) -> int:
        return self.array.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredGroup:
    """How the tasks of one group of one tensor are stored."""

    tasks: Tasks
    kind: Kind
    method: int | None
    parts: tuple[Part, ...]
    """What decodes it; of copies one part per distinct tensor."""
    bits: tuple[Bits, ...] | None = None
    """Per task, where each has its own: `Group.bits`. Parts of equal tasks are one, named by the first."""

    @property
    def coded_tasks(self) -> Tasks:
        """All but those of exact copies."""
        if self.kind == "copy":
            return ()
        return tuple(t for t, b in zip(self.tasks, self.bits or (0,) * len(self.tasks)) if b != "exact")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """How one tensor is stored."""

    tensor: PlanTensor
    groups: tuple[StoredGroup, ...]
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


GAMMA_BYTES = 4  # one float32


def effective_dtype(dtype: str, cast: str | None) -> str:
    """What a tensor's values are stored in and given back as, after `--dtype`."""
    return cast if cast is not None and dtype in FLOATING else dtype


def store_whole(plan: Plan, tensor: PlanTensor, cast: str | None) -> Storage:
    """A tensor that does not merge: constant or private. Tied and base-only ones store nothing."""
    if tensor.class_ in (TensorClass.TIED, TensorClass.BASE_ONLY):
        return with_base(plan, Storage(tensor=tensor, groups=(), parts=()))
    group = tuple(_copies(plan, tensor, [tensor.present], cast))
    return with_base(
        plan, Storage(tensor=tensor, groups=group, parts=tuple(dict.fromkeys(p for g in group for p in g.parts)))
    )


def store_tensor(
    plan: Plan, tensor: PlanTensor, groups: Sequence[Group], calls: Sequence[Call], cast: str | None
) -> Storage:
    """A mergeable tensor under the groups of its unit."""
    stored: list[StoredGroup] = []
    copied: list[Tasks] = []
    base = Part(
        name=f"{tensor.name}@base",
        array=base_array(tensor, cast),
        readers=(),
        tensor=tensor.name,
        task=None,
    )
    merged = [
        (group, (_merged if group.bits is None else _of_bits)(plan, tensor, group, calls, cast, base))
        for group in groups
    ]
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
    """The same with what kept adapters need of the base: a part with its bits gets more readers, or one is added."""
    tensor, readers = storage.tensor, plan.base_readers(storage.tensor)
    if not readers or tensor.base_form is None:
        return storage
    dtype, shape = tensor.base_form
    bases = [part for part in storage.parts if part.array.role == "base"]
    copies = [
        part
        for group in storage.groups
        for part in group.parts
        if group.kind == "copy" or (group.bits is not None and part.array.role == "dense")
    ]
    found = next((part for part in [*bases, *copies] if _holds_base(tensor, part)), None)
    if found is None:
        array = Array(role="base", dtype=dtype, shape=shape)
        part = Part(name=f"{tensor.name}@base", array=array, readers=readers, tensor=tensor.name, task=None)
        return replace(storage, parts=(*storage.parts, part))
    wider = replace(found, readers=(*found.readers, *readers))
    groups = tuple(
        replace(group, parts=tuple(wider if part is found else part for part in group.parts))
        for group in storage.groups
    )
    return replace(storage, groups=groups, parts=tuple(wider if part is found else part for part in storage.parts))


def _holds_base(tensor: PlanTensor, part: Part) -> bool:
    """Whether the base, or a copy of a task's tensor, has the base's own bits."""
    if (part.array.dtype, part.array.shape) != tensor.base_form:
        return False
    own = [task for task in part.readers if task < len(tensor.is_base)]
    return part.array.role == "base" or any(copy_is_base(tensor, task) for task in own)


def reads_base(tensor: PlanTensor, group: StoredGroup, task: int) -> bool:
    """Whether a task of the group reads the dense base, and nothing else, and gets its own bits.

    Readers cast by way of float32, in which float64 is not whole.
    """
    bits = dict(zip(group.tasks, group.bits or ()))
    on_base = bits.get(task) == 0 and any(part.array.role == "base" for part in group.parts)
    return on_base and tensor.is_base[task] and not tensor.base_dtype == tensor.dtype_of(task) == "F64"


def copy_is_base(tensor: PlanTensor, task: int) -> bool:
    """Whether a task's tensor, uncast, is the base's, bit by bit."""
    return tensor.is_base[task] and tensor.dtype_of(task) == tensor.base_dtype


def gain_parts(plan: Plan, unit: Unit, storages: Sequence[Storage], calls: Sequence[Call]) -> list[Part]:
    """`<unit>@gamma.<task>`, one float32 per task of every group that a masked method with a factor stores."""
    masked = {group.tasks: group.method for storage in storages for group in storage.groups if group.kind == "masked"}
    return [
        Part(
            name=f"{unit.name}@gamma.{plan.tasks[task].name}",
            array=Array(role="gamma", dtype="F32", shape=(1,)),
            readers=(task,),
            tensor=unit.name,
            task=task,
        )
        for tasks, method in masked.items()
        if method is not None and calls[method].gain is not None
        for task in tasks
    ]


@dataclass(frozen=True, slots=True)
class GroupPrice:
    """What a group of one tensor stores under its method."""

    num_bytes: int
    """Without the base, which all groups of the tensor share, and without factors, which are the unit's."""
    base: bool
    gain: bool


def group_price(tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None) -> GroupPrice | None:
    """None where copies are exact, or cost no more."""
    found = group_layout(tensor, group, calls, cast)
    if found is None or group.method is None:
        return None
    arrays = [*found.centre, *(array for each in found.each for array in each)]
    gain = found.kind == "masked" and calls[group.method].gain is not None
    return GroupPrice(sum(array.num_bytes for array in arrays), found.base, gain)


def group_layout(tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None) -> Layout | None:
    """Arrays of a group under its method; None where copies are exact, or cost no more."""
    if group.method is None or len({tensor.same[task] for task in group.tasks}) == 1:
        return None
    dtypes = tuple(effective_dtype(tensor.dtype_of(task), cast) for task in group.tasks)
    return layout(calls[group.method], shape=tensor.shape, dtypes=dtypes, base_dtype=base_array(tensor, cast).dtype)


def base_array(tensor: PlanTensor, cast: str | None) -> Array:
    """The base's tensor, as `@base` stores it."""
    return Array(role="base", dtype=effective_dtype(str(tensor.base_dtype), cast), shape=tensor.shape)


def copy_bytes(tensor: PlanTensor, task: int, cast: str | None) -> int:
    dtype = effective_dtype(tensor.dtype_of(task), cast)
    return math.prod(tensor.shape_of(task)) * ITEM_BYTES[dtype]


def _merged(
    plan: Plan, tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None, base: Part
) -> StoredGroup | None:
    """The group under its method; None where copies are exact or cost no more."""
    found = group_layout(tensor, group, calls, cast)
    if found is None:
        return None
    first = group.tasks[0]
    parts = [
        Part(
            name=plan.own_name(first, tensor.name) if array.role == "dense" else f"{tensor.name}@{array.role}",
            array=array,
            readers=group.tasks,
            tensor=tensor.name,
            task=None,
        )
        for array in found.centre
    ]
    parts += [base] if found.base else []
    parts += [
        Part(
            name=f"{tensor.name}@{array.role}.{plan.tasks[task].name}",
            array=array,
            readers=(task,),
            tensor=tensor.name,
            task=task,
        )
        for task, arrays in zip(group.tasks, found.each)
        for array in arrays
    ]
    return StoredGroup(tasks=group.tasks, kind=found.kind, method=group.method, parts=tuple(parts))


def _of_bits(
    plan: Plan, tensor: PlanTensor, group: Group, calls: Sequence[Call], cast: str | None, base: Part
) -> StoredGroup | None:
    """The group where each task has bits of its own, without the exact ones' copies; None where all are exact."""
    assert group.bits is not None and group.method is not None
    coded = declare(calls[group.method])
    assert coded is not None
    bits_of: dict[int, int] = {task: bits for task, bits in zip(group.tasks, group.bits) if bits != "exact"}
    if not bits_of or not tensor.num_elements:
        return None
    dtypes = [effective_dtype(tensor.dtype_of(task), cast) for task in group.tasks]
    parts = [
        Part(name=f"{tensor.name}@{array.role}", array=array, readers=tuple(bits_of), tensor=tensor.name, task=None)
        for array in centre_arrays(coded, tensor.shape, promote(dtypes))
    ]
    is_dense_base = coded.centre == "base" and coded.centre_bits == "dense"
    parts += [base] if is_dense_base else []
    classes: dict[tuple[int, int], list[int]] = {}
    for task, bits in bits_of.items():
        classes.setdefault((tensor.same[task], bits), []).append(task)
    for (_, number), tasks in classes.items():
        own = bits_arrays(coded, tensor.shape, number, effective_dtype(tensor.dtype_of(tasks[0]), cast))
        parts += [
            Part(
                name=f"{tensor.name}@{array.role}.{plan.tasks[tasks[0]].name}",
                array=array,
                readers=tuple(tasks),
                tensor=tensor.name,
                task=tasks[0],
            )
            for array in own
        ]
    return StoredGroup(tasks=group.tasks, kind="residual", method=group.method, parts=tuple(parts), bits=group.bits)


def _copies(plan: Plan, tensor: PlanTensor, groups: Sequence[Tasks], cast: str | None) -> list[StoredGroup]:
    """Dense copies: one part per distinct tensor, read by every task whose bits it holds."""
    readers: dict[int, list[int]] = {}
    for task in sorted(task for group in groups for task in group):
        readers.setdefault(tensor.same[task], []).append(task)
    parts = {
        leader: Part(
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
        for leader, tasks in readers.items()
    }
    return [
        StoredGroup(
            tasks=tuple(group),
            kind="copy",
            method=None,
            parts=tuple(dict.fromkeys(parts[tensor.same[task]] for task in group)),
        )
        for group in groups
    ]
