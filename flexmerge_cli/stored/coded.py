"""Decides the parts of a tensor that is stored as its group's centre and the task's own residual, and decodes it.

θ̂ = centre + decode(residual), each float32, decoded by whole rows so that memory beyond the result is bounded.
"""

import functools
import json
import math
from dataclasses import dataclass, replace

import numpy as np

from flexmerge_cli.checkpoint.dtypes import FLOATING, promote
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coded import Coded, CodedForm, declare
from flexmerge_cli.methods.registry import declared
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.coder import CodedPart, Coder, Matrix, Parts
from flexmerge_cli.residuals.low_bit import LookUp, LowBit
from flexmerge_cli.residuals.low_rank import LowRank
from flexmerge_cli.residuals.packing import row_bytes
from flexmerge_cli.residuals.sign_runs import SignRuns
from flexmerge_cli.residuals.sparse import Sparse
from flexmerge_cli.stored.decoding import ALL, Described, Experts, LowRankSum, Packable, Read, RouteParts
from flexmerge_cli.stored.form import Array, Bits, GroupForm, GroupLayout, GroupTensor
from flexmerge_cli.stored.packed import Elements, KeptElements, Packed
from flexmerge_cli.stored.summary import Summary, residual_summary


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor(Packable):
    """How one tensor of one task is stored."""

    of: Described
    coded: Coded
    form: CodedForm
    centre: tuple[Array, ...]
    needs_base: bool
    """Whether decoding needs the base's tensor."""
    own: tuple[Array, ...]
    """The task's arrays; none if the tensor is the centre itself."""
    owner: str
    """The task that gives its own parts their name: the first of those that share them."""

    decodes_on_devices = True

    @property
    def is_mixture(self) -> bool:
        return self.coded.top is not None and self.form.residual is not None

    def experts(self, parts: RouteParts) -> Experts | None:
        if not self.is_mixture:
            return None
        name, top = self.of.tensor, self.coded.top
        assert top is not None
        factors = tuple((parts[f"{name}@left.{task}"], parts[f"{name}@right.{task}"]) for task in self.of.tasks)
        return Experts(parts[f"{name}@{'base' if self.needs_base else 'unified'}"], factors, min(top, len(factors)))

    @property
    def packable(self) -> "CodedTensor | None":
        return None if self.is_mixture else self

    def fits(self, parts: RouteParts) -> bool:
        if not {*self.of.dtypes} <= set(FLOATING):
            return False
        if self.needs_base:
            base = parts[f"{self.of.tensor}@base"]
            if base.dtype not in FLOATING or base.num_elements != math.prod(self.of.shape):
                return False
        needed = {self._centre_name(array): array for array in self.centre} | {
            self._own_name(array): array for array in self.own
        }
        for task, dtype in zip(self.of.tasks, self.of.dtypes) if self.is_mixture else ():
            needed |= {f"{self.of.tensor}@{array.role}.{task}": array for array in _own_arrays(self.form, dtype)}
        return all((parts[n].dtype, parts[n].shape) == (array.dtype, array.shape) for n, array in needed.items())

    def low_rank_sum(self, parts: RouteParts) -> LowRankSum | None:
        if not isinstance(self.form.residual, LowRank) or self.form.centre is not None or self.is_mixture:
            return None
        centre = parts[f"{self.of.tensor}@{'base' if self.needs_base else 'unified'}"]
        left, right = (parts[f"{self.of.tensor}@{role}.{self.owner}"] for role in ("left", "right"))
        return LowRankSum(centre, left.shape[1], (left, right))

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        return self.packed(parts, read).decode().reshape(self.of.shape)

    @property
    def matrix(self) -> Matrix:
        return self.form.matrix

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        names = [self._centre_name(array) for array in self.centre] + [self._own_name(array) for array in self.own]
        found = {}
        for name in ([f"{self.of.tensor}@base"] if self.needs_base else []) + names:
            role, part = name.removeprefix(f"{self.of.tensor}@"), parts[name]
            found[role] = part, part.num_bytes
            residual = self.form.residual
            if isinstance(residual, Sparse) and role == f"index.{self.owner}":
                found[role] = part, KeptElements.index_bytes(self.matrix, residual.count(self.matrix))
            if isinstance(residual, SignRuns) and role == f"codes.{self.owner}":  # one bit an element once it is read
                found[role] = part, self.matrix[0] * row_bytes(self.matrix[1], 1)
        return found

    def packed(self, parts: RouteParts, read: Read) -> Packed:
        """Return the tensor in its stored bytes. Raises DataError if they cannot be decoded."""
        residual, centre = self.form.residual, self.form.centre if self.coded.centre != "none" else None
        dense, codes = None, list[LookUp]()
        if centre is not None:
            stored = {a.role: read(parts[self._centre_name(a)], ALL).reshape(a.shape) for a in self.centre}
            codes.append(_look_up(centre, stored, self.form.matrix))
        elif self.coded.centre != "none":
            part = parts[f"{self.of.tensor}@{'base' if self.needs_base else 'unified'}"]
            dense = Elements(read(part, ALL), part.dtype)
        factors = kept = None
        own = {a.role: read(parts[self._own_name(a)], ALL).reshape(a.shape) for a in self.own}
        if isinstance(residual, LowRank):
            left, right = (Elements(own[role].reshape(-1), self.of.dtype) for role in ("left", "right"))
            factors = left, right
        elif isinstance(residual, Sparse):
            try:
                positions = residual.positions(own, self.form.matrix)
            except ValueError as error:
                raise _undecodable(error) from None
            kept = KeptElements.at(positions, Elements(own["values"], self.of.dtype), self.form.matrix)
        elif residual is not None:
            codes.append(_look_up(residual, own, self.form.matrix))
        return Packed(
            matrix=self.form.matrix, dtype=self.of.dtype, dense=dense, codes=tuple(codes), factors=factors, kept=kept
        )

    def _centre_name(self, array: Array) -> str:
        return f"{self.of.tensor}@{array.role}"

    def _own_name(self, array: Array) -> str:
        return f"{self.of.tensor}@{array.role}.{self.owner}"


def coded_tensor(of: Described, parts: RouteParts) -> CodedTensor:
    """Return how the manifest stores this tensor. Raises DataError if it does not. parts: all that the task reads."""
    try:
        coded = _declared(*of.method) if of.method else None
    except UsageError as error:
        raise DataError(f"the manifest's method is not sound: {error.message}", hint="fetch the bundle again") from None
    unknown = DataError(f"the manifest does not tell how `{of.tensor}` is stored", hint="fetch the bundle again")
    if coded is None:
        raise unknown
    bits = None if of.bits is None else of.bits.get(of.task)
    form = coded.form(of.tensor, of.shape, of.dtypes) if bits is None else coded.form_of_bits(of.shape, bits)
    is_nothing = form.residual is None and not form.is_centre and (bits is None or coded.centre == "none")
    if is_nothing or (bits is None and of.bits is not None):
        raise unknown
    return CodedTensor(
        of=of,
        coded=coded,
        form=form,
        centre=_centre_arrays(coded, form, of.shape, of.dtypes),
        needs_base=_needs_base(coded, form),
        own=_own_arrays(form, of.dtype),
        owner=of.task if bits is None else _owner(of, parts),
    )


def _owner(of: Described, parts: RouteParts) -> str:
    """Return the task that names the parts: tasks with equal bits share them, and the first of these names them."""
    return next((name for name in of.tasks if f"{of.tensor}@codes.{name}" in parts), of.task)


def _layout(group: GroupTensor) -> GroupLayout | None:
    coded = declare(group.call)
    assert coded is not None
    if group.bits is not None:
        return _layout_of_bits(coded, group, group.bits)
    form = coded.form(group.name, group.shape, group.dtypes)
    if form.residual is None and not form.is_centre:
        return None
    return GroupLayout(
        centre=_centre_arrays(coded, form, group.shape, group.dtypes),
        base=_needs_base(coded, form),
        own=tuple(((place,), _own_arrays(form, dtype)) for place, dtype in enumerate(group.dtypes)),
        is_mixture=coded.top is not None,
    )


def _layout_of_bits(coded: Coded, group: GroupTensor, bits: tuple[Bits, ...]) -> GroupLayout | None:
    """Lay out a group whose tasks have bits of their own; tasks with the same tensor and bits share their arrays."""
    classes: dict[tuple[int, float], list[int]] = {}
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


def _centre_arrays(coded: Coded, form: CodedForm, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[Array, ...]:
    """Return the arrays that the tasks share, except the base."""
    if form.centre is not None and coded.centre != "none":
        return _arrays(form.centre.parts(form.matrix, promote(dtypes)))
    return () if coded.centre in ("base", "none") else (Array(role="unified", dtype=promote(dtypes), shape=shape),)


def _needs_base(coded: Coded, form: CodedForm) -> bool:
    return coded.centre == "base" and form.centre is None


def _own_arrays(form: CodedForm, dtype: str) -> tuple[Array, ...]:
    """Return the arrays that a task has for itself; none if it is the centre."""
    return _arrays(form.residual.parts(form.matrix, dtype)) if form.residual is not None else ()


def _arrays(parts: tuple[CodedPart, ...]) -> tuple[Array, ...]:
    return tuple(Array(role=part.role, dtype=part.dtype, shape=part.shape) for part in parts)


@functools.lru_cache(maxsize=64)
def _declared(name: str, args: str) -> Coded | None:
    """Declare a method, once, because it is needed for every tensor of every task. args: JSON."""
    return declared(name, json.loads(args))


def _look_up(coder: Coder, parts: Parts, matrix: Matrix) -> LookUp:
    assert isinstance(coder, (LowBit, BitDelta, SignRuns))
    return coder.look_up(parts, matrix)


def _undecodable(error: ValueError) -> DataError:
    return DataError(f"a stored residual cannot be decoded: {error}", hint="fetch the bundle again")


def _summary(call: Call) -> Summary:
    coded = declare(call)
    assert coded is not None
    return residual_summary(coded)


def _mixture_summary(call: Call) -> Summary:
    found = _summary(call)
    return Summary(parts=f"{found.parts} as an expert; other tensors are the centre's", num_bytes=found.num_bytes)


CODED = GroupForm(
    word="residual",
    product="residuals",
    layout=_layout,
    summary=_summary,
    decoder=coded_tensor,
    writer="flexmerge_cli.engine.writers.coded:RESIDUALS",
)
MIXTURE = replace(CODED, word="mixture", product="experts", summary=_mixture_summary)
