"""Decodes a tensor of a kept adapter's model: the base's tensor changed by the factors, or the base's own bits."""

import math
from dataclasses import dataclass, replace

import numpy as np

from flexmerge_cli.checkpoint.change import LowRankChange
from flexmerge_cli.checkpoint.dtypes import to_float32
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix, MatrixView
from flexmerge_cli.stored.decoding import ALL, Described, LowRankSum, Packable, Read, RouteParts
from flexmerge_cli.stored.form import Form
from flexmerge_cli.stored.packed import Elements, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedTensor(Packable):
    """What a reader needs for a tensor of an adapter's model."""

    of_base: StoredTensor | None
    """The base's bits; None if the adapter's file holds the whole tensor, which the manifest's own check covers."""
    changed: StoredTensor | None
    """The tensor as the adapter changes it on reading; None if the adapter leaves the base's as it is."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        return self.changed is None

    def fits(self, parts: RouteParts) -> bool:
        form = self.dtype, math.prod(self.shape)
        return self.of_base is None or (self.of_base.dtype, self.of_base.num_elements) == form

    @property
    def base(self) -> StoredTensor | None:
        return self.of_base

    @property
    def packable(self) -> "AdaptedTensor | None":
        return None if self._low_rank() is None else self

    def low_rank_sum(self, parts: RouteParts) -> LowRankSum | None:
        if self.of_base is not None and self.changed is None:
            return LowRankSum(self.of_base)
        found = self._low_rank()
        return None if found is None else LowRankSum(found[0], found[1].rank)

    @property
    def matrix(self) -> Matrix:
        return MatrixView.FIRST_AXIS.matrix(self.shape)

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        """Return the base and the factors of a low-rank tensor. The left factor is held in float64, with the scale."""
        base, change = self._factored()
        left, right = change.left, change.right
        return {
            "base": (base, base.num_bytes),
            "left": (left, 8 * left.num_elements),
            "right": (right, right.num_bytes),
        }

    def packed(self, parts: RouteParts, read: Read) -> Packed:
        """Keep a low-rank tensor packed; values are off by the rounding of a product that is not summed term by
        term."""
        base, change = self._factored()
        left, right = change.left, change.right
        scaled = to_float32(read(left, ALL), left.dtype).astype(np.float64) * change.scale
        factors = Elements(scaled, "F64"), Elements(read(right, ALL), right.dtype)
        return Packed(
            matrix=self.matrix, dtype=self.dtype, dense=Elements(read(base, ALL), base.dtype), factors=factors
        )

    def _low_rank(self) -> tuple[StoredTensor, LowRankChange] | None:
        """Return the base's tensor and the factors that are added to it; None if it is no such sum."""
        change = None if self.changed is None else self.changed.change
        return (self.of_base, change) if self.of_base is not None and isinstance(change, LowRankChange) else None

    def _factored(self) -> tuple[StoredTensor, LowRankChange]:
        found = self._low_rank()
        assert found is not None
        return found

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        part = self.changed or self.of_base
        assert part is not None
        return read(part, ALL).reshape(self.shape)


def _decoder(of: Described, parts: RouteParts) -> AdaptedTensor:
    base = None
    if of.change is None or of.needs_base:
        name = f"{of.tensor}@base"
        base = parts.get(name) or of.dense or parts.get(of.tensor) or parts[name]
    changed = None if of.change is None else replace(of.change(base), shape=of.shape)
    return AdaptedTensor(of_base=base, changed=changed, dtype=of.dtype, shape=of.shape)


ADAPTED = Form(word="adapted", decoder=_decoder)
