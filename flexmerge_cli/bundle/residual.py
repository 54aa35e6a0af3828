"""A task's tensor from its group's centre and its own residual: which parts that takes, and their decoding. No torch.

θ̂ = centre + decode(residual), each float32, decoded by whole rows so that memory beyond the result is bounded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.manifest import GroupEntry, Manifest, TensorEntry
from flexmerge_cli.checkpoint.dtypes import NUMPY, from_float32, to_float32
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.methods.coded import Coded, Form
from flexmerge_cli.methods.layout import Array, Layout, residual_layout
from flexmerge_cli.methods.registry import declared
from flexmerge_cli.residuals.coder import Coder, Parts

# Elements decoded at a time: a few MB, in and out of the cache together.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResidual:
    """How one tensor of one group is stored."""

    tensor: TensorEntry
    coded: Coded
    form: Form
    layout: Layout
    group: GroupEntry

    def parts(self, task: str) -> dict[str, Array]:
        """Part name -> what it must be; the base's dtype is free."""
        name = self.tensor.name
        found = {f"{name}@{array.role}": array for array in self.layout.centre}
        each = self.layout.each[self.group.tasks.index(task)]
        return found | {f"{name}@{array.role}.{task}": array for array in each}

    def decode(self, task: str, bits: Callable[[str], tuple[str, np.ndarray]]) -> np.ndarray:
        """Bits in the task's own dtype, one axis. bits: part name -> dtype and elements, one axis."""
        name, (m, n), dtype = self.tensor.name, self.form.matrix, self.tensor.dtype_of(task)
        residual = self.form.residual
        assert residual is not None
        arrays = self.parts(task)

        def read(suffix: str, coder: Coder) -> dict[str, np.ndarray]:
            roles = [part.role for part in coder.parts((m, n), dtype)]
            return {
                role: bits(f"{name}@{role}{suffix}")[1].reshape(arrays[f"{name}@{role}{suffix}"].shape)
                for role in roles
            }

        own = read(f".{task}", residual)
        coded_centre = (
            read("", self.form.centre) if self.form.centre is not None and self.coded.centre != "none" else {}
        )
        dense = None
        if not coded_centre and self.coded.centre != "none":
            dense = bits(f"{name}@base" if self.layout.base else f"{name}@unified")
        out = np.empty(m * n, NUMPY[dtype])
        step = max(1, BLOCK_ELEMENTS // max(1, n)) if residual.scope == "row" else max(1, m)
        for first in range(0, m, step):
            rows = (first, min(m, first + step))
            at = slice(rows[0] * n, rows[1] * n)
            value = _rows(residual, own, (m, n), dtype, rows)
            if coded_centre and self.form.centre is not None:
                value = _rows(self.form.centre, coded_centre, (m, n), dtype, rows) + value
            elif dense is not None:
                value = to_float32(dense[1][at], dense[0]) + value
            out[at] = from_float32(value, dtype)
        return out


def stored_residual(manifest: Manifest, tensor: TensorEntry, group: GroupEntry) -> StoredResidual:
    """Raises DataError if the manifest's method does not store this tensor so."""
    dtypes = tuple(tensor.dtype_of(task) for task in group.tasks)
    shape = tensor.shape_of(group.tasks[0])
    method = manifest.methods[group.method] if group.method is not None else None
    try:
        coded = declared(method.name, method.args) if method else None
    except UsageError as error:
        raise DataError(f"the manifest's method is not sound: {error.message}", hint="fetch the bundle again") from None
    layout = residual_layout(coded, shape, dtypes) if coded else None
    if coded is None or layout is None:
        raise DataError(f"the manifest does not tell how `{tensor.name}` is stored", hint="fetch the bundle again")
    return StoredResidual(tensor=tensor, coded=coded, form=coded.form(shape, dtypes), layout=layout, group=group)


def _rows(coder: Coder, parts: Parts, matrix: tuple[int, int], dtype: str, rows: tuple[int, int]) -> np.ndarray:
    """float32, one axis."""
    by_row: Mapping[str, bool] = {part.role: part.by_row for part in coder.parts(matrix, dtype)}
    chunk = {role: bits[rows[0] : rows[1]] if by_row[role] else bits for role, bits in parts.items()}
    try:
        return coder.decode(chunk, matrix, dtype, rows=rows).reshape(-1)
    except ValueError as error:
        raise DataError(f"a stored residual cannot be decoded: {error}", hint="fetch the bundle again") from None
