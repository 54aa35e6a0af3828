"""Decodes a tensor with one row per token, where a task stores the rows that not all models have for itself.

The rows that the base and all tasks share are an ordinary tensor, in the base's order; a task's map says at which of
its rows they stand. Its other rows, ascending, are stored for it alone, as they are.
"""

from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.rows import Runs, other_rows
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.stored.coded import CodedTensor
from flexmerge_cli.stored.decoding import Read, RouteParts, Stored
from flexmerge_cli.stored.dense import DenseTensor
from flexmerge_cli.stored.masked import MaskedTensor
from flexmerge_cli.stored.packed import JoinedRows, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedTensor:
    """What a reader needs for one task's whole tensor."""

    shared: Stored
    own: Stored | None
    """None if the task has only the shared rows."""
    common: Runs
    """The task's rows at which the shared ones stand."""
    rows: int
    """The number of all rows of the task."""

    is_plain = False

    def fits(self, parts: RouteParts) -> bool:
        return self.shared.fits(parts) and (self.own is None or self.own.fits(parts))

    @property
    def matrix(self) -> Matrix:
        return self.rows, self._packable(self.shared).matrix[1]

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        own = {} if self.own is None else self._packable(self.own).pieces(parts)
        shared = self._packable(self.shared).pieces(parts)
        return shared | {f"{role} of own rows": piece for role, piece in own.items()}

    def packed(self, parts: RouteParts, read: Read) -> JoinedRows:
        shared = self._packable(self.shared).packed(parts, read)
        own = None if self.own is None else self._packable(self.own).packed(parts, read)
        assert isinstance(shared, Packed) and (own is None or isinstance(own, Packed))
        num_own = 0 if own is None else own.matrix[0]
        numbers = np.arange(shared.matrix[0], dtype=np.int32), -1 - np.arange(num_own, dtype=np.int32)
        return JoinedRows(shared, own, join(*numbers, self.common, self.rows))

    @staticmethod
    def _packable(stored: Stored) -> "DenseTensor | CodedTensor | MaskedTensor":
        assert isinstance(stored, (DenseTensor, CodedTensor, MaskedTensor))
        return stored

    @property
    def is_packable(self) -> bool:
        """Whether its parts can be decoded row by row. An adapter's cannot."""
        parts = (self.shared, *([] if self.own is None else [self.own]))
        return all(isinstance(part, (DenseTensor, CodedTensor, MaskedTensor)) for part in parts)

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
