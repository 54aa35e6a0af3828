"""Makes the part of the survey that `auto` needs: how well base and average can be coded, and residuals of some rows.

A range of elements codes the rows that start in it, and reads on to the end of the last of them. So every row is coded
once, as a whole, and the sums do not depend on how tensors are cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexmerge_cli import native
from flexmerge_cli.engine.device import as_tensor, name_of
from flexmerge_cli.engine.pool import Buffers
from flexmerge_cli.methods.reductions import mean_tasks
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.residuals.coding_error import CodingErrorSum, RowErrors, residual_tasks


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [first, stop) of a view: those that start within some elements."""

    first: int
    stop: int
    columns: int

    @staticmethod
    def starting_in(matrix: Matrix, start: int, stop: int) -> "RowRange":
        columns = matrix[1]
        if not columns:
            return RowRange(0, 0, 0)
        return RowRange(-(-start // columns), -(-stop // columns), columns)

    @property
    def end(self) -> int:
        """The element after the last row; no more than `stop` rounded up to a row."""
        return self.stop * self.columns if self.stop > self.first else 0


def measure_rows(
    sums: CodingErrorSum,
    rows: RowRange,
    start: int,
    values: Sequence[torch.Tensor],
    device: torch.device,
    buffers: Buffers,
) -> RowErrors:
    """Measure the coding errors of whole rows. values: the tasks' elements from `start` on in their own dtypes, and
    last the base's. Memory is reused: fresh memory takes longer than the arithmetic."""
    at = slice(rows.first * rows.columns - start, rows.end - start)
    *tasks, base = [value[at].view(-1, rows.columns) for value in values]
    sampled = sums.sampled_in(rows.first, len(base))
    picked = sums.sampled[sampled] - rows.first

    def new(key: str, *shape: int) -> torch.Tensor:
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        size = 4 * math.prod(shape)
        return as_tensor(buffers.get(key, size)[:size], "F32").view(shape)

    if base.dtype is not torch.float32 or base.device != device:
        base = new("wide", *base.shape).copy_(base)
    measured = residual_tasks(sampled, len(tasks))
    average, residuals = sampled_rows(base, tasks, picked, measured, new)
    return sums.measure(rows.first, base, average, residuals.flatten(0, 1))


def sampled_rows(
    base: torch.Tensor,
    tasks: Sequence[torch.Tensor],
    rows: np.ndarray,
    measured: np.ndarray,
    new: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return θ_0 + mean τ of some rows, [s, n], the mean in float64, rounded once; and θ_k less that, [s, t, n].

    base: float32 [r, n]; tasks: [r, n] each. measured: the tasks of each row, int64 [s, t]. new: makes a float32 tensor
    of a name and shape on the device.
    """
    s, n = len(rows), base.shape[1]
    residuals = new("residuals", *measured.shape, n)
    types = {task.dtype for task in tasks}
    if native.lib is not None and base.device.type == "cpu" and len(types) == 1 and name_of(*types) in native.TYPES:
        average = new("average", s, n)
        addresses = np.array([task.data_ptr() for task in tasks])
        native.lib.flexmerge_sample(
            base.data_ptr(), addresses.ctypes.data, native.TYPES[name_of(*types)], len(tasks), rows.ctypes.data, s, n,
            measured.ctypes.data, measured.shape[1], average.data_ptr(), residuals.data_ptr(),
        )  # fmt: skip
        return average, residuals
    chosen = torch.from_numpy(rows)
    own = new("own", len(tasks), s, n)
    for into, task in zip(own, tasks):
        into.copy_(task.index_select(0, chosen))
    start = base[chosen.to(base.device)]
    average = start + mean_tasks(own - start).float()
    places = torch.from_numpy(measured * s + np.arange(s)[:, None])
    torch.index_select(own.flatten(0, 1), 0, places.flatten().to(base.device), out=residuals.flatten(0, 1))
    return average, residuals.sub_(average[:, None])
