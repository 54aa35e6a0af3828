"""Reads the tasks of bundles that are never written: the weights are bit for bit those of `merge` and a view.

The engine writes parts to memory, and the reader of bundles decodes them from there, as `merge` and a view do.
The key of a part is what determines its bits: the tensor, its group and method, and the cast. A part is made once for
all layouts that store it, and kept until `keep_only` drops it. Copies that are not cast stay mapped in the source's
file; their digest is compared with the plan's before their first use.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from flexmerge_cli.allocation.allocation import Tasks, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.allocation.restricted import restricted
from flexmerge_cli.allocation.storage import Part, Storage
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.materialise import materialise
from flexmerge_cli.engine.output import MemoryOutput
from flexmerge_cli.engine.sources import BASE, Sources
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.models import lies_as_it_is
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import Manifest

Key = Hashable


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of the parts and tasks of one layout."""

    part: dict[Part, Key]
    tensor: dict[tuple[str, int], Key]
    """Maps (aligned name, task) to what determines the task's bits of the tensor."""
    copies: set[Part]
    """Parts that may be the unchanged bits of a source."""


@dataclass(slots=True, kw_only=True)
class MemoryBundles:
    """The parts of one plan's layouts in memory. Not thread-safe."""

    sources: Sources
    device: torch.device
    threads: int
    chunk_elements: int = CHUNK_ELEMENTS
    places: dict[Key, Path] = field(default_factory=dict)
    """Maps the key of each part in memory to the path, of no real file, under which readers find it."""
    digests: dict[Key, dict[int, str]] = field(default_factory=dict)
    """Digests of what a reader gets for a tensor, by its key and task."""
    num_made: int = 0
    """The number of parts made so far."""
    _files: dict[Path, np.ndarray] = field(default_factory=dict)
    """Bytes as uint8: mapped sources, and parts by their paths."""
    _sound: set[tuple[str, int]] = field(default_factory=set)
    """(tensor, model) pairs whose source has been compared with the plan."""
    _last: tuple[BundleLayout, _Keys] | None = None

    def identity(self, layout: BundleLayout, task: int) -> Key:
        """Return a key that is equal for two layouts of one plan only if the task's weights are equal. Makes
        nothing."""
        tensors = self._keys(layout).tensor
        return tuple(tensors[name, task] for name, storage in layout.storages.items() if (name, task) in tensors)

    def keys(self, layout: BundleLayout, tasks: Collection[int]) -> set[Key]:
        """Return the keys of all parts that these tasks read."""
        keys = self._keys(layout).part
        return {keys[part] for part in _parts(layout, tasks)}

    def keep_only(self, keys: Collection[Key]) -> None:
        """Drop all other parts and release their memory."""
        for key in [key for key in self.places if key not in keys]:
            del self._files[self.places.pop(key)]

    @property
    def num_bytes(self) -> int:
        """The memory of all parts, in bytes."""
        return sum(self._files[place].size for place in self.places.values())

    def needed(self, layouts: Sequence[BundleLayout], tasks: Collection[int]) -> list[set[Key]]:
        """Return the keys of the parts that each layout and those after it read, for these tasks."""
        found = [self.keys(layout, tasks) for layout in layouts]
        for place in reversed(range(len(found) - 1)):
            found[place] |= found[place + 1]
        return found

    def most_bytes(self, layouts: Sequence[BundleLayout], tasks: Collection[int]) -> int:
        """Return the most memory that parts take, in bytes, if these layouts are read one after another."""
        made: dict[Key, int] = {}
        most = 0
        for layout, needed in zip(layouts, self.needed(layouts, tasks)):
            keys = self._keys(layout)
            for part in _parts(layout, tasks):
                if self._copied(layout, part, keys) is None:
                    made[keys.part[part]] = part.num_bytes
            made = {key: size for key, size in made.items() if key in needed}
            most = max(most, sum(made.values()))
        return most

    def bundle(self, layout: BundleLayout, tasks: Collection[int]) -> Bundle:
        """Return the bundle that `Bundle.open` would give for what `merge` would write, for these tasks.

        Makes missing parts. The bundle keeps its parts alive. Raises DataError like `merge`.
        """
        keys = self._keys(layout)
        missing = [part for part in _parts(layout, tasks) if not self._is_here(layout, part, keys)]
        if missing:
            self._make(layout, missing, keys)
        parts: dict[str, dict[str, StoredTensor]] = {file.path: {} for file in layout.files}
        for file in layout.files:
            for part in file.parts:
                if any(reader in tasks for reader in part.readers):
                    parts[file.path][part.name] = self._stored(layout, part, keys)
        manifest = Manifest.model_validate_json(layout.manifest(Measured(digests=self._digests(layout, tasks, keys))))
        return Bundle(path=Path("memory"), manifest=manifest, parts=parts, memory=self._files)

    # Keys of parts

    def _keys(self, layout: BundleLayout) -> _Keys:
        if self._last is None or self._last[0] is not layout:
            self._last = layout, _keys_of(layout)
        return self._last[1]

    # Finding parts

    def _is_here(self, layout: BundleLayout, part: Part, keys: _Keys) -> bool:
        return keys.part[part] in self.places or self._copied(layout, part, keys) is not None

    def _copied(self, layout: BundleLayout, part: Part, keys: _Keys) -> tuple[StoredTensor, int] | None:
        """Return the source that holds exactly these bytes, and the model that it belongs to."""
        if part not in keys.copies:
            return None
        model = BASE if part.array.role == "base" else layout.plan.tensor(part.tensor).same[part.readers[0]]
        source = (self.sources.base if model == BASE else self.sources.tasks[model]).get(part.tensor)
        fits = source is not None and (source.dtype, source.shape) == (part.array.dtype, part.array.shape)
        return (source, model) if source is not None and fits and lies_as_it_is(source) else None

    def _stored(self, layout: BundleLayout, part: Part, keys: _Keys) -> StoredTensor:
        copied = self._copied(layout, part, keys)
        if copied is not None:
            self._check(layout, part.tensor, *copied)
            return replace(copied[0], name=part.name)
        place = self.places[keys.part[part]]
        return StoredTensor(name=part.name, dtype=part.array.dtype, shape=part.array.shape, path=place, offset=0)

    def _check(self, layout: BundleLayout, tensor: str, source: StoredTensor, model: int) -> None:
        if (tensor, model) in self._sound:
            return
        record = layout.plan.tensor(tensor)
        expected = record.base_digest if model == BASE else record.digests[model]
        if source.path not in self._files:
            self._files[source.path] = np.memmap(source.path, np.uint8, mode="c")
        data = np.asarray(self._files[source.path][source.offset : source.offset + source.num_bytes])
        if data.size != source.num_bytes or digest_bytes(data) != expected:
            raise DataError(
                f"{self.sources.describe[model]} has changed since the plan: `{source.name}` of {source.path}",
                hint="make the plan again",
            )
        self._sound.add((tensor, model))

    def _digests(self, layout: BundleLayout, tasks: Collection[int], keys: _Keys) -> dict[str, dict[int, str]]:
        """Map each aligned name to the digests by task."""
        found: dict[str, dict[int, str]] = {}
        for name, storage in layout.storages.items():
            tensor = storage.tensor
            if tensor.class_ is TensorClass.TIED:
                target = found.get(tensor.reason, {})
                found[name] = {task: target[task] for task in tensor.present if task in target}
                continue
            found[name] = {
                task: self.digests.get(keys.tensor[name, task], {}).get(task) or str(tensor.digests[task])
                for task in tensor.present
                if task in tasks
            }
        return found

    # Making parts

    def _make(self, layout: BundleLayout, missing: list[Part], keys: _Keys) -> None:
        """Make the groups that store missing parts, over all tensors of their units, in one run of the engine."""
        some = restricted(layout, missing)
        output = MemoryOutput(missing)
        measured = materialise(
            some, self.sources, output, device=self.device, threads=self.threads, chunk_elements=self.chunk_elements
        )
        for part, array in output.arrays.items():
            self.num_made += 1
            place = self.places[keys.part[part]] = Path("memory") / str(self.num_made)
            self._files[place] = array
        for name, storage in some.storages.items():
            readers = {task for group in storage.groups for task in group.tasks}
            readers |= {task for part in storage.parts if part.array.role == "dense" for task in part.readers}
            for task in readers:
                self.digests.setdefault(keys.tensor[name, task], {})[task] = measured.digests[name][task]


def _keys_of(layout: BundleLayout) -> _Keys:
    cast, found = layout.allocation.dtype, _Keys({}, {}, set())
    in_units = {name: unit for unit in layout.allocation.units for name in unit.tensors}
    for name, storage in layout.storages.items():
        unit = in_units.get(name)
        if unit is None:
            found.part.update({part: ("whole", part.name, part.readers, cast) for part in storage.parts})
            found.copies.update(part for part in storage.parts if part.array.role == "dense")
            found.tensor.update({(name, task): ("whole", name, cast) for task in storage.tensor.present})
        else:
            _add_unit_tensor(found, layout, unit, storage)
    for part in (part for file in layout.files for part in file.parts if part.of_unit):
        unit = next(unit for unit in layout.allocation.units if unit.name == part.tensor)
        group = next(group for group in unit.groups if part.task in group.tasks)
        assert group.method is not None
        found.part[part] = (part.array.role, part.task, _group_key(layout, unit, group.tasks, group.method, None))
    return found


def _add_unit_tensor(found: _Keys, layout: BundleLayout, unit: Unit, storage: Storage) -> None:
    name, cast = storage.tensor.name, layout.allocation.dtype

    def copy_key(task: int) -> Key:
        return "copy", name, storage.tensor.same[task], cast

    for group in storage.groups:
        for task in group.tasks:
            found.tensor[name, task] = copy_key(task)
        if group.method is not None:
            key = _group_key(layout, unit, group.tasks, group.method, group.bits)
            found.tensor.update({(name, task): (name, key) for task in group.coded_tasks})
        for part in group.parts:
            if part.array.role == "base":
                found.part[part] = "base", name, cast
                found.copies.add(part)
            elif group.has_copy(part):
                found.part[part] = copy_key(part.readers[0])
                found.copies.add(part)
            else:
                found.part[part] = name, part.array.role, part.task, key


def _group_key(layout: BundleLayout, unit: Unit, tasks: Tasks, method: int, bits: object) -> Key:
    return unit.name, unit.tensors, tasks, layout.allocation.methods[method], bits, layout.allocation.dtype


def _parts(layout: BundleLayout, tasks: Collection[int]) -> Iterable[Part]:
    return (part for file in layout.files for part in file.parts if any(reader in tasks for reader in part.readers))
