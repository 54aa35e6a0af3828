"""Applies what an adapter does to one tensor of its base: add a product of two thin factors, or multiply by a vector.
Numpy.

A product is summed in float64, term by term, and rounded to float32 once. So its bits depend neither on the range that
is asked for nor on the machine, and a plan's digests hold wherever its bundle is merged. No library's matrix product
guarantees that.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.tensor import StoredTensor

# The number of elements that are computed at once, so that sum and term lie in the L2 cache together. A rank-16 product
# of 2^18 elements takes 4.5 ms this way and 6.4 ms untiled; in float32 it would take 2.3 ms, but be off by several
# roundings (one core, numpy 2.4).
TILE_ELEMENTS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankChange:
    """θ + scale · left · right, for a tensor viewed as [first axis, the rest]."""

    left: "StoredTensor"
    """Shape [m, r]. A transposed factor has strides."""
    right: "StoredTensor"
    """Shape [r, n]."""
    scale: float

    @property
    def factors(self) -> tuple["StoredTensor", ...]:
        return (self.left, self.right)

    @property
    def rank(self) -> int:
        return self.left.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """θ · vector, along one axis."""

    vector: "StoredTensor"
    """Shape [1, length of the axis]."""
    axis: int
    """The axis, 0 or 1."""

    @property
    def factors(self) -> tuple["StoredTensor", ...]:
        return (self.vector,)


Change = LowRankChange | Scaled


def add_product(
    values: np.ndarray, start: int, columns: int, left: np.ndarray, right: np.ndarray, scale: float
) -> None:
    """Add the product to elements [start, start + len) of a matrix with `columns` columns, in place.

    values: float32 or float64, one axis; left: float64 [rows of the range, r]; right: float64 [r, columns].
    """
    first_row = start // columns
    for low, high in _rectangles(start, start + len(values), columns):
        rows = slice(low // columns - first_row, -(-high // columns) - first_row)
        at = slice(low % columns, low % columns + (high - low) // (rows.stop - rows.start))
        total = left[rows, 0, None] * right[0, at]
        term = np.empty_like(total)
        for k in range(1, len(right)):
            np.multiply(left[rows, k, None], right[k, at], out=term)
            np.add(total, term, out=total)
        np.multiply(total, scale, out=total)
        with np.errstate(over="ignore", invalid="ignore"):  # non-finite values are reported when they are read
            values[low - start : high - start] += total.reshape(-1).astype(np.float32)


def multiply(values: np.ndarray, start: int, columns: int, vector: np.ndarray, axis: int) -> None:
    """Multiply in place, like `add_product`. vector: float32, the whole axis; on axis 1, each of its elements covers
    columns / len(vector) columns."""
    place = np.arange(start, start + len(values))
    where = place // columns if axis == 0 else place % columns // (columns // len(vector))
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(values, vector[where], out=values)


def _rectangles(start: int, stop: int, columns: int) -> list[tuple[int, int]]:
    """Split a range into ranges that are whole rows or lie within one row, each with at most TILE_ELEMENTS elements."""
    found = []
    while start < stop:
        row_end = (start // columns + 1) * columns
        if start % columns or stop < row_end or columns > TILE_ELEMENTS:
            end = min(stop, row_end, start + TILE_ELEMENTS)
        else:
            end = start + max(1, min((stop - start) // columns, TILE_ELEMENTS // columns)) * columns
        found.append((start, end))
        start = end
    return found
