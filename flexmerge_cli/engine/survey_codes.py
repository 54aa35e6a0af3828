"""Makes the part of the survey that `auto` needs: how well base and average can be coded, and residuals of some rows.

A range of elements codes the rows that start in it, and reads on to the end of the last of them. So every row is coded
once, as a whole, and the sums do not depend on how tensors are cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexmerge_cli import native
from flexmerge_cli.engine.device import as_tensor
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
    chosen = torch.from_numpy(sums.sampled[sampled] - rows.first)

    def new(key: str, *shape: int) -> torch.Tensor:
        if device.type != "cpu":
            return torch.empty(shape, device=device)
        size = 4 * math.prod(shape)
        return as_tensor(buffers.get(key, size)[:size], "F32").view(shape)

    own = new("own", len(tasks), len(chosen), rows.columns)
    for into, task in zip(own, tasks):
        if task.dtype is torch.float32 and device.type == "cpu":
            torch.index_select(task, 0, chosen, out=into)
        else:
            into.copy_(task.index_select(0, chosen))
    if base.dtype is not torch.float32 or base.device != device:
        base = new("wide", *base.shape).copy_(base)
    average = average_of(base[chosen.to(device)], own)
    measured = residual_tasks(sampled, len(tasks))
    places = torch.from_numpy(measured * len(chosen) + np.arange(len(chosen))[:, None])
    residuals = new("residuals", *measured.shape, rows.columns)
    flat = own.view(-1, rows.columns), places.flatten().to(device), residuals.view(-1, rows.columns)
    torch.index_select(flat[0], 0, flat[1], out=flat[2])
    return sums.measure(rows.first, base, average, residuals.sub_(average[:, None]).flatten(0, 1))


def average_of(base: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return θ_0 + mean τ, the mean in float64, rounded once: float32 [s, n], [k, s, n] -> [s, n]."""
    if native.lib is None or base.device.type != "cpu":
        return base + mean_tasks(weights - base).float()
    average = torch.empty_like(base)
    size = base.numel()
    native.lib.flexmerge_average(
        base.data_ptr(), weights.data_ptr(), len(weights), size, size, False, average.data_ptr()
    )
    return average
