"""DARE: drops elements at random and rescales the rest."""

import math
from typing import Annotated, Any, Literal

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range, Scope, Where, per_element
from flexmerge_cli.methods.step import step
from flexmerge_cli.methods.sums import fold
from flexmerge_cli.random import key64, uniform

Rate = Annotated[float, Range(least=0, below=1)]
Seed = Annotated[int, Range(least=0)]


def draws(deltas: Tensor, where: Where, seed: int) -> Tensor:
    """Draw a number in [0, 1) per element, the same for any chunk, group, device and order. [M, *] -> float64.

    It is a function of the seed, the names of task and tensor, and the element's index in the tensor.
    """
    num_elements = deltas[0].numel()
    keys = [key64("flexmerge/drop/1", seed, task, where.tensor) for task in where.tasks]
    numbers = torch.stack([torch.from_numpy(uniform(key, where.start, num_elements)) for key in keys])
    return numbers.view(deltas.shape).to(deltas.device)


def with_l1_norm(kept: Tensor, whole: Tensor) -> Tensor:
    """Scale kept so that each task has the l1 norm of whole. [M, *shape] -> [M, *shape] float64; 0 stays 0."""
    kept = kept.double()
    for part, task in zip(kept, whole):
        norm, of_all = (fold(x.abs().double().flatten()) for x in (part, task))
        part *= torch.where(norm > 0, of_all / norm, 1.0)
    return kept


def l1_workspace(num_tasks: int, shape: tuple[int, ...]) -> int:
    """Return the bytes of with_l1_norm: the result, and the terms of one task padded to a power of two, twice."""
    return 8 * num_tasks * math.prod(shape) + 60 * math.prod(shape)


def _scope(*, rescale: bool | str, **_: object) -> Scope:
    return "tensor" if rescale == "l1" else "element"


def _workspace(num_tasks: int, shape: tuple[int, ...], **args: Any) -> int:
    extra = l1_workspace(num_tasks, shape) if args["rescale"] == "l1" else 0
    return extra + per_element(25, 8)(num_tasks, shape)


@step(paper="Yu et al. 2024", scope=_scope, workspace=_workspace)
def dare(
    deltas: Tensor, where: Where, *, p: Rate = 0.9, seed: Seed = 0, rescale: bool | Literal["l1"] = True
) -> Tensor:
    """Zero elements with probability p and divide the others by 1 - p, which keeps the mean. [M, n] float32 -> [M, n].

    rescale: false keeps the remaining values as they are; l1 scales each tensor to the l1 norm that it had, as mergekit
    does, and takes [M, *shape].
    Source: yule-BUAA/MergeLM. There all tasks share one stream of random numbers, so that another task changes every
    mask; here masks depend on names and indices alone.
    """
    dropped = draws(deltas, where, seed) < p
    if rescale == "l1":
        return with_l1_norm(torch.where(dropped, 0.0, deltas), deltas)
    return torch.where(dropped, 0.0, deltas.double() / (1 - p) if rescale else deltas.double())
