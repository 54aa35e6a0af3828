"""Defines what a stored form answers about a tensor of a group, from shapes and dtypes alone: its arrays and bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.methods.call import Call
from flexmerge_cli.stored.decoding import Described, RouteParts, Stored
from flexmerge_cli.stored.summary import Summary

Bits = float | Literal["exact"]
"""What a task stores for itself, in bits per element: 0 is nothing, exact a dense copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One stored array. Role: `dense` (the tensor's plain name), or a role of the bundle format."""

    role: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTensor:
    """All inputs of the layout of one tensor of one group."""

    call: Call
    name: str = ""
    """The tensor's aligned name."""
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """The dtype of the tensor in each task of the group."""
    base_dtype: str
    same: tuple[int, ...]
    """One number per task, equal for tasks whose tensors have the same bits."""
    bits: tuple[Bits, ...] | None = None
    """One per task, if each task has its own."""

    @property
    def copies_bytes(self) -> int:
        """The bytes of a copy for every task."""
        return math.prod(self.shape) * sum(ITEM_BYTES[dtype] for dtype in self.dtypes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """The arrays of one tensor of one group."""

    centre: tuple[Array, ...]
    """Read by every task of the group that is not stored exactly."""
    base: bool
    """Whether decoding needs the base's tensor too."""
    own: tuple[tuple[tuple[int, ...], tuple[Array, ...]], ...]
    """Places of tasks in the group, and the arrays that only these read; a task in none of them is an exact copy."""
    is_mixture: bool = False
    """Whether the arrays in `own` are experts: each of these tasks reads those of all."""

    @property
    def num_bytes(self) -> int:
        """The bytes without the base, which all groups of a tensor share."""
        return sum(array.num_bytes for arrays in (self.centre, *(own for _, own in self.own)) for array in arrays)


def no_arrays(_call: Call) -> tuple[Array, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """A way to store a tensor of a task."""

    word: str
    decoder: Callable[[Described, RouteParts], Stored] | None
    """None if every task reads a dense part. Raises DataError if the manifest does not describe this form."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupForm(Form):
    """A way to store what a group shares and what each of its tasks has for itself. Its word is in the manifest, and
    methods declare it."""

    product: str
    """What a method of this form produces, in one word."""
    layout: Callable[[GroupTensor], GroupLayout | None]
    """Gives None if copies are exact and no larger."""
    summary: Callable[[Call], Summary]
    """What a method stores, in words and as a formula."""
    writer: str
    """The module and the name of its Writer (engine/writers/writer.py), imported when first used."""
    of_unit: Callable[[Call], tuple[Array, ...]] = no_arrays
    """Returns the arrays that each task of a group has once for all tensors of a unit."""
