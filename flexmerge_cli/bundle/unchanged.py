"""Finds which parts of a new bundle's layout lie in an old bundle, and what was measured there.

A part is taken over only if it can be shown to have the bytes that a merge would write. For copies, and for the base,
the digests of the tensors show this. What a method makes is the same if the group has the same tasks, with the same
weights (by their fingerprints), over the same base, in the same tensors, by the same method, bits and dtype, in the
same build, and if the method measures nothing beyond the group. Reads the manifest and headers, but no weights.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flexmerge_cli.allocation.allocation import Group, Tasks, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured, group_entry, method_entry
from flexmerge_cli.allocation.restricted import restricted
from flexmerge_cli.allocation.storage import Part, Storage, effective_dtype
from flexmerge_cli.bundle.files import FETCH_AGAIN
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import FileDigests, file_digests
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.chain import Chain, chains_of
from flexmerge_cli.engine.product import complete
from flexmerge_cli.errors import IntegrityError, UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest_records import GroupEntry, TensorEntry, unpacked_errors
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.record import Shape

PIECE_BYTES = 4 << 20
MERGE = "to make the bundle without the old one: flexmerge merge new.json … -o new/"


@dataclass(slots=True, kw_only=True)
class Unchanged:
    """The parts of a new layout that an old bundle already has."""

    bundle: Bundle
    layout: BundleLayout
    build: str
    places: dict[Part, StoredTensor] = field(default_factory=dict)
    """Where the parts that are taken over lie in the old bundle."""
    computed: set[tuple[str, Tasks]] = field(default_factory=set)
    """(unit, tasks) of the groups whose values and errors must be computed, even if some of their parts are known."""
    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    """Maps each tensor, and each task that takes it over, to the digest of what a reader gets."""
    errors: dict[tuple[str, Tasks], dict[int, float]] = field(default_factory=dict)
    """Maps (unit, tasks) of each group that is taken over to its errors, as in `Measured`."""
    files: dict[str, str] = field(default_factory=dict)
    """Maps each weight file to the one of the old bundle that has the same bytes."""

    @property
    def left(self) -> BundleLayout:
        """The layout of what remains to be computed."""
        parts = (part for file in self.layout.files for part in file.parts)
        return restricted(self.layout, [part for part in parts if part not in self.places], self.computed)

    @property
    def copied(self) -> dict[Part, StoredTensor]:
        """The parts that are taken over into files that also have other parts."""
        files = [file for file in self.layout.files if file.path not in self.files]
        return {part: self.places[part] for file in files for part in file.parts if part in self.places}

    def pieces(self, place: StoredTensor) -> Iterator[np.ndarray]:
        """Yield the bytes of a part of the old bundle, uint8. Raises IntegrityError if its file is damaged."""
        step = PIECE_BYTES // place.item_bytes
        for start in range(0, place.num_elements, step):
            stop = min(place.num_elements, start + step)
            yield self.bundle.bits(place, slice(start, stop)).view(np.uint8)

    def complete(self, measured: Measured) -> None:
        """Add what the old bundle records to what a run of `left` has measured."""
        for name, storage in self.layout.storages.items():
            source = {task: str(storage.tensor.digests[task]) for task in storage.tensor.present}
            measured.digests[name] = source | measured.digests.get(name, {}) | self.digests.get(name, {})
        measured.errors |= self.errors
        measured.files |= {path: self._digests_of(old) for path, old in self.files.items()}
        measured.build = self.build
        complete(self.layout, measured)

    def _digests_of(self, name: str) -> FileDigests:
        """Return the digests of an old file. Raises IntegrityError if they are computed and its SHA-256 is another."""
        entry, path = self.bundle.manifest.files[name], self.bundle.path / name
        found = entry.digests or file_digests(path)
        if found.sha256 != entry.sha256:
            differs = f"sha256 differs: {found.sha256}, {entry.sha256} by the manifest"
            raise IntegrityError(f"{path}: {differs}", hint=FETCH_AGAIN)
        return found

    def summary(self) -> dict[str, int]:
        """Return the numbers and bytes of weight files that are linked, copied from the old ones, or newly written."""
        sizes = {file.path: file.num_bytes for file in self.layout.files}
        kept, copied = sum(sizes[path] for path in self.files), sum(part.num_bytes for part in self.copied)
        return {
            "kept_files": len(self.files),
            "kept_bytes": kept,
            "copied_bytes": copied,
            "written_files": len(sizes) - len(self.files),
            "written_bytes": sum(sizes.values()) - kept - copied,
        }


def check_lineage(bundle: Bundle, plan: Plan) -> None:
    """Raise UsageError for a bundle that is not of the plan's family, or does not record which family it is of."""
    manifest, new = bundle.manifest, {reader.name: reader.fingerprint for reader in plan.readers}
    if manifest.base is None or manifest.request is None:
        raise UsageError(f"{bundle.path} does not record what it was made from, as older bundles do not", hint=MERGE)
    has_tasks = any(new.get(name) == task.fingerprint for name, task in manifest.tasks.items())
    is_comparable = _compared(manifest.stored) == _compared(plan.tensors)
    if manifest.base != plan.base.fingerprint and (is_comparable or not has_tasks):
        raise UsageError(f"{bundle.path} has another base than the plan, whose base is {plan.base.source}", hint=MERGE)
    if not has_tasks:
        raise UsageError(f"the plan has no task of {bundle.path}: {', '.join(manifest.tasks)}", hint=MERGE)
    if manifest.calibration is not None:
        raise UsageError(f"{bundle.path} was merged with a calibration, which `update` does not take", hint=MERGE)
    if manifest.router is not None:
        raise UsageError(
            f"{bundle.path} has a router, which was fitted to its tasks",
            hint="update the bundle that it was added to, and then use `flexmerge route`",
        )
    for what, is_there in (("surgery", manifest.surgery is not None), ("wemoe", manifest.wemoe is not None)):
        if is_there:
            raise UsageError(
                f"{bundle.path} has what `flexmerge tune --method {what}` fitted to its tasks",
                hint="update the bundle that it was added to, and then tune again",
            )
    if manifest.gate is not None:
        raise UsageError(f"{bundle.path} passed a gate, and `update` judges none", hint="merge its recipe again")


def _compared(tensors: Iterable[TensorEntry] | Iterable[PlanTensor]) -> set[str]:
    """Return the tensors that were compared with the base, and are in its fingerprint: those that merge."""
    return {tensor.name for tensor in tensors if tensor.class_ is TensorClass.MERGEABLE}


def unchanged(bundle: Bundle, layout: BundleLayout, build: str) -> Unchanged:
    """Find what a bundle has of a layout. build: as the new manifest records it. Raises like check_lineage."""
    check_lineage(bundle, layout.plan)
    found = Unchanged(bundle=bundle, layout=layout, build=build)
    search = _Search(found)
    search.copies()
    search.groups()
    search.cast_copies()
    for file in layout.files:
        places = [found.places[part] for part in file.parts if part in found.places]
        if len(places) == len(file.parts) and len({place.path for place in places}) == 1:
            path = places[0].path
            with path.open("rb") as opened:
                is_same = path.stat().st_size == file.num_bytes and opened.read(len(file.header)) == file.header
            if is_same and [place.offset for place in places] == file.offsets():
                found.files[file.path] = path.relative_to(bundle.path).as_posix()
    return found


class _Search:
    """Compares a bundle with a layout, and records what it finds."""

    def __init__(self, found: Unchanged) -> None:
        self.found, self.bundle, self.layout, self.plan = found, found.bundle, found.layout, found.layout.plan
        manifest, layout = self.bundle.manifest, self.layout
        self.names, self.cast = self.plan.reader_names, layout.allocation.dtype
        self.same_run = (manifest.build, manifest.allocation.dtype) == (found.build, self.cast)
        self.same_base = manifest.base == self.plan.base.fingerprint
        self.same_tasks = {
            place
            for place, task in enumerate(self.plan.tasks)
            if (old := manifest.tasks.get(task.name)) is not None and old.fingerprint == task.fingerprint
        }
        self.entries = {entry.name: entry for entry in manifest.stored}
        self.in_units = {name for unit in layout.allocation.units for name in unit.tensors}

    def copies(self) -> None:
        """Find tensors of tasks and of the base that are stored unchanged, by their digests."""
        contents, bases = self._contents()
        for name, storage in self.layout.storages.items():
            tensor = storage.tensor
            for part in storage.parts:
                place, form, task = None, (part.array.dtype, part.array.shape), part.readers[0]
                if part.array.role == "base":
                    place = bases.get(name) if self.same_base else None
                    if place is None or not _fits(part, place):
                        place = contents.get((*form, str(tensor.base_digest))) if tensor.base_form == form else None
                elif any(
                    part in group.parts and group.has_copy(part) for group in storage.groups
                ) and not self._is_cast(storage, part):
                    place = contents.get((*form, str(tensor.digests[task])))
                if place is not None:
                    self.found.places[part] = place

    def _contents(self) -> tuple[dict[tuple[str, Shape, str], StoredTensor], dict[str, StoredTensor]]:
        """Return the parts that hold a tensor as a task gets it, by dtype, shape and digest; the base's, by name."""
        contents: dict[tuple[str, Shape, str], StoredTensor] = {}
        named = [(name, part) for parts in self.bundle.parts.values() for name, part in parts.items()]
        bases = {name.removesuffix("@base"): part for name, part in named if name.endswith("@base")}
        for task, entry in ((name, each) for each in self.entries.values() for name in each.digests):
            if entry.of is not None:
                continue
            held = self.bundle.stored_as(task, entry.name)
            if held.base is not None:
                bases.setdefault(entry.name, held.base)
            part = held.dense or (held.base if held.is_plain else None)
            form = entry.dtype_of(task), entry.shape_of(task)
            if part is not None and (part.dtype, part.shape) == form:
                contents[(*form, entry.digests[task])] = part
        return contents, bases

    def cast_copies(self) -> None:
        """Find tensors that do not merge and are stored in another dtype."""
        for name, storage in self.layout.storages.items():
            for part in storage.parts if self.same_run and name not in self.in_units else ():
                place = self._on_route(part) if self._is_cast(storage, part) else None
                if place is not None and self._are_same(storage, part.readers):
                    self.found.places[part] = place
                    self._take_digests(name, part.readers)

    def groups(self) -> None:
        """Find groups whose values were computed."""
        old_units = {unit.name: unit for unit in self.bundle.manifest.units}
        copies, gone = set(self.found.places), set[Part]()
        # Errors are summed in runs, whose length is that of the widest scope in a tensor, even if another group has it.
        # A tensor's groups can differ in scope only if copies, too, lose something: then all groups stay, or none.
        keeps_all_or_none = self.cast is not None and bool(self.layout.allocation.methods)
        for unit in self.layout.allocation.units:
            old = old_units.get(unit.name)
            of_old = {group.tasks: group for group in old.groups} if old and old.tensors == unit.tensors else {}
            wanted = [(group, self._entry(unit, group)) for group in unit.groups]
            computed = [(group, new) for group, new in wanted if "errors" in new]  # the others are exact copies
            kept = {
                group.tasks: places
                for group, new in computed
                if (places := self._places(unit, group, new, of_old.get(tuple(new["tasks"])))) is not None
            }
            if keeps_all_or_none and (len(kept) < len(computed) or len(of_old) != len(unit.groups)):
                kept = {}
            for group, new in computed:
                if group.tasks not in kept:
                    self.found.computed.add((unit.name, group.tasks))
                    gone.update(part for part in self._parts_of(unit, group) if part not in copies)
                    continue
                self.found.places |= kept[group.tasks]
                errors = unpacked_errors(str(of_old[tuple(new["tasks"])].errors))
                self.found.errors[unit.name, group.tasks] = dict(zip(group.tasks, errors))
                for name in unit.tensors:
                    self._take_digests(name, group.tasks)
        for part in gone:  # This may be a cast copy that a group which stays reads, too.
            self.found.places.pop(part, None)

    def _entry(self, unit: Unit, group: Group) -> dict[str, Any]:
        return group_entry(self.plan, unit, group, self.layout.storages, self.cast, Measured())

    def _places(
        self, unit: Unit, group: Group, new: Mapping[str, Any], old: GroupEntry | None
    ) -> dict[Part, StoredTensor] | None:
        """Return where the parts of a group lie; None unless the group is the same in the bundle."""
        if old is None or old.errors is None or not self._is_same_group(unit, group, new, old):
            return None
        found = {part: self.found.places.get(part) or self._on_route(part) for part in self._parts_of(unit, group)}
        places = {part: place for part, place in found.items() if place is not None}
        return places if len(places) == len(found) else None

    def _parts_of(self, unit: Unit, group: Group) -> list[Part]:
        stored = [each for name in unit.tensors for each in self.layout.storages[name].groups]
        of_unit = [
            part for file in self.layout.files for part in file.parts if part.of_unit and part.tensor == unit.name
        ]
        found = [part for each in stored if each.tasks == group.tasks for part in each.parts]
        return found + [part for part in of_unit if part.task in group.tasks]

    def _is_same_group(self, unit: Unit, group: Group, new: Mapping[str, Any], old: GroupEntry) -> bool:
        """Return whether a group of the bundle is made of the same tensors by the same method."""
        methods, allocation = self.bundle.manifest.methods, self.layout.allocation
        method = (
            None if new["method"] is None else json.loads(json.dumps(method_entry(allocation.methods[new["method"]])))
        )
        old_method = None if old.method is None else json.loads(methods[old.method].model_dump_json())
        return (
            self.same_run
            and self.same_base
            and (new["kind"], new.get("bits"), method) == (old.kind, old.bits and dict(old.bits), old_method)
            and all(self._are_same(self.layout.storages[name], group.tasks) for name in unit.tensors)
            and (new["method"] is None or self._is_local(self.chains[new["method"]], unit))
        )

    @cached_property
    def chains(self) -> list[Chain]:
        return chains_of(self.layout)

    def _is_local(self, chain: Chain, unit: Unit) -> bool:
        """Return whether a method measures only the tasks of a group, in one block, or the whole plan is the same."""
        if self.bundle.manifest.plan == self.plan.sha256:
            return True
        expert: Any = chain.coded.expert if chain.coded is not None else None
        call = chain.call.statistics if chain.call is not None else None
        measured = [found for found in (*(step.statistics for step in chain.steps), call, expert) if found is not None]
        in_block = chain.call is not None and chain.call.scope == "block"
        if not measured and not in_block:
            return True
        is_block = any(set(block.tensors) == set(unit.tensors) for block in self.plan.blocks)
        of_group = all(getattr(found, "per", "task") == "group" and found.scope != "model" for found in measured)
        return is_block and of_group and not self.plan.merges_products

    def _are_same(self, storage: Storage, tasks: Tasks) -> bool:
        """Return whether tasks still have the same tensor, and give it back in the same dtype."""
        entry, tensor = self.entries.get(storage.tensor.name), storage.tensor
        return entry is not None and all(
            task in self.same_tasks
            and self.names[task] in entry.digests
            and entry.dtype_of(self.names[task]) == effective_dtype(tensor.dtype_of(task), self.cast)
            and entry.shape_of(self.names[task]) == tensor.shape_of(task)
            for task in tasks
        )

    def _is_cast(self, storage: Storage, part: Part) -> bool:
        return part.array.role == "dense" and storage.tensor.dtype_of(part.readers[0]) != part.array.dtype

    def _on_route(self, part: Part) -> StoredTensor | None:
        """Return the part of this name that its first reader had in the old bundle."""
        name = self.names[part.readers[0]]
        found = self.bundle.parts_of(name).get(part.name) if name in self.bundle.manifest.tasks else None
        return found if found is not None and _fits(part, found) else None

    def _take_digests(self, name: str, tasks: Tasks) -> None:
        digests = self.entries[name].digests
        self.found.digests.setdefault(name, {}).update({task: digests[self.names[task]] for task in tasks})


def _fits(part: Part, place: StoredTensor) -> bool:
    return (part.array.dtype, part.array.shape) == (place.dtype, place.shape)
