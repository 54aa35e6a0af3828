"""Models to be scored: a bundle's task, or a checkpoint, as `TaskModel`s. Weights are mapped, and read when used."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.dtypes import NUMPY, TO_TORCH
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.evaluation.scored import TaskModel, weights_digest

if TYPE_CHECKING:
    from torch import Tensor


class StoredWeights(Mapping[str, "Tensor"]):
    """Own name -> tensor on the mapped file. Written to by nobody: what is written the file does not get."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, np.ndarray] = {}

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        stored = self.tensors[name]
        array = self.array(stored)
        if array.size == 0:
            return torch.empty(stored.shape, dtype=getattr(torch, TO_TORCH[stored.dtype]))
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return flat.view(getattr(torch, TO_TORCH[stored.dtype])).reshape(stored.shape)

    def array(self, stored: StoredTensor) -> np.ndarray:
        """Its bits (`NUMPY[dtype]`), in its shape; strided where the file has it so."""
        if stored.path not in self._maps:
            self._maps[stored.path] = np.memmap(stored.path, np.uint8, mode="c")
        mapped = self._maps[stored.path][stored.offset :]
        if stored.strides is None:
            return np.asarray(mapped[: stored.num_bytes]).view(NUMPY[stored.dtype]).reshape(stored.shape)
        steps = [stride * stored.item_bytes for stride in stored.strides]
        first = np.asarray(mapped[: stored.item_bytes]).view(NUMPY[stored.dtype])
        return np.lib.stride_tricks.as_strided(first, stored.shape, steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def bundle_model(bundle: Bundle, task: str) -> TaskModel:
    """A task of a bundle, through its route; the digest is of the tensors that it gives."""
    from flexmerge_cli.bundle.view import View

    names = bundle.manifest.tasks[task].names
    tensors = [tensor for tensor in bundle.manifest.tensors if task in tensor.digests]
    return TaskModel(
        task=task,
        weights=View(bundle, task),
        folder=bundle.path / "tasks" / task,
        digest=weights_digest(
            (names.get(t.name, t.name), t.dtype_of(task), t.shape_of(task), t.digests[task]) for t in tensors
        ),
        num_bytes=sum(bundle.manifest.files[file].bytes for file in bundle.route(task)),
    )


def source_model(task: str, source: str, *, relative_to: Path | None = None) -> TaskModel:
    """A checkpoint as it is. Reads its weights once, for their digest. Raises SourceError, DataError."""
    checkpoint = open_checkpoint(source, relative_to=relative_to)
    fetch(checkpoint.remote.values(), ONLINE)
    return checkpoint_model(task, checkpoint)


def checkpoint_model(task: str, checkpoint: Checkpoint) -> TaskModel:
    weights = StoredWeights(checkpoint.tensors)
    digests = {
        name: digest_bytes(np.ascontiguousarray(weights.array(stored)).reshape(-1).view(np.uint8))
        for name, stored in checkpoint.tensors.items()
    }
    return TaskModel(
        task=task,
        weights=weights,
        folder=checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent,
        digest=weights_digest((name, t.dtype, t.shape, digests[name]) for name, t in checkpoint.tensors.items()),
        num_bytes=checkpoint.num_bytes,
    )
