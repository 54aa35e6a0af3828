"""Decodes a tensor whose equal runs along one axis are stored as tensors of their own (family/split.py)."""

from dataclasses import dataclass

import numpy as np

from flexmerge_cli.stored.decoding import Described, Read, RouteParts, Stored
from flexmerge_cli.stored.form import Form


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTensor(Stored):
    """What a reader needs for one task's whole tensor."""

    parts: tuple[Stored, ...]
    dim: int

    def fits(self, parts: RouteParts) -> bool:
        return all(part.fits(parts) for part in self.parts)

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        return np.concatenate([part.decode(parts, read) for part in self.parts], axis=self.dim)


def _decoder(of: Described, _parts: RouteParts) -> SplitTensor:
    return SplitTensor(parts=of.pieces, dim=of.dim)


SPLIT = Form(word="split", decoder=_decoder)
