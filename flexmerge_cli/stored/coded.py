"""A tensor stored as its group's centre and the task's own residual: which parts that takes, and their decoding.

θ̂ = centre + decode(residual), each float32, decoded by whole rows so that memory beyond the result is bounded.
"""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import FLOATING, NUMPY, from_float32, promote, to_float32
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.methods.coded import Coded, Form, declare
from flexmerge_cli.methods.method import Call
from flexmerge_cli.methods.registry import declared
from flexmerge_cli.residuals.coder import Coder, Part, Parts
from flexmerge_cli.stored.decoding import ALL, Described, Read, RouteParts
from flexmerge_cli.stored.form import Array, Bits, GroupForm, GroupLayout, GroupTensor
from flexmerge_cli.stored.summary import Summary, residual_summary

# Elements decoded at a time: a few MB, in and out of the cache together.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """How one tensor of one task is stored."""

    of: Described
    coded: Coded
    form: Form
    centre: tuple[Array, ...]
    base: bool
    """Whether decoding needs the base's tensor."""
    own: tuple[Array, ...]
    """The task's arrays; none where the tensor is the centre itself."""
    owner: str
    """The task whose name its own parts have: the first of those that share them."""

    is_plain = False

    def fits(self, parts: RouteParts) -> bool:
        if not {*self.of.dtypes} <= set(FLOATING):
            return False
        if self.base:
            base = parts[f"{self.of.tensor}@base"]
            if base.dtype not in FLOATING or base.num_elements != math.prod(self.of.shape):
                return False
        needed = {self._centre_name(array): array for array in self.centre} | {
            self._own_name(array): array for array in self.own
        }
        return all((parts[n].dtype, parts[n].shape) == (array.dtype, array.shape) for n, array in needed.items())

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        out = np.empty(math.prod(self.form.matrix), NUMPY[self.of.dtype])
        for at, addends in self.blocks(parts, read):
            first, *rest = [addend.values() for addend in addends]
            out[at] = from_float32(np.add(first, rest[0], out=rest[0]) if rest else first, self.of.dtype)
        return out.reshape(self.of.shape)

    def blocks(self, parts: RouteParts, read: Read) -> Iterator[tuple[slice, list["Rows | Dense"]]]:
        """Elements, and what they are the sum of: the centre, the residual, or both in this order."""
        (m, n), dtype = self.form.matrix, self.of.dtype
        residual, centre = self.form.residual, self.form.centre if self.coded.centre != "none" else None
        own = {a.role: read(parts[self._own_name(a)], ALL).reshape(a.shape) for a in self.own}
        dense, coded_centre = None, {}
        if centre is not None:
            coded_centre = {a.role: read(parts[self._centre_name(a)], ALL).reshape(a.shape) for a in self.centre}
        elif self.coded.centre != "none":
            dense = parts[f"{self.of.tensor}@{'base' if self.base else 'unified'}"]
        step = max(1, BLOCK_ELEMENTS // max(1, n)) if residual is None or residual.scope == "row" else max(1, m)
        for first in range(0, m, step):
            rows = (first, min(m, first + step))
            at = slice(rows[0] * n, rows[1] * n)
            addends: list[Rows | Dense] = []
            if centre is not None:
                addends.append(Rows(centre, coded_centre, (m, n), dtype, rows))
            elif dense is not None:
                addends.append(Dense(dense.dtype, read(dense, at)))
            addends += [Rows(residual, own, (m, n), dtype, rows)] if residual is not None else []
            yield at, addends

    def _centre_name(self, array: Array) -> str:
        return f"{self.of.tensor}@{array.role}"

    def _own_name(self, array: Array) -> str:
        return f"{self.of.tensor}@{array.role}.{self.owner}"


def coded_tensor(of: Described, parts: RouteParts) -> CodedTensor:
    """parts: all that the task reads. Raises DataError if the manifest does not store this tensor so."""
    try:
        coded = _declared(*of.method) if of.method else None
    except UsageError as error:
        raise DataError(f"the manifest's method is not sound: {error.message}", hint="fetch the bundle again") from None
    unknown = DataError(f"the manifest does not tell how `{of.tensor}` is stored", hint="fetch the bundle again")
    if coded is None:
        raise unknown
    bits = None if of.bits is None else of.bits.get(of.task)
    form = coded.form(of.shape, of.dtypes) if bits is None else coded.form_of_bits(of.shape, bits)
    is_nothing = form.residual is None and (bits is None or coded.centre == "none")
    if is_nothing or (bits is None and of.bits is not None):
        raise unknown
    return CodedTensor(
        of=of,
        coded=coded,
        form=form,
        centre=_centre_arrays(coded, form, of.shape, of.dtypes),
        base=_needs_base(coded, form),
        own=_own_arrays(form, of.dtype),
        owner=of.task if bits is None else _owner(of, parts),
    )


def _owner(of: Described, parts: RouteParts) -> str:
    """Tasks with equal bits share parts, named by the first of them."""
    return next((name for name in of.tasks if f"{of.tensor}@codes.{name}" in parts), of.task)


def _layout(group: GroupTensor) -> GroupLayout | None:
    coded = declare(group.call)
    assert coded is not None
    if group.bits is not None:
        return _layout_of_bits(coded, group, group.bits)
    form = coded.form(group.shape, group.dtypes)
    if form.residual is None:
        return None
    return GroupLayout(
        centre=_centre_arrays(coded, form, group.shape, group.dtypes),
        base=_needs_base(coded, form),
        own=tuple(((place,), _own_arrays(form, dtype)) for place, dtype in enumerate(group.dtypes)),
    )


def _layout_of_bits(coded: Coded, group: GroupTensor, bits: tuple[Bits, ...]) -> GroupLayout | None:
    """Where each task has bits of its own; tasks with the same tensor and bits share their arrays."""
    classes: dict[tuple[int, int], list[int]] = {}
    for place, own in enumerate(bits):
        if own != "exact":
            classes.setdefault((group.same[place], own), []).append(place)
    if not classes or not math.prod(group.shape):
        return None
    form = coded.form_of_bits(group.shape, 0)
    return GroupLayout(
        centre=_centre_arrays(coded, form, group.shape, group.dtypes),
        base=_needs_base(coded, form),
        own=tuple(
            (tuple(places), _own_arrays(coded.form_of_bits(group.shape, own), group.dtypes[places[0]]))
            for (_, own), places in classes.items()
        ),
    )


def _centre_arrays(coded: Coded, form: Form, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[Array, ...]:
    """What the tasks share, the base apart."""
    if form.centre is not None and coded.centre != "none":
        return _arrays(form.centre.parts(form.matrix, promote(dtypes)))
    return () if coded.centre in ("base", "none") else (Array(role="unified", dtype=promote(dtypes), shape=shape),)


def _needs_base(coded: Coded, form: Form) -> bool:
    return coded.centre == "base" and form.centre is None


def _own_arrays(form: Form, dtype: str) -> tuple[Array, ...]:
    """What a task has for itself; none where it is the centre."""
    return _arrays(form.residual.parts(form.matrix, dtype)) if form.residual is not None else ()


def _arrays(parts: tuple[Part, ...]) -> tuple[Array, ...]:
    return tuple(Array(role=part.role, dtype=part.dtype, shape=part.shape) for part in parts)


@functools.lru_cache(maxsize=64)
def _declared(name: str, args: str) -> Coded | None:
    """Asked for every tensor of every task; args: JSON."""
    return declared(name, json.loads(args))


@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows of what a coder stored."""

    coder: Coder
    parts: Parts
    matrix: tuple[int, int]
    dtype: str
    rows: tuple[int, int]

    def chunk(self) -> Parts:
        """The parts that these rows need."""
        by_row = {part.role: part.by_row for part in self.coder.parts(self.matrix, self.dtype)}
        return {role: bits[slice(*self.rows)] if by_row[role] else bits for role, bits in self.parts.items()}

    def values(self) -> np.ndarray:
        """float32, one axis, the caller's own."""
        try:
            return self.coder.decode(self.chunk(), self.matrix, self.dtype, rows=self.rows).reshape(-1)
        except ValueError as error:
            raise DataError(f"a stored residual cannot be decoded: {error}", hint="fetch the bundle again") from None


@dataclass(frozen=True, slots=True)
class Dense:
    """Elements that are stored as they are."""

    dtype: str
    bits: np.ndarray

    def values(self) -> np.ndarray:
        """float32; may be the stored memory."""
        return to_float32(self.bits, self.dtype)


def _summary(call: Call) -> Summary:
    coded = declare(call)
    assert coded is not None
    return residual_summary(coded)


CODED = GroupForm(word="residual", product="residuals", layout=_layout, summary=_summary, decoder=coded_tensor)
