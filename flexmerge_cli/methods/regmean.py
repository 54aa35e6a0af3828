"""Implements RegMean: the matrix whose outputs are nearest to those of all tasks, each on its own inputs."""

import math
from typing import Annotated, Any

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range, Where, method
from flexmerge_cli.methods.reductions import mean_tasks

# Moments are float32: of n directions, those smaller than n times this part of the largest one are rounding errors.
FLOAT32_EPSILON = 2.0**-23


def _workspace(num_tasks: int, shape: tuple[int, ...], **_args: Any) -> int:
    """Return the bytes of four [m, n] and six [n, n] in float64 or, without inputs, of the weights and a mean.

    Which axis has the inputs is not known here, so the longer one counts.
    """
    if len(shape) < 2:
        return (12 * num_tasks + 48) * math.prod(shape)
    m, n = shape[0], math.prod(shape[1:])
    return 8 * (4 * m * n + 6 * max(m, n) ** 2)


@method(
    paper="Jin et al. 2023",
    scope="tensor",
    reads="inputs",
    workspace=_workspace,
    when="one dense model, and a few unlabelled examples of each task",
)
def regmean(
    deltas: Tensor, where: Where, measured: Any, *, alpha: Annotated[float, Range(least=0, most=1)] = 0.9
) -> Tensor:
    """Least squares of each layer's outputs over the tasks' own inputs. [k, *shape] -> [*shape].

    With G the mean of x·xᵀ over a task's inputs, its elements off the diagonal multiplied by alpha, it solves
    D·ΣG = Σ(τ - τ̄)·G for the deviation D from the mean τ̄ of the task vectors. What no input determines keeps the mean:
    D is then the solution of least norm. Of an embedding table, whose inputs are rows, it is the mean of each row,
    weighted by how often each task looked it up. Tensors whose inputs were not measured get the mean.
    """
    if measured is None or deltas[0].numel() == 0:
        return mean_tasks(deltas)
    if measured.layout == "embedding":
        return _mean_rows(deltas, where, measured)
    is_conv1d = measured.layout == "conv1d"
    mean, shape = mean_tasks(deltas), deltas.shape[1:]
    total = right = None
    for task, delta in enumerate(deltas):
        gram = torch.from_numpy(measured[task]).to(deltas.device, torch.float64)
        diagonal = gram.diagonal().clone()
        gram.mul_(alpha).diagonal().copy_(diagonal)
        apart = (delta.double() - mean).reshape(shape[0], -1)
        product = (apart.T if is_conv1d else apart) @ gram
        total = gram if total is None else total.add_(gram)
        right = product if right is None else right.add_(product)
    assert total is not None and right is not None
    found = _solve(total, right)
    return mean + (found.T if is_conv1d else found).reshape(shape)


def _mean_rows(deltas: Tensor, where: Where, counts: Any) -> Tensor:
    """Average a range of a table, [k, n], into [n] float64. A row that no task looked up gets the plain mean."""
    width = max(1, math.prod(where.shape[1:]))
    row_n = torch.arange(where.start, where.start + deltas.shape[1], device=deltas.device) // width
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    weight = torch.zeros_like(total)
    for task, delta in enumerate(deltas):
        count = torch.tensor(counts[task], dtype=torch.float64, device=deltas.device)[row_n]
        total += count * delta.double()
        weight += count
    return torch.where(weight > 0, total / weight, mean_tasks(deltas))


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Return the X of least norm, [m, n], for which X·gram is nearest to right.

    gram: [n, n], symmetric and positive semidefinite. right: [m, n].
    """
    smallest = len(gram) * FLOAT32_EPSILON * gram.diagonal().max()
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0 and bool(factor.diagonal().square().min() > smallest):
        return torch.cholesky_solve(right.T, factor).T
    values, vectors = torch.linalg.eigh(gram)
    keep = values > smallest
    basis = vectors[:, keep]
    found: Tensor = (right @ basis / values[keep]) @ basis.T
    return found
