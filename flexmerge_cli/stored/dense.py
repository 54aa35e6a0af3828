"""Decodes a tensor that is stored as it is, or in a wider dtype: an exact copy, or the value of a merged group."""

import math
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import FLOATING, from_float32, promote, to_float32
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix, MatrixView
from flexmerge_cli.stored.decoding import ALL, LowRankSum, Packable, Read, RouteParts
from flexmerge_cli.stored.form import Array, GroupForm, GroupLayout, GroupTensor
from flexmerge_cli.stored.packed import Elements, Packed
from flexmerge_cli.stored.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor(Packable):
    """The part that holds a tensor."""

    part: StoredTensor
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        return self.part.dtype == self.dtype

    @property
    def dense(self) -> StoredTensor:
        return self.part

    def low_rank_sum(self, parts: RouteParts) -> LowRankSum | None:
        return LowRankSum(self.part) if self.is_plain else None

    def fits(self, parts: RouteParts) -> bool:
        casts = self.is_plain or {self.part.dtype, self.dtype} <= set(FLOATING)
        return casts and self.part.num_elements == math.prod(self.shape)

    @property
    def matrix(self) -> Matrix:
        return MatrixView.FIRST_AXIS.matrix(self.shape)

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        return {"dense": (self.part, self.part.num_bytes)}

    def packed(self, parts: RouteParts, read: Read) -> Packed:
        return Packed(matrix=self.matrix, dtype=self.dtype, dense=Elements(read(self.part, ALL), self.part.dtype))

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        return cast(read(self.part, ALL), self.part.dtype, self.dtype).reshape(self.shape)


def cast(bits: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """Convert bits of one dtype to those of another; the same memory if nothing changes."""
    if dtype == wanted:
        return bits
    if wanted == "F64" and dtype != "BF16":
        return bits.astype(np.float64)
    return from_float32(to_float32(bits, dtype), wanted)


def _merged_layout(group: GroupTensor) -> GroupLayout | None:
    dense = Array(role="dense", dtype=promote(group.dtypes), shape=group.shape)
    found = GroupLayout(centre=(dense,), base=False, own=tuple(((place,), ()) for place in range(len(group.dtypes))))
    return None if group.copies_bytes <= found.num_bytes else found


COPY = GroupForm(
    word="copy",
    product="copies",
    layout=lambda _group: None,
    summary=lambda _call: Summary(parts="copies", num_bytes="k·s·n"),
    decoder=None,
    writer="flexmerge_cli.engine.writers.dense:COPIES",
)
MERGED = GroupForm(
    word="merged",
    product="model",
    layout=_merged_layout,
    summary=lambda _call: Summary(parts="one dense value", num_bytes="s·n"),
    decoder=None,
    writer="flexmerge_cli.engine.writers.dense:MERGE",
)
