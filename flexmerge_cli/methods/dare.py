"""DARE: drop elements at random and rescale the rest."""

from typing import Annotated

import torch
from torch import Tensor

from flexmerge_cli.methods.method import Range, Where, per_element
from flexmerge_cli.methods.step import step
from flexmerge_cli.random import key64, uniform

Rate = Annotated[float, Range(least=0, below=1)]
Seed = Annotated[int, Range(least=0)]


def draws(deltas: Tensor, where: Where, seed: int) -> Tensor:
    """A number in [0, 1) for each element, the same whatever the chunk, group, device and order. [M, *] -> float64.

    A function of seed, task name, tensor name and index of the element in the tensor.
    """
    num_elements = deltas[0].numel()
    keys = [key64("flexmerge/drop/1", seed, task, where.tensor) for task in where.tasks]
    numbers = torch.stack([torch.from_numpy(uniform(key, where.start, num_elements)) for key in keys])
    return numbers.view(deltas.shape).to(deltas.device)


@step(paper="Yu et al. 2024", scope="element", workspace=per_element(25, 8))
def dare(deltas: Tensor, where: Where, *, p: Rate = 0.9, seed: Seed = 0) -> Tensor:
    """Zero elements with probability p and divide the others by 1 - p, which keeps the mean. [M, n] float32 -> [M, n].

    Source: yule-BUAA/MergeLM. There one stream of random numbers runs over all tasks, so that one task more changes
    every mask; here an element's fate hangs on names and index alone.
    """
    dropped = draws(deltas, where, seed) < p
    return torch.where(dropped, 0.0, deltas.double() / (1 - p))
