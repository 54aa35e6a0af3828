"""Decides which tensors spectral methods treat as matrices, and merges the others.

    2d       tensors with two axes and no `text_projection` in the name: the rule of most authors' code
    linear   tensors with two axes, each of length 2 or more, whose names are not those of embeddings, output heads or
             position biases (the default)
    all      tensors with two or more axes, seen as [out, the rest], each of length 2 or more, whatever their names

The other tensors get the mean of the group's task vectors; without `all` these include convolutions. Fused weights (q,
k and v in one tensor) are one matrix.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range, Where, Workspace
from flexmerge_cli.methods.reductions import mean_tasks

Matrices = Literal["linear", "2d", "all"]
Scale = Annotated[float, Range(above=0)]

# Lower-case segments of the names of tensors that `linear` excludes, besides all segments that contain `embed`.
NOT_LINEAR = {"wte", "wpe", "shared", "lm_head", "text_projection", "relative_attention_bias"}


def is_matrix(tensor: str, shape: tuple[int, ...], matrices: Matrices) -> bool:
    """Return whether the rule selects this tensor."""
    if matrices == "2d":
        return len(shape) == 2 and "text_projection" not in tensor
    if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2:
        return False
    parts = tensor.lower().split(".")
    return matrices == "all" or (len(shape) == 2 and not any("embed" in part or part in NOT_LINEAR for part in parts))


def is_other(tensor: str, shape: tuple[int, ...], *, matrices: Matrices, **_: object) -> bool:
    """Return whether a tensor gets the mean, which can be computed for any range of the tensor."""
    return not is_matrix(tensor, shape, matrices)


def of_matrices(each_task: float, once: float, *, small: float = 0, wide: float = 0, others: float = 0) -> Workspace:
    """Return a workspace in float64 matrices: each_task and once [m, n], small [p, p] with p = min(m, n), wide [n, n].

    others: bytes per element and task for tensors that are not matrices, in addition to those of a weighted sum.
    """

    def workspace(num_tasks: int, shape: tuple[int, ...], **_args: object) -> int:
        if len(shape) < 2:
            return math.ceil((others * num_tasks + 40) * math.prod(shape))
        m, n = shape[0], math.prod(shape[1:])
        return math.ceil(8 * ((each_task * num_tasks + once) * m * n + small * min(m, n) ** 2 + wide * n * n))

    return workspace


def merge_matrices(
    deltas: Tensor, where: Where, matrices: Matrices, merge: Callable[[Tensor], Tensor], scale: float
) -> Tensor:
    """Apply scale · merge to a matrix, [k, m, n] float64 -> [m, n], and scale · mean to any other tensor.

    deltas: [k, *shape] float32; tensors that are not matrices may come in ranges [k, n]. Returns [*shape] or [n]
    float64.
    """
    if not is_matrix(where.tensor, where.shape, matrices) or deltas[0].numel() == 0:
        return scale * mean_tasks(deltas)
    return scale * merge(deltas.flatten(2).to(torch.float64)).view(deltas.shape[1:])
