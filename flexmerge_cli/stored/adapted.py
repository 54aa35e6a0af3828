"""A tensor of a kept adapter's model: what its factors make of the base's tensor, or the base's own bits."""

import math
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.stored.decoding import ALL, Read, RouteParts


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedTensor:
    """What is read for a tensor of an adapter's model."""

    base: StoredTensor | None
    """The base's bits; None where the adapter's file holds the whole tensor, which the manifest's own check covers."""
    changed: StoredTensor | None
    """The tensor as the adapter changes it on reading; None where it leaves the base's as it is."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        return self.changed is None

    def fits(self, parts: RouteParts) -> bool:
        form = self.dtype, math.prod(self.shape)
        return self.base is None or (self.base.dtype, self.base.num_elements) == form

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        part = self.changed or self.base
        assert part is not None
        return read(part, ALL).reshape(self.shape)
