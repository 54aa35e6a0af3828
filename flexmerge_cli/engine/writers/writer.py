"""Defines what the writer of a stored form must provide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.engine.chain import Chain
from flexmerge_cli.engine.encode import Encoder, Piece
from flexmerge_cli.engine.work import Raw
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One range of one group that is merged and written, and what it is known to take."""

    chain: Chain | None
    """The group's method; None for copies."""
    storage: Storage
    group: StoredGroup
    n: int
    """The number of elements in the range."""
    t: int
    """The number of elements that are merged at a time."""
    items: Sequence[int]
    """The bytes of one element as each task gets it back."""
    merging: int
    """The bytes that merging takes."""
    is_cast: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitValues:
    """Computes what each task of a group stores once for all tensors of a unit, from sums over all of them."""

    sums: Callable[[Encoder, StoredGroup, Raw], np.ndarray]
    """Returns what one range of a tensor adds to every sum, run by run: float64 [sums, k, runs]."""
    values: Callable[[Call, np.ndarray, np.ndarray], np.ndarray]
    """Turns the call, the sums [sums, k, tensors] and the number of elements of each tensor into one value per task."""


def _any_range(_chain: Chain, _storage: Storage, _group: StoredGroup) -> Scope:
    return "element"


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Writes one stored form."""

    write: Callable[[Encoder, Storage, StoredGroup, Raw, Piece, Tensor | None], None]
    """Writes one range of a group's tensor. The last argument is what a method of scope `block` made of it."""
    workspace: Callable[[Work], int]
    """Returns the bytes that one call takes beside buffers and what it writes."""
    scope: Callable[[Chain, Storage, StoredGroup], Scope] = _any_range
    """Returns what one call must see of a tensor, apart from what the method must see."""
    of_unit: UnitValues | None = None
    """None if the form stores nothing per unit."""
