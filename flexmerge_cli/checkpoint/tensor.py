"""Describes one tensor of a checkpoint: its form, and where its bytes lie or how it is computed. No I/O."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.change import Change
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.rows import Runs, every, num_rows

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.stream import StreamedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor on disk."""

    name: str
    """The name in its own file."""
    dtype: str
    """The dtype as safetensors spells it, a key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """The offset of the first byte in the file."""
    strides: tuple[int, ...] | None = None
    """Strides in elements; None if row-major without gaps, as all tensors of safetensors files are."""
    stream: "StreamedFile | None" = field(default=None, compare=False, repr=False)
    """The stream that its bytes are read from, instead of from `path`."""
    selection: "Selection | None" = None
    """What is picked from another tensor. Then all fields except `shape` describe that other tensor."""
    change: Change | None = None
    """The change applied on reading, for a tensor of a model that an adapter makes."""

    fill: float | None = None
    """The value of every element of a tensor that has no bytes."""

    pieces: tuple["StoredTensor", ...] = ()
    """Tensors of one shape and dtype, whose elements follow each other in this one. Then only the fields `name`,
    `dtype` and `shape` count."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that are needed to read it."""
        if self.pieces:
            return tuple(dict.fromkeys(path for piece in self.pieces for path in piece.paths))
        if self.selection is not None:
            return self.selection.of.paths
        change = self.change
        return (self.path, *(factor.path for factor in (change.factors if change is not None else ())))

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.item_bytes

    @property
    def is_contiguous(self) -> bool:
        """Whether its bytes are contiguous in the file, from `offset` on."""
        plain = self.strides is None and self.selection is None and self.change is None and self.fill is None
        return plain and not self.pieces

    def pieces_of(self, start: int, stop: int) -> "Iterator[tuple[StoredTensor, int, int]]":
        """Yield elements [start, stop) as ranges of elements of the pieces, in order."""
        size = self.pieces[0].num_elements
        while start < stop and size:
            piece, inside = divmod(start, size)
            count = min(size - inside, stop - start)
            yield self.pieces[piece], inside, inside + count
            start += count

    def take(self, runs: Runs) -> "StoredTensor":
        """Return the tensor that consists of these rows of axis 0, in this order. runs: as in rows.py."""
        shape = (num_rows(runs), *self.shape[1:])
        if self.is_contiguous and len(runs) <= 1:
            first = runs[0][0] if runs else 0
            return replace(self, shape=shape, offset=self.offset + first * math.prod(shape[1:]) * self.item_bytes)
        return self._picked(shape, runs, math.prod(self.shape[1:]))

    def section(self, axis: int, parts: int, place: int) -> "StoredTensor":
        """Return one of `parts` equal sections of axis 0 or 1, whose length `parts` divides. The result has all axes of
        the tensor."""
        size = self.shape[axis] // parts
        if axis == 0:
            return self.take(((place * size, size),))
        shape = (self.shape[0], size, *self.shape[2:])
        return self._picked(shape, every(self.shape[0], parts, place), math.prod(shape[1:]))

    def _picked(self, shape: tuple[int, ...], runs: Runs, row: int) -> "StoredTensor":
        ends = tuple(accumulate(count for _, count in runs))
        selection = Selection(of=self, runs=runs, ends=ends, row=max(1, row))
        return replace(self, shape=shape, change=None, pieces=(), selection=selection)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Rows of another tensor, in any order, or pieces of its rows."""

    of: StoredTensor
    runs: Runs
    ends: tuple[int, ...]
    """The number of rows up to the end of each run."""
    row: int
    """The number of elements that the runs count as a row; at least 1."""

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield elements [start, stop) of the picked rows as ranges of elements of the other tensor, in order.

        Elements behind the last are omitted.
        """
        row = self.row
        stop = min(stop, self.ends[-1] * row if self.ends else 0)
        place = bisect_right(self.ends, start // row)
        while start < stop:
            first, count = self.runs[place]
            run_start = (self.ends[place] - count) * row
            high = min(stop, self.ends[place] * row)
            yield first * row + start - run_start, first * row + high - run_start
            start, place = high, place + 1
