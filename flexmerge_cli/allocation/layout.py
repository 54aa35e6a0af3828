"""Lays out a bundle to the byte before any weight is read: parts, files, headers, index files, manifest. Pure."""

import copy
from collections.abc import Iterable, Mapping
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
    store_tensor,
    store_whole,
    unit_parts,
)
from flexmerge_cli.allocation.task_folders import task_folders
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.calibration import Measurements
from flexmerge_cli.formats.folders import BASE_FOLDER, linked_names
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.recorded import Request, recorded
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.request.merge import Layout, MergeRequest


@dataclass(frozen=True, kw_only=True)
class BundleLayout:
    """All parts of an allocation, their files and their exact bytes."""

    plan: Plan
    allocation: Allocation
    storages: Mapping[str, Storage]
    """The storage of each tensor, by aligned name, in the plan's order."""
    files: tuple[WeightFile, ...]
    stems: Mapping[int, str]
    """For each task, the stem of the links in its folder to its weight files; a task without links has none."""
    small: tuple[SmallFile, ...]
    base_stem: str | None = None
    """The stem of the links in `base` to the weight files of the base of kept adapters, if it has links."""
    entry_bytes: int
    """Bytes of the manifest's entries for units and tensors, most of which all layouts share."""
    gate: Mapping[str, Any] | None = None
    """The manifest's `gate`."""
    request: Request | None = None
    """What was asked: the manifest's `request`."""
    calibration: Measurements | None = None
    """What some method of the allocation reads; None if none reads any."""

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The methods of the allocation, in its order."""
        return tuple(use.call for use in self.allocation.methods)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of stored data, which factors and percentages count; kept adapters' own tensors are included."""
        return self.plan.own_bytes + sum(part.num_bytes for file in self.files for part in file.parts)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all files on disk, which a byte target counts."""
        rest = sum(file.num_bytes for file in self.files) + sum(file.num_bytes for file in self.small)
        return rest + self.num_manifest_bytes

    @cached_property
    def num_manifest_bytes(self) -> int:
        return len(canonical(self._frame(Measured()))) + self.entry_bytes

    @cached_property
    def links(self) -> dict[str, str]:
        """Map the path of each link to the weight file to which it leads."""
        folders = [(f"tasks/{self.plan.tasks[task].name}", stem, {task}) for task, stem in self.stems.items()]
        if self.base_stem is not None:
            folders.append((BASE_FOLDER, self.base_stem, set(self.plan.kept)))
        found: dict[str, str] = {}
        for folder, stem, readers in folders:
            route = [file.path for file in self.files if not readers.isdisjoint(file.readers)]
            found |= linked_names(folder, stem, route)
        return found

    @cached_property
    def unlinked_bytes(self) -> int:
        """Bytes of all files if every link becomes a copy, as in an upload to a store without links."""
        sizes = {file.path: file.num_bytes for file in self.files}
        return self.total_bytes + sum(sizes[path] for path in self.links.values())

    @cached_property
    def blank_manifest(self) -> bytes:
        """The manifest before anything is measured."""
        return self.manifest(Measured())

    def manifest(self, measured: Measured) -> bytes:
        cast = self.allocation.dtype
        units = [unit_entry(self.plan, unit, self.storages, cast, measured) for unit in self.allocation.units]
        tensors = [tensor_entry(self.plan, name, cast, measured) for name in entry_names(self.plan)]
        return manifest_bytes(self._frame(measured) | {"units": units, "tensors": tensors})

    def _frame(self, measured: Measured) -> dict[str, Any]:
        of_run = measured, self.gate, self.request
        frame = manifest_frame(self.plan, self.allocation, self.storages, self.files, self.small, self.stems, *of_run)
        if self.calibration is not None:
            frame["calibration"] = self.calibration.digest
        return frame | ({"base_stem": self.base_stem} if self.base_stem is not None else {})

    def served_bytes(self, task: int) -> int:
        """Return the bytes of the weight files that one task, or kept adapter, reads."""
        of_bundle = sum(file.num_bytes for file in self.files if task in file.readers)
        return self.plan.readers[task].own_file_bytes + of_bundle


class Pricer:
    """Prices allocations of one plan, and caches what they share: a cut tries many that differ in one block."""

    def __init__(
        self, plan: Plan, *, gate: Mapping[str, Any] | None = None, calibration: Measurements | None = None
    ) -> None:
        """Take a plan. gate: the description of the gate, which every bundle's manifest records. calibration: what
        methods read that read one."""
        self.plan, self.gate, self.calibration = plan, gate, calibration
        self.request: Request | None = None
        """What was asked, which the bundles record."""
        self.links = True
        """Whether tasks have links to their weights."""
        self._units: dict[Any, tuple[tuple[Storage, ...], tuple[Part, ...]]] = {}
        self._files: dict[Any, list[WeightFile]] = {}
        self._entries: dict[Any, int] = {}
        self._groups: dict[Any, GroupPrices] = {}
        self.searches: dict[Any, object] = {}
        """The searches of auto_allocation.py, by what was asked."""

    @cached_property
    def cast_saves(self) -> bool:
        """Whether `--dtype bf16` makes anything smaller; 16-bit models it would only round."""
        return self.tensor_bytes(copies(self.plan, "BF16")) < self.tensor_bytes(copies(self.plan))

    @property
    def calibrated(self) -> Measurements | None:
        """The calibration, if the request reads one."""
        return self.calibration if self.request is not None and self.request.calibration is not None else None

    def asked(self, request: MergeRequest) -> "Pricer":
        """Return a pricer with the same cache, for bundles that record this request."""
        other = copy.copy(self)
        other.request = recorded(request)
        other.links = request.layout is Layout.LINKS
        return other

    def unit(
        self, unit: Unit, methods: tuple[MethodUse, ...], cast: str | None
    ) -> tuple[tuple[Storage, ...], tuple[Part, ...]]:
        """Return the storages of a unit's tensors, and all its parts."""
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
        """Price a unit of these tensors with groups, without making the parts; groups can be put in and taken out."""
        key = (methods, cast)
        if key not in self._groups:
            self._groups[key] = GroupPrices([use.call for use in methods], cast)
        return UnitPrice(self.plan, tensors, self._groups[key], groups)

    def unit_bytes(self, unit: Unit, methods: tuple[MethodUse, ...], cast: str | None) -> int:
        return self.price(unit.tensors, methods, cast, unit.groups).num_bytes

    def whole(self, cast: str | None) -> tuple[Storage, ...]:
        """Return the storages of all tensors that do not merge."""
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
        """Return the bytes of everything that does not merge, the own tensors of kept adapters included."""
        return self.plan.own_bytes + sum(storage.num_bytes for storage in self.whole(cast))

    def tensor_bytes(self, allocation: Allocation) -> int:
        """Return the bytes of stored data, without laying out files."""
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
                self._files[key] = weight_files(readers, by_readers[readers], plan.reader_names)
            files += self._files[key]
        folders = task_folders(plan, storages, files, cast, links=self.links)
        return BundleLayout(
            plan=plan,
            allocation=allocation,
            storages=storages,
            files=tuple(files),
            stems=folders.stems,
            base_stem=folders.base_stem,
            small=folders.small,
            entry_bytes=self._entry_bytes(allocation, storages),
            gate=self.gate,
            request=self.request,
            calibration=self.calibrated,
        )

    def _entry_bytes(self, allocation: Allocation, storages: Mapping[str, Storage]) -> int:
        """Return the length of the manifest's lists of units and tensors, without their brackets."""
        lengths = []
        for unit in allocation.units:
            key: Any = (unit, allocation.methods, allocation.dtype)
            if key not in self._entries:
                self._entries[key] = len(canonical(unit_entry(self.plan, unit, storages, allocation.dtype, Measured())))
            lengths.append(self._entries[key])
        key = ("tensors", allocation.dtype)
        if key not in self._entries:
            names = entry_names(self.plan)
            entries = [tensor_entry(self.plan, name, allocation.dtype, Measured()) for name in names]
            self._entries[key] = len(canonical(entries)) - 2
        return sum(lengths) + max(0, len(lengths) - 1) + self._entries[key]
