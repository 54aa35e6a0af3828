"""Holds what the writers of all stored forms share: writing parts, digests and errors of one range, and checking
values.

Every value is decoded again as a reader decodes it, so that digests and distances describe what was written.
"""

from dataclasses import dataclass, field

import numpy as np

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup, effective_dtype
from flexmerge_cli.checkpoint.digest import RangeDigest, digest_range
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, promote
from flexmerge_cli.engine.device import name_of, to_bytes
from flexmerge_cli.engine.output import Sink
from flexmerge_cli.engine.runs import squares
from flexmerge_cli.engine.spans import tiles
from flexmerge_cli.engine.work import Raw, Worker
from flexmerge_cli.errors import DataError
from flexmerge_cli.later import Tensor, torch


@dataclass(slots=True)
class Piece:
    """What one range adds to the run."""

    written: list[tuple[Part, int, np.ndarray]] = field(default_factory=list)
    """Tuples (part, first byte, bytes)."""
    sources: dict[int, RangeDigest] = field(default_factory=dict)
    """The digest of what was read, by task, or BASE."""
    decoded: dict[int, RangeDigest] = field(default_factory=dict)
    """The digest of what a reader will get, by task; tasks that keep the bits of their source are left out."""
    errors: dict[int, np.ndarray] = field(default_factory=dict)
    """Σ (θ̂ - θ)² of each run, by task."""


class Encoder:
    """Gives writers the worker, and collects what they write."""

    def __init__(self, worker: Worker, output: Sink) -> None:
        self.worker, self.output = worker, output
        self.plan, self.cast = worker.plan, worker.layout.allocation.dtype
        self.unit_of = {name: unit.name for unit in worker.layout.allocation.units for name in unit.tensors}
        self.of_units: dict[tuple[str, Tasks], np.ndarray] = {}
        """The values that each task stores once for all tensors of a unit, [k, …], by (unit, tasks of a group)."""

    def decoded(self, task: int, value: Tensor, dtype: str, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        """Record the digest of what a task's reader will get. Raises DataError if a value is not finite."""
        data = to_bytes(self.finite(value, group, raw))
        piece.decoded[task] = digest_of(data, raw, dtype)

    def dtype_of(self, tensor: str, group: StoredGroup) -> str:
        """Return the dtype in which a group's one value of a tensor is stored."""
        return promote(self.dtypes(self.worker.layout.storages[tensor], group))

    def dtypes(self, storage: Storage, group: StoredGroup) -> list[str]:
        """Return the dtype that each task of a group gets."""
        return [effective_dtype(storage.tensor.dtype_of(task), self.cast) for task in group.tasks]

    def tiles(self, group: StoredGroup, raw: Raw, whole: Tensor | None) -> list[tuple[int, int]]:
        """List the parts [low, high) of a range that are merged one after another."""
        if whole is not None:
            return [(0, raw.span.stop - raw.span.start)]
        return self.worker.tiles(self.worker.chain(group), raw.span)

    def finite(self, values: Tensor, group: StoredGroup, raw: Raw) -> Tensor:
        """Return the same values. Raises DataError like `check_finite`."""
        self.check_finite(values, group, raw)
        return values

    def check_finite(self, values: Tensor, group: StoredGroup, raw: Raw) -> None:
        """Raise DataError that names the first value that is not finite, and its place."""
        if all_finite(values):
            return
        assert group.method is not None
        index = raw.span.start + int((~torch.isfinite(values)).nonzero()[0, 0])
        place = [int(axis) for axis in np.unravel_index(index, self.plan.tensor(raw.span.tensor).shape)]
        names = ", ".join(self.plan.tasks[task].name for task in group.tasks)
        method = self.worker.layout.calls[group.method].method.name
        raise DataError(
            f"`{method}` gives a value that is not finite as {name_of(values.dtype)} in "
            f"`{raw.span.tensor}` at {place}, tasks {names}",
            hint="use a smaller scale, or a wider dtype",
        )

    def emit(self, part: Part, start: int, values: Tensor, piece: Piece) -> np.ndarray:
        """Write a part's elements from `start` on, and return their bytes."""
        data = to_bytes(values)
        self.emit_bytes(part, start * ITEM_BYTES[part.array.dtype], data, piece)
        return data

    def emit_bytes(self, part: Part, start_byte: int, data: np.ndarray, piece: Piece) -> None:
        if data.size:  # a private tensor may end before another task's
            self.output.write(part, start_byte, data)
            piece.written.append((part, start_byte, data))


def all_finite(values: Tensor) -> bool:
    # A sum is finite only if every term is, except that huge terms may overflow; then the slow test decides.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def array(group: StoredGroup, role: str) -> Part:
    return next(part for part in group.parts if part.array.role == role)


def digest_of(data: np.ndarray, raw: Raw, dtype: str) -> RangeDigest:
    """Return the digest of a range as it is in another dtype."""
    return digest_range(data, raw.span.start * ITEM_BYTES[dtype], last=raw.span.last)


def room_for_errors(num_tasks: int, raw: Raw) -> np.ndarray:
    """Return an array for the errors of a span: one for each task and run."""
    return np.zeros((num_tasks, -(-(raw.span.stop - raw.span.start) // raw.span.run)))


def lost_squares(lost: Tensor, run: int) -> np.ndarray:
    """Return Σ x² of each run, computed tile by tile."""
    return np.concatenate([squares(lost[None, low:high], run)[0] for low, high in tiles(len(lost), run)])
