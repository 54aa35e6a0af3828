"""What a bundle will be, to the byte, before a weight is read: parts, files, headers, index files, manifest. Pure."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flexmerge_cli.allocation.allocation import Allocation, Group, Tasks, Unit, copies
from flexmerge_cli.allocation.files import WeightFile, weight_files
from flexmerge_cli.allocation.manifest_bytes import (
    Measured,
    SmallFile,
    canonical,
    entry_names,
    manifest_bytes,
    manifest_frame,
    tensor_entry,
    unit_entry,
)
from flexmerge_cli.allocation.prices import GroupPrices, UnitPrice
from flexmerge_cli.allocation.storage import (
    Part,
    Storage,
    effective_dtype,
    store_tensor,
    store_whole,
    unit_parts,
)
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import BASE_FOLDER
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.recorded import Request, recorded
from flexmerge_cli.methods.method import Call
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.request.merge import MergeRequest

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class BundleLayout:
    """All parts of an allocation, their files and their exact bytes."""

    plan: Plan
    allocation: Allocation
    storages: Mapping[str, Storage]
    """By aligned name, in the plan's order."""
    files: tuple[WeightFile, ...]
    indices: Mapping[int, bytes]
    """Per task that ordinary loaders can read from the bundle: its index file."""
    small: tuple[SmallFile, ...]
    entry_bytes: int
    """Bytes of the manifest's entries of units and tensors, most of which every layout has in common."""
    gate: Mapping[str, Any] | None = None
    """The manifest's `gate`."""
    request: Request | None = None
    """What was asked: the manifest's `request`."""

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The methods of the allocation, in its order."""
        return tuple(use.call for use in self.allocation.methods)

    @cached_property
    def tensor_bytes(self) -> int:
        """Data stored: what factors and percentages count; kept adapters' own tensors among it."""
        return self.plan.own_bytes + sum(part.num_bytes for file in self.files for part in file.parts)

    @cached_property
    def total_bytes(self) -> int:
        """Every byte on disk: what a byte target counts."""
        rest = sum(file.num_bytes for file in self.files) + sum(file.num_bytes for file in self.small)
        return rest + self.num_manifest_bytes

    @cached_property
    def num_manifest_bytes(self) -> int:
        return len(canonical(self._frame(Measured()))) + self.entry_bytes

    def manifest(self, measured: Measured) -> bytes:
        units = [unit_entry(self.plan, unit, self.storages, measured) for unit in self.allocation.units]
        tensors = [tensor_entry(self.plan, name, self.allocation.dtype, measured) for name in entry_names(self.plan)]
        return manifest_bytes(self._frame(measured) | {"units": units, "tensors": tensors})

    def _frame(self, measured: Measured) -> dict[str, Any]:
        of_run = measured, self.gate, self.request
        return manifest_frame(self.plan, self.allocation, self.storages, self.files, self.small, *of_run)

    def served_bytes(self, task: int) -> int:
        """Bytes of the weight files that one task, or kept adapter, reads."""
        of_bundle = sum(file.num_bytes for file in self.files if task in file.readers)
        return self.plan.readers[task].own_file_bytes + of_bundle


class Pricer:
    """Bills of one plan, with a memory for what allocations share: a cut tries many that differ in one block."""

    def __init__(self, plan: Plan, *, gate: Mapping[str, Any] | None = None) -> None:
        """gate: what every bundle's manifest tells of the gate that it has to pass."""
        self.plan, self.gate = plan, gate
        self.request: Request | None = None
        """What the bundles record."""
        self._units: dict[Any, tuple[tuple[Storage, ...], tuple[Part, ...]]] = {}
        self._files: dict[Any, list[WeightFile]] = {}
        self._entries: dict[Any, int] = {}
        self._groups: dict[Any, GroupPrices] = {}
        self.searches: dict[Any, object] = {}
        """What auto_allocation.py keeps: searches by what was asked."""

    @cached_property
    def cast_saves(self) -> bool:
        """Whether `--dtype bf16` makes anything smaller: models of 16 bits it only rounds."""
        return self.tensor_bytes(copies(self.plan, "BF16")) < self.tensor_bytes(copies(self.plan))

    def asked(self, request: MergeRequest) -> "Pricer":
        """With the same memory: layouts of bundles that record this request."""
        other = copy.copy(self)
        other.request = recorded(request)
        return other

    def unit(
        self, unit: Unit, methods: tuple[MethodUse, ...], cast: str | None
    ) -> tuple[tuple[Storage, ...], tuple[Part, ...]]:
        """Storages of a unit's tensors, and all its parts."""
        key = (unit, methods, cast)
        found = self._units.get(key)
        if found is None:
            calls = tuple(use.call for use in methods)
            storages = tuple(
                store_tensor(self.plan, self.plan.tensor(name), unit.groups, calls, cast) for name in unit.tensors
            )
            parts = [part for storage in storages for part in storage.parts]
            found = self._units[key] = storages, tuple(parts + unit_parts(self.plan, unit, storages, calls))
        return found

    def price(
        self, tensors: Iterable[str], methods: tuple[MethodUse, ...], cast: str | None, groups: Iterable[Group] = ()
    ) -> UnitPrice:
        """What a unit of these tensors comes to with groups, without making the parts; groups may come and go."""
        key = (methods, cast)
        if key not in self._groups:
            self._groups[key] = GroupPrices([use.call for use in methods], cast)
        return UnitPrice(self.plan, tensors, self._groups[key], groups)

    def unit_bytes(self, unit: Unit, methods: tuple[MethodUse, ...], cast: str | None) -> int:
        return self.price(unit.tensors, methods, cast, unit.groups).num_bytes

    def whole(self, cast: str | None) -> tuple[Storage, ...]:
        """Storages of all that does not merge."""
        key = ("whole", cast)
        if key not in self._units:
            storages = tuple(
                store_whole(self.plan, tensor, cast)
                for tensor in self.plan.stored
                if tensor.class_ is not TensorClass.MERGEABLE
            )
            self._units[key] = storages, tuple(part for storage in storages for part in storage.parts)
        return self._units[key][0]

    def whole_bytes(self, cast: str | None) -> int:
        """Bytes of all that does not merge, the own tensors of kept adapters included."""
        return self.plan.own_bytes + sum(storage.num_bytes for storage in self.whole(cast))

    def tensor_bytes(self, allocation: Allocation) -> int:
        """Data stored, without laying out files."""
        return self.whole_bytes(allocation.dtype) + sum(
            self.unit_bytes(unit, allocation.methods, allocation.dtype) for unit in allocation.units
        )

    def layout(self, allocation: Allocation) -> BundleLayout:
        plan, cast = self.plan, allocation.dtype
        storages: dict[str, Storage] = {storage.tensor.name: storage for storage in self.whole(cast)}
        parts = [part for storage in storages.values() for part in storage.parts]
        for unit in allocation.units:
            of_unit, all_parts = self.unit(unit, allocation.methods, cast)
            storages |= {storage.tensor.name: storage for storage in of_unit}
            parts += all_parts
        storages = {tensor.name: storages[tensor.name] for tensor in plan.stored}
        by_readers: dict[Tasks, list[Part]] = {}
        for part in parts:
            by_readers.setdefault(part.readers, []).append(part)
        files: list[WeightFile] = []
        for readers in sorted(by_readers):
            key = tuple(map(id, by_readers[readers]))
            if key not in self._files:
                self._files[key] = weight_files(readers, by_readers[readers], plan.reader_names, plan.sha256)
            files += self._files[key]
        indices = _indices(plan, storages, files, cast)
        small = [
            SmallFile(path=f"tasks/{task.name}/{name}", readers=(number,), num_bytes=side.bytes)
            for number, task in enumerate(plan.readers)
            for name, side in sorted(task.files.items())
        ] + [
            SmallFile(path=f"tasks/{plan.tasks[task].name}/{INDEX_NAME}", readers=(task,), num_bytes=len(index))
            for task, index in indices.items()
        ]
        small += [
            SmallFile(path=f"{BASE_FOLDER}/{name}", readers=plan.kept, num_bytes=side.bytes)
            for name, side in plan.base.files.items()
        ]
        return BundleLayout(
            plan=plan,
            allocation=allocation,
            storages=storages,
            files=tuple(files),
            indices=indices,
            small=tuple(sorted(small, key=lambda file: file.path)),
            entry_bytes=self._entry_bytes(allocation, storages),
            gate=self.gate,
            request=self.request,
        )

    def _entry_bytes(self, allocation: Allocation, storages: Mapping[str, Storage]) -> int:
        """Length of the manifest's lists of units and tensors, without their brackets."""
        lengths = []
        for unit in allocation.units:
            key: Any = (unit, allocation.methods, allocation.dtype)
            if key not in self._entries:
                self._entries[key] = len(canonical(unit_entry(self.plan, unit, storages, Measured())))
            lengths.append(self._entries[key])
        key = ("tensors", allocation.dtype)
        if key not in self._entries:
            names = entry_names(self.plan)
            entries = [tensor_entry(self.plan, name, allocation.dtype, Measured()) for name in names]
            self._entries[key] = len(canonical(entries)) - 2
        return sum(lengths) + max(0, len(lengths) - 1) + self._entries[key]


def _indices(
    plan: Plan, storages: Mapping[str, Storage], files: Sequence[WeightFile], cast: str | None
) -> dict[int, bytes]:
    """Index files of the tasks of which nothing must be decoded, renamed (as tensors of subfolders are), cast or put
    together: the others have none, so that nothing can be half-loaded."""
    if plan.settings.adapters == "pool":
        return {}  # an adapter's folder has one weight file of another name
    where = {part: file.path for file in files for part in file.parts}
    joined = plan.joined_tasks()
    weight_maps: dict[int, dict[str, str] | None] = {
        task: None if task in joined or plan.tasks[task].parts else {} for task in plan.all_tasks
    }
    sizes = dict.fromkeys(plan.all_tasks, 0)
    for storage in storages.values():
        tensor = storage.tensor
        if tensor.class_ is TensorClass.TIED:
            continue
        dense = {task: part for part in storage.parts if part.array.role == "dense" for task in part.readers}
        for task in tensor.present:  # kept adapters are none of these: theirs is an adapter's folder
            weight_map, part, own = weight_maps[task], dense.get(task), plan.own_name(task, tensor.name)
            if weight_map is None:
                continue
            if part is None or part.name != own or part.array.dtype != effective_dtype(tensor.dtype_of(task), cast):
                weight_maps[task] = None
                continue
            weight_map[own] = f"../../{where[part]}"
            sizes[task] += part.num_bytes
    found = {}
    for task, weight_map in weight_maps.items():
        if weight_map is not None:
            value = {"metadata": {"total_size": sizes[task]}, "weight_map": weight_map}
            found[task] = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return found
