"""Which tensors spectral methods see as matrices, and what they do with the others.

    2d       two axes, and no `text_projection` in the name: the rule of most authors' codes
    linear   two axes of two and more, and no embedding, output head or position bias by its name (the default)
    all      two axes and more, seen as [out, the rest], both of two and more, whatever the name

The other tensors get the mean of the group's task vectors, so convolutions do unless `all` is asked for. Tensors are
taken as they are stored; fused weights (q, k and v in one) are one matrix.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor

from flexmerge_cli.methods.method import Range, Where
from flexmerge_cli.methods.reductions import mean_tasks

Matrices = Literal["linear", "2d", "all"]
Scale = Annotated[float, Range(above=0)]

# Whole dotted parts of a name, in lower case, that tell a tensor `linear` leaves out; besides all with `embed` in them.
NOT_LINEAR = {"wte", "wpe", "shared", "lm_head", "text_projection", "relative_attention_bias"}


def is_matrix(tensor: str, shape: tuple[int, ...], matrices: Matrices) -> bool:
    """Whether the rule takes this tensor."""
    if matrices == "2d":
        return len(shape) == 2 and "text_projection" not in tensor
    if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2:
        return False
    parts = tensor.lower().split(".")
    return matrices == "all" or (len(shape) == 2 and not any("embed" in part or part in NOT_LINEAR for part in parts))


def is_other(tensor: str, shape: tuple[int, ...], *, matrices: Matrices, **_: object) -> bool:
    """Whether it gets the mean, which any range of it can be given."""
    return not is_matrix(tensor, shape, matrices)


def merge_matrices(
    deltas: Tensor, where: Where, matrices: Matrices, merge: Callable[[Tensor], Tensor], scale: float
) -> Tensor:
    """scale · merge of a matrix [k, m, n] float64 -> [m, n]; of any other tensor scale · mean.

    deltas [k, *shape] float32, of other tensors also any range of them, [k, n]. Returns [*shape] or [n] float64.
    """
    if not is_matrix(where.tensor, where.shape, matrices) or deltas[0].numel() == 0:
        return scale * mean_tasks(deltas)
    return scale * merge(deltas.flatten(2).to(torch.float64)).view(deltas.shape[1:])
