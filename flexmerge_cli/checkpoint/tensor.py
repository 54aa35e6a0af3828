"""One tensor of a checkpoint: what it is and where its bytes lie, or what it is computed from. No I/O."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.change import Change
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.rows import Runs, num_rows

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.stream import StreamedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor on disk."""

    name: str
    """As in its own file."""
    dtype: str
    """As safetensors spells it, a key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte in the file."""
    strides: tuple[int, ...] | None = None
    """In elements; None if row-major without gaps, as everything in a safetensors file is."""
    stream: "StreamedFile | None" = field(default=None, compare=False, repr=False)
    """Where its bytes are read from instead of from `path`."""
    selection: "Selection | None" = None
    """Of rows that were picked out of another tensor, which the other fields but `shape` are of."""
    change: Change | None = None
    """What is done to these bytes on reading: the tensor of a model that an adapter makes."""

    fill: float | None = None
    """What every element is, of a tensor that lies nowhere: the base of a pool of adapters."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that reading takes."""
        change = self.selection.of.change if self.selection is not None else self.change
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
        """Whether its bytes lie in the file one after another, from `offset` on."""
        return self.strides is None and self.selection is None and self.change is None and self.fill is None

    def take(self, runs: Runs) -> "StoredTensor":
        """Rows of axis 0, in this order, as a tensor of their own. runs: as rows.py has them."""
        shape = (num_rows(runs), *self.shape[1:])
        if self.is_contiguous and len(runs) <= 1:
            first = runs[0][0] if runs else 0
            return replace(self, shape=shape, offset=self.offset + first * math.prod(shape[1:]) * self.item_bytes)
        ends = tuple(accumulate(count for _, count in runs))
        return replace(self, shape=shape, change=None, selection=Selection(of=self, runs=runs, ends=ends))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Rows of another tensor, in any order."""

    of: StoredTensor
    runs: Runs
    ends: tuple[int, ...]
    """Rows up to the end of each run."""

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Elements [start, stop) of the picked rows, as ranges of elements of the other tensor, in order.

        What lies behind the last is left out.
        """
        row = max(1, math.prod(self.of.shape[1:]))
        stop = min(stop, self.ends[-1] * row if self.ends else 0)
        place = bisect_right(self.ends, start // row)
        while start < stop:
            first, count = self.runs[place]
            run_start = (self.ends[place] - count) * row
            high = min(stop, self.ends[place] * row)
            yield first * row + start - run_start, first * row + high - run_start
            start, place = high, place + 1
