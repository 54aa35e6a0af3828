"""The arrays that one group of one tensor stores under a method, from shapes and dtypes alone."""

import math
from dataclasses import dataclass
from typing import Literal

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, promote
from flexmerge_cli.methods.coded import Coded, declare
from flexmerge_cli.methods.method import Call
from flexmerge_cli.residuals.coder import Part

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
    """The arrays of one group."""

    kind: Kind
    centre: tuple[Array, ...]
    """Arrays that all tasks of the group read."""
    base: bool
    """Whether decoding also needs the base's tensor."""
    each: tuple[tuple[Array, ...], ...]
    """Arrays of each task of the group."""


def layout(call: Call, *, shape: tuple[int, ...], dtypes: tuple[str, ...], base_dtype: str) -> Layout | None:
    """The layout, or None if exact copies are no larger. dtypes: those of the group's tasks, as they are given back."""
    coded = declare(call)
    if coded is not None:
        return residual_layout(coded, shape, dtypes)
    dtype, count = promote(dtypes), math.prod(shape)
    if call.method.masked:
        mask = Array(role="mask", dtype="U8", shape=((count + 7) // 8,))
        unified = Array(role="unified", dtype=dtype, shape=shape)
        found = Layout(kind="masked", centre=(unified,), base=True, each=((mask,),) * len(dtypes))
    else:
        dense = Array(role="dense", dtype=dtype, shape=shape)
        found = Layout(kind="merged", centre=(dense,), base=False, each=((),) * len(dtypes))
    stored = sum(array.num_bytes for array in found.centre) + sum(a.num_bytes for each in found.each for a in each)
    base_bytes = count * ITEM_BYTES[base_dtype] if found.base else 0
    return None if sum(count * ITEM_BYTES[own] for own in dtypes) <= stored + base_bytes else found


def residual_layout(coded: Coded, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Layout | None:
    """The layout of a method with residuals, or None if copies are no larger. dtypes: those of the group's tasks."""
    form, dtype = coded.form(shape, dtypes), promote(dtypes)
    if form.residual is None:
        return None
    centre: tuple[Array, ...] = ()
    if form.centre is not None and coded.centre != "none":
        centre = _arrays(form.centre.parts(form.matrix, dtype))
    elif coded.centre not in ("base", "none"):
        centre = (Array(role="unified", dtype=dtype, shape=shape),)
    return Layout(
        kind="residual",
        centre=centre,
        base=coded.centre == "base" and form.centre is None,
        each=tuple(_arrays(form.residual.parts(form.matrix, own)) for own in dtypes),
    )


def centre_arrays(coded: Coded, shape: tuple[int, ...], dtype: str) -> tuple[Array, ...]:
    """The arrays shared by tasks that have their own numbers of bits, without the base. dtype: that of their one
    value."""
    form = coded.form_of_bits(shape, 0)
    if form.centre is not None:
        return _arrays(form.centre.parts(form.matrix, dtype))
    return () if coded.centre in ("base", "none") else (Array(role="unified", dtype=dtype, shape=shape),)


def bits_arrays(coded: Coded, shape: tuple[int, ...], bits: int, dtype: str) -> tuple[Array, ...]:
    """The arrays of one such task."""
    form = coded.form_of_bits(shape, bits)
    return _arrays(form.residual.parts(form.matrix, dtype)) if form.residual is not None else ()


def _arrays(parts: tuple[Part, ...]) -> tuple[Array, ...]:
    return tuple(Array(role=part.role, dtype=part.dtype, shape=part.shape) for part in parts)
