"""Stores the largest elements of a residual and their positions; all others decode to 0.

FREE's experts are stored so, too; methods/free.py computes their values. elias_fano.py codes positions.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexmerge_cli.checkpoint.dtypes import from_float32, to_float32
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.random import tie_numbers
from flexmerge_cli.residuals.coder import CodedPart, Matrix, Parts, Rows
from flexmerge_cli.residuals.elias_fano import decode_positions, encode_positions, index_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """`index`: positions in C order; `values`: in the model's dtype, in order of position, `rescale` applied.

    Magnitude pruning of task vectors is this with the base as centre.
    """

    density: float
    """The fraction of the elements that is kept, in (0, 1]."""
    select: Literal["tensor", "row"] = "tensor"
    """tensor: the largest of the tensor, at least one; row: the largest of every row, perhaps none at all."""
    rescale: Literal["none", "l1", "l2"] = "none"
    """The factor on the kept values that restores the norm. l1 makes the squared error *larger* than none does."""

    @property
    def scope(self) -> Literal["row", "tensor"]:
        return "tensor"  # positions are coded as one array, even where rows are selected one by one

    def count(self, shape: Matrix) -> int:
        """Return the number of elements kept."""
        m, n = shape
        if self.select == "row":
            return m * self._count_of(n)
        return min(max(1, self._count_of(m * n)), m * n)

    def parts(self, shape: Matrix, dtype: str) -> tuple[CodedPart, ...]:
        m, n = shape
        count = self.count(shape)
        return (
            CodedPart(role="index", dtype="U8", shape=(index_bytes(m * n, count),), by_row=False),
            CodedPart(role="values", dtype=dtype, shape=(count,), by_row=False),
        )

    def workspace(self, shape: Matrix) -> int:
        return 64 * shape[0] * shape[1] + 32 * self.count(shape)

    def encode(self, matrix: Tensor, dtype: str) -> dict[str, np.ndarray]:
        m, n = matrix.shape
        kept = self.keep(matrix)
        positions = kept.reshape(-1).nonzero().squeeze(1)
        values = matrix.reshape(-1)[positions].double() * self._factor(matrix, kept)
        return {
            "index": encode_positions(positions.cpu().numpy(), m * n),
            "values": from_float32(values.float().cpu().numpy(), dtype),
        }

    def decode(self, parts: Parts, shape: Matrix, dtype: str, rows: Rows | None = None) -> np.ndarray:
        """Decode, as in `Coder`. It decodes the positions of the whole tensor for any rows: ask for many at a time."""
        m, n = shape
        first, stop = rows or (0, m)
        positions = self.positions(parts, shape)
        begin, end = np.searchsorted(positions, [first * n, stop * n])
        out = np.zeros((stop - first) * n, np.float32)
        out[positions[begin:end] - first * n] = to_float32(parts["values"][begin:end], dtype)
        return out.reshape(stop - first, n)

    def positions(self, parts: Parts, shape: Matrix) -> np.ndarray:
        """Return where the kept elements are: int64, ascending in C order. Raises ValueError if the index is
        damaged."""
        return decode_positions(parts["index"], shape[0] * shape[1], self.count(shape))

    def keep(self, matrix: Tensor) -> Tensor:
        """Return bool [m, n]: the elements of largest magnitude, ties by a hash of the index. Exactly `count` of
        them."""
        m, n = matrix.shape
        if self.select == "row":
            return _largest(matrix, self._count_of(n))
        return _largest(matrix.reshape(1, -1), self.count((m, n))).reshape(m, n)

    def _count_of(self, num_elements: int) -> int:
        return int(self.density * num_elements + 1e-6)

    def _factor(self, matrix: Tensor, kept: Tensor) -> float:
        from flexmerge_cli.residuals.quantise import row_sums

        if self.rescale == "none":
            return 1.0
        size = matrix.double().abs().reshape(1, -1)
        size = size if self.rescale == "l1" else size.square()
        whole, part = float(row_sums(size)), float(row_sums(size * kept.reshape(1, -1)))
        ratio = whole / part if part > 0 else 1.0
        return ratio if self.rescale == "l1" else ratio**0.5


def _largest(rows: Tensor, count: int) -> Tensor:
    """Return bool [m, n]: the count largest |x| of each row; of equal ones those with the smallest hash of their index.

    The bits of |x| order like |x|: the count-th is found as an integer, and ties at it are ranked where a row keeps
    only some of them.
    """
    m, n = rows.shape
    if count == 0 or m == 0:
        return torch.zeros(m, n, dtype=torch.bool, device=rows.device)
    bits = rows.contiguous().view(torch.int32) & 0x7FFFFFFF
    threshold = bits.kthvalue(n - count + 1, dim=1, keepdim=True).values
    kept = bits >= threshold
    excess = kept.sum(1, keepdim=True) - count
    if bool((excess > 0).any()):
        at = ((bits == threshold) & (excess > 0)).reshape(-1).nonzero()[:, 0].cpu().numpy()
        order = np.lexsort((-tie_numbers("", at.astype(np.uint64)), at // n))
        of_row = at // n  # ascending, and in order: each row's last numbers come first
        place = np.arange(len(at)) - np.searchsorted(of_row, of_row)
        dropped = at[order[place < excess[:, 0].cpu().numpy()[of_row]]]
        kept.view(-1)[torch.from_numpy(dropped).to(kept.device)] = False
    return kept
