"""Makes the part of the survey that `auto` needs: how well base and average can be coded, and residuals of some rows.

A range of elements codes the rows that start in it, and reads on to the end of the last of them. So every row is coded
once, as a whole, and the sums do not depend on how tensors are cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from flexmerge_cli import native
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.residuals.coding_error import CodingErrorSum, RowErrors

NewArray = Callable[[object, int], torch.Tensor]
"""Takes a purpose and a number of elements, and returns float32 memory of this thread, which its next range reuses."""


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


def average_into(
    average: torch.Tensor, base: torch.Tensor, block_kN: torch.Tensor, total: torch.Tensor, *, subtracted: bool = True
) -> None:
    """Compute θ_0 + mean τ: the mean as in `mean_tasks`, in float64, rounded once, then a float32 sum.

    block_kN: task vectors, or weights from which the base is not yet subtracted. total: float64, as long as a block,
    reused: fresh memory of this size takes longer than the sum.
    """
    count = len(base)
    rows_are_whole = block_kN.stride(1) == base.stride(0) == average.stride(0) == 1 or count < 2
    if native.lib is not None and block_kN.device.type == "cpu" and rows_are_whole:
        pointers, out = (base.data_ptr(), block_kN.data_ptr()), average.data_ptr()
        native.lib.flexmerge_average(*pointers, len(block_kN), count, block_kN.stride(0), subtracted, out)
        return
    deltas_kN = block_kN if subtracted else block_kN - base
    total = total[:count].copy_(deltas_kN[0])
    for delta in deltas_kN[1:]:
        if total.device.type == "cpu":
            np.add(total.numpy(), delta.numpy(), out=total.numpy())  # in 0.65 of torch's time
        else:
            total.add_(delta)
    average.copy_(total.div_(len(deltas_kN))).add_(base)


def measure_rows(
    sums: CodingErrorSum,
    rows: RowRange,
    start: int,
    values: list[torch.Tensor],
    average: torch.Tensor,
    device: torch.device,
    new_array: NewArray,
) -> RowErrors:
    """Measure the coding errors of whole rows. values: the tasks' elements from `start` on in their own dtypes, and
    last the base's; average: float32, of the same elements."""
    at = slice(rows.first * rows.columns - start, rows.end - start)

    def matrix(flat: torch.Tensor) -> torch.Tensor:
        return flat[at].view(rows.stop - rows.first, rows.columns)

    base = matrix(values[-1])
    if base.dtype is not torch.float32 and device.type == "cpu":
        base = new_array("base", base.numel()).view(base.shape).copy_(base)
    return sums.measure(
        rows.first,
        base.to(device, torch.float32),
        matrix(average),
        [matrix(value) for value in values[:-1]],
    )
