"""Implements Fisher merging: every element is weighted by how much the task's own predictions depend on it."""

from typing import Annotated, Any

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range, method, per_element
from flexmerge_cli.methods.reductions import mean_tasks


@method(
    paper="Matena and Raffel 2022",
    scope="element",
    reads="fisher",
    workspace=per_element(20, 40),
    when="a few examples of each task, and tasks that depend on different weights",
)
def fisher(deltas: Tensor, measured: Any, *, floor: Annotated[float, Range(least=0)] = 0.01) -> Tensor:
    """Mean of the task vectors, each element weighted by its Fisher information. [k, n] float32 -> [n].

    The weight of an element is its task's diagonal Fisher information, divided by the mean of that over the tensor,
    plus floor, which keeps elements that matter to nobody near the plain mean. Each task is divided by its own mean, so
    no task outweighs the others. Elements whose weights are all 0, and tensors without Fisher information, get the
    plain mean. Released code takes the larger of the information and 1e-6 instead, whatever the scale of the gradients.
    """
    if measured is None:
        return mean_tasks(deltas)
    fisher_kn, means = measured
    total, weight = torch.zeros_like(deltas[0], dtype=torch.float64), torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta, row, mean in zip(deltas, torch.from_numpy(fisher_kn).to(deltas.device), means):
        own = row.double() / mean + floor if mean > 0 else torch.full_like(total, floor)
        weight += own
        total += own * delta.double()
    return torch.where(weight > 0, total / weight, mean_tasks(deltas))
