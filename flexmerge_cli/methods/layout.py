"""What one group of one tensor stores under a method: arrays, from shapes and dtypes alone."""

import math
from dataclasses import dataclass
from typing import Literal

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.methods.method import Call

Kind = Literal["copy", "merged", "masked", "residual"]


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
class Layout:
    """Arrays of one group of k tasks."""

    kind: Kind
    centre: tuple[Array, ...]
    """Read by all tasks of the group."""
    base: bool
    """Whether decoding needs the base's tensor too."""
    each: tuple[Array, ...]
    """Per task."""

    def num_bytes(self, num_tasks: int, base_bytes: int) -> int:
        """Price, the base in full: what decides between this and copies."""
        each = sum(array.num_bytes for array in self.each)
        return sum(array.num_bytes for array in self.centre) + num_tasks * each + (base_bytes if self.base else 0)


def layout(call: Call, *, shape: tuple[int, ...], dtype: str) -> Layout:
    """dtype: of the group's stored value."""
    if call.method.masked:
        mask = Array(role="mask", dtype="U8", shape=((math.prod(shape) + 7) // 8,))
        unified = Array(role="unified", dtype=dtype, shape=shape)
        return Layout(kind="masked", centre=(unified,), base=True, each=(mask,))
    return Layout(kind="merged", centre=(Array(role="dense", dtype=dtype, shape=shape),), base=False, each=())
