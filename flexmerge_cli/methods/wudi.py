"""WUDI: finds by Adam the matrix whose difference to each task is as orthogonal as possible to that task's rows."""

from typing import Annotated

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_other, merge_matrices, of_matrices
from flexmerge_cli.methods.method import Positive, Range, Where, method
from flexmerge_cli.methods.reductions import sum_tasks


def interference(tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Compute C = Σ τᵀτ/‖τ‖² [n, n] and D = Σ τ τᵀτ/‖τ‖² [m, n] without tasks of norm 0. [k, m, n] float64.

    The loss Σ ‖(θ - τ) τᵀ‖²/‖τ‖² has the gradient 2 (θ C - D).
    """
    _, m, n = tasks.shape
    c, d = tasks.new_zeros(n, n), tasks.new_zeros(m, n)
    for task in tasks:
        square = task.square().sum()
        if square > 0:
            gram = task.T @ task / square
            c += gram
            d += task @ gram
    return c, d


def descend(tasks: Tensor, steps: int, lr: float) -> Tensor:
    """Run Adam from the sum of the tasks, β = 0.9 and 0.999, ε = 1e-8. [k, m, n] float64 -> [m, n]."""
    c, d = interference(tasks)
    merged = sum_tasks(tasks)
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = 2 * (merged @ c - d)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        slope = (second / (1 - 0.999**step)).sqrt() + 1e-8
        merged = merged - lr * (first / (1 - 0.9**step)) / slope
    return merged


@method(
    paper="Cheng et al. 2025",
    scope="tensor",
    elementwise=is_other,
    when="for comparison; swudi is the same in closed form, and fast",
    workspace=of_matrices(1, 16, wide=3.5),
)
def wudi(
    deltas: Tensor,
    where: Where,
    *,
    steps: Annotated[int, Range(least=1)] = 300,
    lr: Positive = 1e-5,
    scale: Scale = 1.0,
    matrices: Matrices = "linear",
) -> Tensor:
    """Minimise Σ ‖(θ - τ_i) τ_iᵀ‖²/‖τ_i‖² by a few hundred steps of Adam from Σ τ_i. [k, *shape] float32 -> [*shape].

    lr: absolute, so an element moves by about steps·lr at most, and the result depends on the scale of the deltas.
    Tensors that are not matrices get the mean. A matrix of 768 × 3072 takes minutes on one core.
    Source: nathanielyvo/WUDI-Merging, which leaves all but attention and MLP weights at the base, and gives NaN for a
    zero task; tanganke/fusion_bench takes the mean, as here, and 400 steps.
    """
    return merge_matrices(deltas, where, matrices, lambda tasks: descend(tasks, steps, lr), scale)
