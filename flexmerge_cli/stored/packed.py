"""Holds a weight in its stored bytes, as terms of a sum, and decodes any rows of it. numpy and loops in C.

It is m rows of n elements: the sum, in float32 and in this order, of the terms that it has,

    dense    elements that are stored as they are
    masked   gamma · unified where the task's mask is set, and nothing or -gamma · unified elsewhere
    codes    up to two arrays of codes: a centre's, a residual's
    factors  the product of two thin matrices
    kept     few elements, by row

rounded once to the dtype of the task. The result of whole rows does not depend on which are decoded together.
"""

from dataclasses import dataclass, field

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.checkpoint.dtypes import NUMPY, from_float32, to_float32
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.residuals.low_bit import LookUp, scaled_levels

# Elements decoded at a time: a few MB, in and out of the cache together.
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements that are stored as they are."""

    bits: np.ndarray
    """One axis, m·n."""
    dtype: str

    def rows(self, rows: np.ndarray, n: int) -> np.ndarray:
        """Return float32 [rows, n], in memory of the caller's own."""
        values = to_float32(self.bits.reshape(-1, n)[rows], self.dtype)
        return values if values.base is None else values.copy()


@dataclass(frozen=True, slots=True)
class Masked:
    """gamma · unified where the mask is set."""

    unified: Elements
    packed: np.ndarray
    """uint8 [⌈m·n/8⌉]."""
    gamma: np.float32
    is_signed: bool = False
    """Whether gamma · unified is subtracted where the mask is not set."""


@dataclass(frozen=True, slots=True)
class KeptElements:
    """The elements of a sparse matrix, in C order."""

    starts: np.ndarray
    """int64 [m + 1]: where each row begins."""
    columns: np.ndarray
    """uint16, or int32 if rows are longer."""
    values: Elements

    @staticmethod
    def index_bytes(matrix: Matrix, count: int) -> int:
        """Return the bytes of everything but the values."""
        return 8 * (matrix[0] + 1) + (2 if matrix[1] <= 1 << 16 else 4) * count

    @staticmethod
    def at(positions: np.ndarray, values: Elements, matrix: Matrix) -> "KeptElements":
        """Index the values. positions: int64, ascending in [0, m·n)."""
        m, n = matrix
        starts = np.searchsorted(positions, np.arange(m + 1) * n)
        return KeptElements(starts, (positions % max(1, n)).astype(np.uint16 if n <= 1 << 16 else np.int32), values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A weight [m, n]. Arrays may lie in a mapped file; nothing in them is checked here."""

    matrix: Matrix
    dtype: str
    dense: Elements | None = None
    masked: Masked | None = None
    codes: tuple[LookUp, ...] = ()
    factors: tuple[Elements, Elements] | None = None
    """Left [m, r] and right [r, n], both one axis."""
    kept: KeptElements | None = None
    loops: native.Rows | None = field(init=False, compare=False, repr=False)
    """The arguments of the loops in C; None if they do not know a dtype. Valid as long as the arrays are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "loops", _native_rows(self))

    @property
    def has_product(self) -> bool:
        """Whether a product with it may be taken as the sum of products with its terms, which decodes no weight."""
        has_loops = native.decoding is not None and self.loops is not None
        return has_loops or not (self.masked or self.codes)

    @property
    def is_in_loops(self) -> bool:
        """Whether the loops in C know all of it."""
        return native.decoding is not None and self.loops is not None and self.factors is None and self.kept is None

    @property
    def address(self) -> int | None:
        """The address of the first array, which tasks that share a centre have in common. None with a mask, which
        chooses between two arrays."""
        if self.masked is not None:
            return None
        first = self.dense.bits if self.dense is not None else self.codes[0].codes if self.codes else None
        return None if first is None else int(first.ctypes.data)

    def decode(self) -> np.ndarray:
        """Decode all elements as bits, one axis."""
        m, n = self.matrix
        out = np.empty(m * n, NUMPY[self.dtype])
        step = max(1, BLOCK_ELEMENTS // max(1, n))
        for first in range(0, m, step):
            self.decode_into(np.arange(first, min(m, first + step)), out[first * n : (first + step) * n])
        return out

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Decode some rows as bits [k, n]. rows: int64 [k], each in [0, m)."""
        out = np.empty((len(rows), self.matrix[1]), NUMPY[self.dtype])
        self.decode_into(rows, out)
        return out

    def decode_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode some rows into contiguous memory of the caller's."""
        if not out.size:
            return
        is_sum = self.factors is not None or self.kept is not None
        direct = None if is_sum else native.TYPES.get(self.dtype)
        if direct is not None and self._native(rows, direct, out):
            return
        n = self.matrix[1]
        values = np.empty((len(rows), n), np.float32)
        if not self._native(rows, native.TYPES["F32"], values):
            values = self._plain(rows)
        if self.factors is not None:
            left, right = (_float64(part) for part in self.factors)
            rank = len(right) // n
            values += (left.reshape(-1, rank)[rows] @ right.reshape(rank, n)).astype(np.float32)
        if self.kept is not None:
            _add_kept(values, rows, self.kept)
        out.reshape(-1)[:] = from_float32(values, self.dtype).reshape(-1)

    def _plain(self, rows: np.ndarray) -> np.ndarray:
        """Compute the sum without factors and kept elements, float32 [k, n]."""
        m, n = self.matrix
        values = None if self.dense is None else self.dense.rows(rows, n)
        if self.masked is not None:
            assert values is not None
            at = rows[:, None] * n + np.arange(n)
            taken = (self.masked.packed[at >> 3] >> (at & 7) & 1).astype(bool)
            unified, is_signed = self.masked.unified.rows(rows, n), self.masked.is_signed
            values = masks.apply(values, unified, taken, self.masked.gamma, is_signed=is_signed)
        for look_up in self.codes:
            scale = look_up.scale[rows] if len(look_up.scale) == m else look_up.scale
            found = scaled_levels(look_up._replace(codes=look_up.codes[rows], scale=scale))
            values = found if values is None else np.add(values, found, out=found)
        return np.zeros((len(rows), n), np.float32) if values is None else values

    def _native(self, rows: np.ndarray, wanted: int, out: np.ndarray) -> bool:
        """Decode by the loops in C; return False if they cannot."""
        if native.decoding is None or self.loops is None:
            return False
        which = np.ascontiguousarray(rows, np.int64)
        native.decoding.flexmerge_decode(
            native.address(self.loops), which.ctypes.data, 0, len(rows), wanted, out.ctypes.data
        )  # fmt: skip
        return True


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Gives rows of two weights one number each; decodes like Packed."""

    shared: Packed
    own: Packed | None
    places: np.ndarray
    """int32 [m]: a row of `shared`, or -1 minus the row of `own`."""

    has_product = False
    address = None

    @property
    def matrix(self) -> Matrix:
        return len(self.places), self.shared.matrix[1]

    @property
    def dtype(self) -> str:
        return self.shared.dtype

    def decode_into(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode like Packed.decode_into."""
        places, whole = self.places[rows].astype(np.int64), out.reshape(len(rows), self.matrix[1])
        is_shared = places >= 0
        whole[is_shared] = self.shared.rows(places[is_shared])
        if self.own is not None:
            whole[~is_shared] = self.own.rows(-1 - places[~is_shared])


def _native_rows(packed: Packed) -> native.Rows | None:
    parts = [packed.dense, None if packed.masked is None else packed.masked.unified]
    if any(part is not None and part.dtype not in native.TYPES for part in parts):
        return None
    if (packed.dense is None and not packed.codes) or (packed.masked is not None and packed.masked.is_signed):
        return None
    found = native.Rows(n=packed.matrix[1])
    if packed.dense is not None:
        found.dense, found.dense_type = packed.dense.bits.ctypes.data, native.TYPES[packed.dense.dtype]
    if packed.masked is not None:
        unified = packed.masked.unified
        found.unified, found.unified_type = unified.bits.ctypes.data, native.TYPES[unified.dtype]
        found.mask, found.gamma = packed.masked.packed.ctypes.data, float(packed.masked.gamma)
    for place, look_up in enumerate(packed.codes):
        found.codes[place] = _native_codes(look_up)
    return found


def _native_codes(look_up: LookUp) -> native.Codes:
    codes, _, bits, table, scale = look_up
    is_by_row = int(len(scale) == len(codes) and len(scale) != 1)
    return native.Codes(codes.ctypes.data, codes.shape[1], bits, table.ctypes.data, scale.ctypes.data, is_by_row)


def _float64(part: Elements) -> np.ndarray:
    return part.bits if part.dtype == "F64" else to_float32(part.bits, part.dtype).astype(np.float64)


def _add_kept(values: np.ndarray, rows: np.ndarray, kept: KeptElements) -> None:
    begin, end = kept.starts[rows], kept.starts[rows + 1]
    counts = end - begin
    of_row = np.repeat(np.arange(len(rows)), counts)
    at = np.arange(counts.sum()) + np.repeat(begin - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    values += np.float32(0)  # the other elements are a sum too: of -0 and 0
    values[of_row, kept.columns[at]] += to_float32(kept.values.bits[at], kept.values.dtype)
