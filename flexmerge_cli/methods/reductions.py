"""Sums and averages over the tasks of a group: in float64, in task order, on any device."""

from typing import Literal

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.later import Tensor, torch


def flat(deltas: Tensor) -> Tensor:
    """Flatten each task: [k, *shape] -> [k, n]; of scalars, [k] -> [k, 1]."""
    return deltas.reshape(len(deltas), deltas[0].numel())


def only(kept: Tensor, values: Tensor) -> Tensor:
    """Return float32 values where `kept`, and +0 elsewhere: multiplying bits takes a quarter of the time of `where`."""
    return (values.view(torch.int32) * kept).view(torch.float32)


def native_rows(deltas: Tensor) -> Tensor | None:
    """Return the same values as rows that native.c can read; None for other devices and dtypes."""
    if deltas.device.type != "cpu" or deltas.dtype is not torch.float32:
        return None
    return deltas if deltas[0].is_contiguous() else deltas.contiguous()


def sum_tasks(deltas: Tensor) -> Tensor:
    """Sum the tasks, [k, *shape] -> [*shape] float64, in a fixed order, so that the same bits come out everywhere."""
    if native.lib is not None and (rows := native_rows(deltas)) is not None:
        total = torch.empty(rows.shape[1:], dtype=torch.float64)
        native.lib.flexmerge_sum(rows.data_ptr(), len(rows), total.numel(), rows.stride(0), total.data_ptr())
        return total
    total = deltas[0].to(torch.float64, copy=True)
    if total.device.type == "cpu":
        # numpy adds float32 to float64 in 0.65 of the time of torch, which casts element by element. The bits are the
        # same.
        for delta in deltas[1:].numpy():
            np.add(total.numpy(), delta, out=total.numpy())
    else:
        for delta in deltas[1:]:
            total.add_(delta)
    return total


def count_tasks(kept: Tensor) -> Tensor:
    """Count the tasks that are true, bool [k, *shape] -> whole numbers [*shape]; in bytes where they can hold it."""
    return kept.view(torch.uint8).sum(0, dtype=torch.uint8 if len(kept) < 256 else torch.int64)


def mean_tasks(deltas: Tensor) -> Tensor:
    """Average the tasks, [k, *shape] -> [*shape] float64."""
    return sum_tasks(deltas).div_(len(deltas))


def weigh_tasks(deltas: Tensor, weights: list[float]) -> Tensor:
    """Sum weight times task, [k, *shape], k weights -> [*shape] float64."""
    total = weights[0] * deltas[0].to(torch.float64)
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total = total + weight * delta.to(torch.float64)
    return total


def elect(deltas: Tensor) -> Tensor:
    """Return the sign of the sum, +1 or -1; exact cancellation elects +1. [k, *shape] -> [*shape] float32."""
    return torch.where(sum_tasks(deltas) >= 0, 1.0, -1.0)


Agreeing = Literal["mean", "sum", "max"]


def merge_agreeing(deltas: Tensor, merge: Agreeing) -> Tensor:
    """Take the mean, sum or largest of the deltas of the elected sign; 0 where there are none. [k, *] -> [*]
    float64."""
    return _agreeing(deltas, merge, marks=False)[0]


def largest_agreeing(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest delta of the elected sign, float64 [*], and which deltas have that sign, bool [k, *]."""
    return _agreeing(deltas, "max", marks=True)


def _agreeing(deltas: Tensor, merge: Agreeing, *, marks: bool) -> tuple[Tensor, Tensor]:
    if native.lib is not None and (rows := native_rows(deltas)) is not None:
        found = torch.empty(rows.shape[1:], dtype=torch.float64)
        agrees = torch.empty(rows.shape if marks else 0, dtype=torch.bool)
        how = ("mean", "sum", "max").index(merge)
        native.lib.flexmerge_agree(
            rows.data_ptr(), len(rows), found.numel(), rows.stride(0), how,
            found.data_ptr(), agrees.data_ptr() if marks else None,
        )  # fmt: skip
        return found, agrees
    elected = elect(deltas)
    agrees = deltas * elected > 0
    if merge == "max":
        return elected.double() * only(agrees, deltas.abs()).amax(0), agrees
    total = sum_tasks(only(agrees, deltas))
    return total if merge == "sum" else total / count_tasks(agrees).clamp(min=1), agrees
