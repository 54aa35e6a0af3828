"""Decodes a tensor of a kept adapter's model: the base's tensor changed by the factors, or the base's own bits."""

import math
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.change import LowRank
from flexmerge_cli.checkpoint.dtypes import to_float32
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix, View
from flexmerge_cli.stored.decoding import ALL, Read, RouteParts
from flexmerge_cli.stored.packed import Elements, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedTensor:
    """What a reader needs for a tensor of an adapter's model."""

    base: StoredTensor | None
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
        return self.base is None or (self.base.dtype, self.base.num_elements) == form

    @property
    def is_low_rank(self) -> bool:
        """Whether it is the base's tensor plus a product of two factors."""
        return self.base is not None and self.changed is not None and isinstance(self.changed.change, LowRank)

    @property
    def matrix(self) -> Matrix:
        return View.FIRST_AXIS.matrix(self.shape)

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        """Return the base and the factors of a low-rank tensor. The left factor is held in float64, with the scale."""
        base, change = self._low_rank()
        left, right = change.left, change.right
        return {
            "base": (base, base.num_bytes),
            "left": (left, 8 * left.num_elements),
            "right": (right, right.num_bytes),
        }

    def packed(self, parts: RouteParts, read: Read) -> Packed:
        """Keep a low-rank tensor packed; values are off by the rounding of a product that is not summed term by
        term."""
        base, change = self._low_rank()
        left, right = change.left, change.right
        scaled = to_float32(read(left, ALL), left.dtype).astype(np.float64) * change.scale
        factors = Elements(scaled, "F64"), Elements(read(right, ALL), right.dtype)
        return Packed(
            matrix=self.matrix, dtype=self.dtype, dense=Elements(read(base, ALL), base.dtype), factors=factors
        )

    def _low_rank(self) -> tuple[StoredTensor, LowRank]:
        assert self.base is not None and self.changed is not None and isinstance(self.changed.change, LowRank)
        return self.base, self.changed.change

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        part = self.changed or self.base
        assert part is not None
        return read(part, ALL).reshape(self.shape)
