"""What the writer of a stored form answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.engine.chain import Chain
from flexmerge_cli.engine.encode import Encoder, Piece
from flexmerge_cli.engine.work import Raw
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Call, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One range of one group that is merged and written, and what it is known to take."""

    chain: Chain | None
    """None for copies."""
    storage: Storage
    group: StoredGroup
    n: int
    """Elements of the range."""
    t: int
    """Elements that are merged at a time."""
    items: Sequence[int]
    """Bytes of an element, per task, as it is given back."""
    merging: int
    """Bytes that merging takes."""
    is_cast: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitValues:
    """What each task of a group stores once for all tensors of a unit: it follows from sums over all of them."""

    sums: Callable[[Encoder, StoredGroup, Raw], np.ndarray]
    """What one range of a tensor adds to every sum, run by run: float64 [sums, k, runs]."""
    values: Callable[[Call, np.ndarray, np.ndarray], np.ndarray]
    """The call, the sums [sums, k, tensors], and the elements of each tensor -> one value per task."""


def _any_range(_chain: Chain, _storage: Storage, _group: StoredGroup) -> Scope:
    return "element"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Writes one stored form."""

    write: Callable[[Encoder, Storage, StoredGroup, Raw, Piece, Tensor | None], None]
    """One range of a group's tensor. The last: what a method of scope `block` made of it."""
    workspace: Callable[[Work], int]
    """Bytes that one call takes beside buffers and what it writes."""
    scope: Callable[[Chain, Storage, StoredGroup], Scope] = _any_range
    """What one call must see of a tensor; what the method must see is known without."""
    of_unit: UnitValues | None = None
    """None if the form stores nothing of units."""
