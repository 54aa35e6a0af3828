"""Defines residual coders, and how a tensor is viewed as a matrix. No torch, no files, no names.

A coder turns a float32 matrix [m, n] into parts, arrays whose dtypes and shapes follow from m, n and the model's dtype
alone: a bundle is priced without weights. The caller knows what the matrix is: a residual, a centre or a copy.

    low_bit.py    one scale a row, codes of b bits     scope row (levels=empirical: tensor)
    bitdelta.py   signs, one scale a tensor or a row   scope tensor or row
    low_rank.py   two factors                          scope tensor
    sparse.py     largest elements and positions       scope tensor (select=row: row)

Reading needs numpy alone; encoders take torch tensors on any device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.later import Tensor

Matrix = tuple[int, int]
"""(m, n): the rows and columns of a view."""

Rows = tuple[int, int]
"""Rows [first, stop) of a view."""

Parts = Mapping[str, np.ndarray]
"""Maps each role to bits, in the numpy type of `checkpoint.dtypes.NUMPY`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedPart:
    """One array that is stored for one tensor and task, or for a centre."""

    role: str
    """`scale`, `codes`, …: what follows the `@` in its name."""
    dtype: str
    """The dtype as safetensors spells it."""
    shape: tuple[int, ...]
    by_row: bool
    """Axis 0 is the view's rows, or eight, four or two of them each; whole ones need no more than their own."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class MatrixView(StrEnum):
    """How a tensor is viewed as a matrix. Always in C order, so that elements keep their flat index."""

    FIRST_AXIS = "first_axis"
    """(first axis, the rest); tensors of 0 or 1 axes are one row."""
    SQUEEZED = "squeezed"
    """Like the above, without leading axes of size 1: [1, 17, 64] is 17 rows, [1, 1, 64] is one. Used by `auto`."""
    LAST_AXIS = "last_axis"
    """(the rest, last axis): every run of the last axis is a row."""

    def matrix(self, shape: tuple[int, ...]) -> Matrix:
        """Return (m, n) of a tensor; scalars are (1, 1)."""
        shape = self._axes(shape)
        if len(shape) < 2:
            return 1, math.prod(shape)
        if self is MatrixView.LAST_AXIS:
            return math.prod(shape[:-1]), shape[-1]
        return shape[0], math.prod(shape[1:])

    def is_vector(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor is a single row by nature: it has fewer than two axes."""
        return len(self._axes(shape)) < 2

    def _axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self is not MatrixView.SQUEEZED:
            return shape
        leading = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
        return shape[leading:]


class Coder(Protocol):
    """A way to store a matrix in few bytes. Frozen, compared by value."""

    @property
    def scope(self) -> Literal["row", "tensor"]:
        """`row`: no row depends on another, so chunks of whole rows may be encoded one by one."""

    def parts(self, shape: Matrix, dtype: str) -> tuple[CodedPart, ...]:
        """Return the stored parts, in order. dtype: the model's."""

    def workspace(self, shape: Matrix) -> int:
        """Return the most bytes that encoding or decoding this many rows and columns takes beside the matrix itself."""

    def encode(self, matrix: Tensor, dtype: str) -> dict[str, np.ndarray]:
        """Encode float32 [m, n] into every part. With scope `row`: any chunk of whole rows, and every part is
        by_row."""

    def decode(self, parts: Parts, shape: Matrix, dtype: str, rows: Rows | None = None) -> np.ndarray:
        """Decode to float32 [rows, n]. shape is the whole view's; by_row parts hold the requested rows, others
        everything.

        rows: None means all. Raises ValueError if the content of a part is impossible.
        """


def num_bytes(parts: tuple[CodedPart, ...]) -> int:
    """Return the size of the parts in bytes, without headers."""
    return sum(part.num_bytes for part in parts)
