"""Decodes a tensor with one row per token, where a task stores the rows that not all models have for itself.

The rows that the base and all tasks share are an ordinary tensor, in the base's order; a task's map says at which of
its rows they stand. Its other rows, ascending, are stored for it alone, as they are.
"""

from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.rows import Runs, other_rows
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.stored.decoding import Described, Experts, Packable, Read, RouteParts, Stored
from flexmerge_cli.stored.form import Form
from flexmerge_cli.stored.packed import JoinedRows, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedTensor(Packable):
    """What a reader needs for one task's whole tensor."""

    shared: Stored
    own: Stored | None
    """None if the task has only the shared rows."""
    common: Runs
    """The task's rows at which the shared ones stand."""
    rows: int
    """The number of all rows of the task."""

    def fits(self, parts: RouteParts) -> bool:
        return self.shared.fits(parts) and (self.own is None or self.own.fits(parts))

    @property
    def matrix(self) -> Matrix:
        return self.rows, _packable(self.shared).matrix[1]

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        own = {} if self.own is None else _packable(self.own).pieces(parts)
        shared = _packable(self.shared).pieces(parts)
        return shared | {f"{role} of own rows": piece for role, piece in own.items()}

    def packed(self, parts: RouteParts, read: Read) -> JoinedRows:
        shared = _packable(self.shared).packed(parts, read)
        own = None if self.own is None else _packable(self.own).packed(parts, read)
        assert isinstance(shared, Packed) and (own is None or isinstance(own, Packed))
        num_own = 0 if own is None else own.matrix[0]
        numbers = np.arange(shared.matrix[0], dtype=np.int32), -1 - np.arange(num_own, dtype=np.int32)
        return JoinedRows(shared, own, join(*numbers, self.common, self.rows))

    def experts(self, parts: RouteParts) -> Experts | None:
        return self.shared.experts(parts)

    @property
    def packable(self) -> "JoinedTensor | None":
        pieces = (self.shared, *([] if self.own is None else [self.own]))
        return self if all(piece.packable is not None for piece in pieces) else None

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        own = self.own.decode(parts, read) if self.own is not None else None
        return join(self.shared.decode(parts, read), own, self.common, self.rows)


def join(shared: np.ndarray, own: np.ndarray | None, common: Runs, rows: int) -> np.ndarray:
    """Join the task's whole tensor [rows, …]. shared, own: [·, …]; own None: no rows. common: where `shared` stands."""
    whole = np.empty((rows, *shared.shape[1:]), shared.dtype)
    for part, runs in ((shared, common), (own, other_rows(common, rows))):
        position = 0
        for first, count in runs:
            assert part is not None
            whole[first : first + count] = part[position : position + count]
            position += count
    return whole


def _packable(stored: Stored) -> Packable:
    found = stored.packable
    assert found is not None
    return found


def _decoder(of: Described, _parts: RouteParts) -> JoinedTensor:
    shared, *own = of.pieces
    return JoinedTensor(shared=shared, own=own[0] if own else None, common=of.common, rows=of.shape[0])


JOINED = Form(word="joined", decoder=_decoder)
