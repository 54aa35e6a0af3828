"""A task's tensor from its group's centre and its own residual: which parts that takes, and their decoding. No torch.

θ̂ = centre + decode(residual), each float32, decoded by whole rows so that memory beyond the result is bounded.
"""

import functools
import json
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.manifest import GroupEntry, Manifest, TensorEntry
from flexmerge_cli.checkpoint.dtypes import NUMPY, from_float32, promote, to_float32
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.methods.coded import Coded, Form
from flexmerge_cli.methods.layout import Array, bits_arrays, centre_arrays, residual_layout
from flexmerge_cli.methods.registry import declared
from flexmerge_cli.residuals.coder import Coder, Parts

# Elements decoded at a time: a few MB, in and out of the cache together.
BLOCK_ELEMENTS = 1 << 20
ALL = slice(None)

PartBits = Callable[[str, slice], tuple[str, np.ndarray]]
"""Name of a part, and which of its elements -> its dtype, and those elements, one axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResidual:
    """How one tensor of one task is stored."""

    tensor: TensorEntry
    task: str
    coded: Coded
    form: Form
    centre: tuple[Array, ...]
    base: bool
    """Whether decoding needs the base's tensor."""
    own: tuple[Array, ...]
    """Of the task; none where it is its centre."""
    owner: str
    """Whose name its own parts have: of tasks that share them the first's."""

    def parts(self) -> dict[str, Array]:
        """Part name -> what it must be; the base's dtype is free."""
        name = self.tensor.name
        found = {f"{name}@{array.role}": array for array in self.centre}
        return found | {f"{name}@{array.role}.{self.owner}": array for array in self.own}

    def decode(self, bits: PartBits) -> np.ndarray:
        """Bits in the task's own dtype, one axis."""
        dtype = self.tensor.dtype_of(self.task)
        out = np.empty(math.prod(self.form.matrix), NUMPY[dtype])
        for at, addends in self.blocks(bits):
            first, *rest = [addend.values() for addend in addends]
            out[at] = from_float32(np.add(first, rest[0], out=rest[0]) if rest else first, dtype)
        return out

    def blocks(self, bits: PartBits) -> Iterator[tuple[slice, list["Rows | Dense"]]]:
        """Elements, and what they are the sum of: the centre, the residual, or both in this order."""
        name, (m, n), dtype = self.tensor.name, self.form.matrix, self.tensor.dtype_of(self.task)
        residual, centre = self.form.residual, self.form.centre if self.coded.centre != "none" else None
        own = {a.role: bits(f"{name}@{a.role}.{self.owner}", ALL)[1].reshape(a.shape) for a in self.own}
        dense, coded_centre = None, {}
        if centre is not None:
            coded_centre = {a.role: bits(f"{name}@{a.role}", ALL)[1].reshape(a.shape) for a in self.centre}
        elif self.coded.centre != "none":
            dense = f"{name}@base" if self.base else f"{name}@unified"
        step = max(1, BLOCK_ELEMENTS // max(1, n)) if residual is None or residual.scope == "row" else max(1, m)
        for first in range(0, m, step):
            rows = (first, min(m, first + step))
            at = slice(rows[0] * n, rows[1] * n)
            addends: list[Rows | Dense] = []
            if centre is not None:
                addends.append(Rows(centre, coded_centre, (m, n), dtype, rows))
            elif dense is not None:
                addends.append(Dense(*bits(dense, at)))
            addends += [Rows(residual, own, (m, n), dtype, rows)] if residual is not None else []
            yield at, addends


def stored_residual(
    manifest: Manifest, tensor: TensorEntry, group: GroupEntry, task: str, route: Container[str]
) -> StoredResidual:
    """route: names of all parts that the task reads. Raises DataError if the manifest does not store this tensor so."""
    dtypes = tuple(tensor.dtype_of(name) for name in group.tasks)
    shape = tensor.shape_of(group.tasks[0])
    method = manifest.methods[group.method] if group.method is not None else None
    try:
        coded = _declared(method.name, json.dumps(method.args)) if method else None
    except UsageError as error:
        raise DataError(f"the manifest's method is not sound: {error.message}", hint="fetch the bundle again") from None
    unknown = DataError(f"the manifest does not tell how `{tensor.name}` is stored", hint="fetch the bundle again")
    if coded is None:
        raise unknown
    if group.bits is not None:
        bits = group.bits.get(task)
        if bits is None or (bits == 0 and coded.centre == "none"):
            raise unknown
        return StoredResidual(
            tensor=tensor,
            task=task,
            coded=coded,
            form=coded.form_of_bits(shape, bits),
            centre=centre_arrays(coded, shape, promote(dtypes)),
            base=coded.centre == "base" and coded.centre_bits == "dense",
            own=bits_arrays(coded, shape, bits, tensor.dtype_of(task)),
            owner=next((name for name in group.tasks if f"{tensor.name}@codes.{name}" in route), task),
        )
    layout = residual_layout(coded, shape, dtypes)
    if layout is None:
        raise unknown
    return StoredResidual(
        tensor=tensor,
        task=task,
        coded=coded,
        form=coded.form(shape, dtypes),
        centre=layout.centre,
        base=layout.base,
        own=layout.each[group.tasks.index(task)],
        owner=task,
    )


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
