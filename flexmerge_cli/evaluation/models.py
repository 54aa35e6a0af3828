"""Makes the models to be scored, `TaskModel`s, from a bundle's task or a checkpoint. Weights are mapped and lazy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.reader import Reader, strided
from flexmerge_cli.checkpoint.rows import Runs
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.scored import DigestLine, TaskModel, places_line, weights_digest
from flexmerge_cli.family.classes import TensorClass, absent_alias
from flexmerge_cli.family.family import ROWS_SUFFIX
from flexmerge_cli.family.split import Split, whole_of
from flexmerge_cli.stored.joined import join

if TYPE_CHECKING:
    from torch import Tensor

    from flexmerge_cli.bundle.view import View


def lies_as_it_is(stored: StoredTensor) -> bool:
    """Return whether its bytes are contiguous in its file: not computed, picked out, filled in, or streamed."""
    special = (stored.strides, stored.change, stored.selection, stored.fill, stored.stream)
    return all(one is None for one in special) and not stored.pieces


class StoredWeights(Mapping[str, "Tensor"]):
    """Maps own names to tensors in the mapped file, copy-on-write, so that writes never reach the file.

    joined: maps the own name of a tensor joined from rows (stored/joined.py) to the task's other rows, the places of
    the common rows, and the number of all rows. split: maps the own name of a split tensor (family/split.py) to its
    parts and the axis along which they are joined.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        joined: Mapping[str, tuple[StoredTensor | None, Runs, int]] | None = None,
        split: Mapping[str, tuple[Sequence[StoredTensor], int]] | None = None,
    ) -> None:
        self.tensors, self.joined, self.split = tensors, joined or {}, split or {}
        self._maps: dict[Path, np.ndarray] = {}

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self.split:
            return self.tensor(self.tensors[name], self.joined.get(name))
        parts, dim = self.split[name]
        return _joined([partial(self.tensor, part) for part in parts], dim)

    def tensor(self, stored: StoredTensor, joined: tuple[StoredTensor | None, Runs, int] | None = None) -> "Tensor":
        from flexmerge_cli.engine.device import as_tensor

        array = self.array(stored)
        if joined is not None:
            own, common, rows = joined
            array = join(array, self.array(own) if own is not None else None, common, rows)
        return as_tensor(np.ascontiguousarray(array).reshape(-1).view(np.uint8), stored.dtype).reshape(array.shape)

    def array(self, stored: StoredTensor) -> np.ndarray:
        """Return its bits (`NUMPY[dtype]`), in its shape; strided if the file stores it so."""
        if stored.selection is not None:
            whole = self.array(stored.selection.of).reshape(-1, stored.selection.row)
            picked = [whole[first : first + count] for first, count in stored.selection.runs]
            return np.concatenate(picked).reshape(stored.shape)
        if not lies_as_it_is(stored) and stored.strides is None:
            with Reader() as reader:
                made = reader.read(stored, 0, stored.num_elements, np.empty(stored.num_bytes, np.uint8))
            return made.view(NUMPY[stored.dtype]).reshape(stored.shape)
        if stored.path not in self._maps:
            self._maps[stored.path] = np.memmap(stored.path, np.uint8, mode="c")
        return strided(stored, self._maps[stored.path])

    def __iter__(self) -> Iterator[str]:
        return iter([*self.tensors, *self.split])

    def __len__(self) -> int:
        return len(self.tensors) + len(self.split)


def bundle_model(bundle: Bundle, task: str) -> TaskModel:
    """Make the model of a bundle's task, through its route. Raises IntegrityError if a file differs from the manifest.

    The digest of the model comes from the manifest and would hide damaged files, so every file of the route is checked
    first. A bundle in memory has no files.
    """
    from flexmerge_cli.bundle.view import View

    bundle.check_files(task)
    names = bundle.manifest.tasks[task].names
    lines = [
        (names.get(t.name, t.name), t.dtype_of(task), t.shape_of(task), t.digests[task])
        for t in bundle.manifest.stored
        if task in t.digests
    ]
    for name in (tensor.name for tensor in bundle.manifest.tensors):
        if (rows := bundle.manifest.rows_of(name, task)) is not None:
            lines.append(places_line(names.get(name, name), rows.rows, rows.common))
    lines += _expert_lines(bundle, task)
    lines += [(path, "", (), bundle.manifest.files[path].sha256) for path in bundle.manifest.added_files(task)]
    return TaskModel(
        task=task,
        weights=View(bundle, task),
        folder=bundle.config_folder(task),
        digest=weights_digest(lines),
        num_bytes=sum(bundle.manifest.files[file].bytes for file in bundle.route(task)),
    )


def _expert_lines(bundle: Bundle, task: str) -> list[DigestLine]:
    """Return what determines mixtures beside the task's own experts: the method, and the models of the other ones."""
    manifest, found = bundle.manifest, list[DigestLine]()
    for unit in manifest.units if manifest.has_experts(task) else ():
        group = next(group for group in unit.groups if task in group.tasks)
        if group.method is not None:
            method = manifest.methods[group.method].model_dump_json()
            models = [manifest.base, *(manifest.tasks[one].fingerprint for one in group.tasks)]
            found.append((f"{unit.name}@experts", method, (), f"{models} {manifest.calibration}"))
    return found


def base_model(bundle: Bundle, task: str, base: Checkpoint, digests: dict[str, str]) -> TaskModel:
    """Make the base a model of the task: its values of all tensors that merge, and the task's heads from the bundle.

    digests: maps the aligned names of the base's tensors to known digests; new ones are added.
    Raises DataError if the base lacks what the bundle's tasks share, IntegrityError if a file of the bundle differs
    from its manifest.
    """
    from flexmerge_cli.bundle.view import View

    bundle.check_files(task)
    names = bundle.manifest.tasks[task].names
    weights, view = StoredWeights(base.tensors), View(bundle, task)
    found: dict[str, Callable[[], Tensor]] = {}
    lines, lacking = [], []
    entries = {tensor.name: tensor for tensor in bundle.manifest.tensors}
    own_of = {tensor.name: tensor for tensor in bundle.manifest.rows}
    splits = {name: split for split in bundle.manifest.splits for name in split.names}
    for entry in entries.values():
        if task not in entry.digests:
            continue
        own, tensor = names.get(entry.name, entry.name), entries[entry.of] if entry.of is not None else entry
        split = splits.get(tensor.name)
        whole = tensor.name if split is None else split.tensor
        stored = base.tensors.get(whole) or absent_alias(base.config, base.tensors, whole)
        of_base, rows = (bundle.manifest.rows_of(tensor.name, model) for model in (None, task))
        if of_base is not None and stored is not None and stored.shape[:1] == (of_base.rows,):
            stored = stored.take(of_base.common)
        if split is not None and stored is not None:
            is_whole = stored.shape == split.whole(tensor.shape_of(task))
            stored = split.take(stored, tensor.name) if is_whole else None
        if tensor.class_ is not TensorClass.MERGEABLE:
            found[own] = partial(view.__getitem__, own) if split is None else partial(_part, view, own, split)
            lines.append((own, tensor.dtype_of(task), tensor.shape_of(task), tensor.digests[task]))
        elif stored is None or stored.shape != tensor.shape_of(task):
            lacking.append(tensor.name)
        else:
            if tensor.name not in digests:
                digests[tensor.name] = _digest(weights, stored)
            found[own] = partial(weights.tensor, stored)
            if rows is not None:
                found[own] = partial(_with_rows, found[own], partial(view.__getitem__, own), rows.common)
                lines.append(places_line(own, rows.rows, rows.common))
                own_rows = own_of.get(f"{tensor.name}{ROWS_SUFFIX}")
                if own_rows is not None and task in own_rows.digests:
                    form = own_rows.dtype_of(task), own_rows.shape_of(task)
                    lines.append((f"{own}{ROWS_SUFFIX}", *form, own_rows.digests[task]))
            lines.append((own, stored.dtype, stored.shape, digests[tensor.name]))
    if lacking:
        raise DataError(
            f"{base.path} is not the base of {bundle.path}: it has no {', '.join(lacking[:5])}", hint="check `base`"
        )
    return TaskModel(
        task=task, weights=Lazy(_wholes(found, bundle, task)), folder=bundle.config_folder(task),
        digest=weights_digest(lines),
        num_bytes=base.num_bytes,
    )  # fmt: skip


def _part(view: "View", own: str, split: Split) -> "Tensor":
    """Return a part of a task's tensor, by its own name."""
    whole, place = whole_of(own)
    assert place is not None
    return view[whole].chunk(split.parts, split.dim)[place]


def _wholes(
    found: "Mapping[str, Callable[[], Tensor]]", bundle: Bundle, task: str
) -> "dict[str, Callable[[], Tensor]]":
    """Return the same tensors, with split ones whole."""
    left, names = dict(found), bundle.manifest.tasks[task].names
    for split in bundle.manifest.splits:
        own = [names.get(name, name) for name in split.names]
        if own[0] in left:
            left[whole_of(own[0])[0]] = partial(_joined, [left.pop(name) for name in own], split.dim)
    return left


def _joined(parts: "Sequence[Callable[[], Tensor]]", dim: int) -> "Tensor":
    import torch

    return torch.cat([part() for part in parts], dim)


def _with_rows(common: "Callable[[], Tensor]", whole: "Callable[[], Tensor]", places: Runs) -> "Tensor":
    """Return the task's tensor, with other values in the rows that all models share."""
    value, rows, position = whole().clone(), common(), 0
    for first, count in places:
        value[first : first + count] = rows[position : position + count]
        position += count
    return value


class Lazy(Mapping[str, "Tensor"]):
    """Maps names to tensors, which functions make on demand."""

    def __init__(self, made: "Mapping[str, Callable[[], Tensor]]") -> None:
        self.made = made

    def __getitem__(self, name: str) -> "Tensor":
        return self.made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def fetched(checkpoint: Checkpoint, access: Access = ONLINE) -> Checkpoint:
    """Return the same checkpoint, with its weight files downloaded to this disk."""
    fetch(checkpoint.remote.values(), access)
    return checkpoint


def _digest(weights: StoredWeights, stored: StoredTensor) -> str:
    return digest_bytes(np.ascontiguousarray(weights.array(stored)).reshape(-1).view(np.uint8))


def checkpoint_model(task: str, checkpoint: Checkpoint) -> TaskModel:
    weights = StoredWeights(checkpoint.tensors)
    digests = {name: _digest(weights, stored) for name, stored in checkpoint.tensors.items()}
    return TaskModel(
        task=task,
        weights=weights,
        folder=checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent,
        digest=weights_digest((name, t.dtype, t.shape, digests[name]) for name, t in checkpoint.tensors.items()),
        num_bytes=checkpoint.num_bytes,
    )
