"""SWUDI: finds the minimiser of WUDI in closed form, with a filter on the spectrum that it inverts."""

import math
from collections.abc import Callable
from typing import Literal

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_other, merge_matrices, of_matrices
from flexmerge_cli.methods.method import Fraction, Positive, Where, method
from flexmerge_cli.methods.reductions import mean_tasks, sum_tasks
from flexmerge_cli.methods.wudi import interference

Init = Literal["sum", "mean", "zero"]

# The smallest eigenvalue of C that is used. The trace of C is the number of nonzero tasks, whatever their scale.
FLOOR = 1e-8


def solve(tasks: Tensor, init: Init, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute θ_0 - θ_0 V f Vᵀ + D V (f/λ) Vᵀ with C = V λ Vᵀ, f = weights(λ), λ falling. [k, m, n] float64 -> [m,
    n]."""
    c, d = interference(tasks)
    squares, v = torch.linalg.eigh(c)
    squares, v = squares.flip(0).clamp(min=FLOOR), v.flip(1)
    f = weights(squares)
    starts: dict[Init, Callable[[Tensor], Tensor]] = {
        "sum": sum_tasks,
        "mean": mean_tasks,
        "zero": lambda _tasks: torch.zeros_like(d),
    }
    start = starts[init](tasks)
    found: Tensor = start + (((d @ v) / squares - start @ v) * f) @ v.T
    return found


@method(
    paper="Wei et al. 2026",
    scope="tensor",
    elementwise=is_other,
    when="little interference between tasks without data; init=mean for language models",
    workspace=of_matrices(1, 3.5, wide=4.2),
)
def swudi(
    deltas: Tensor,
    where: Where,
    *,
    time: Positive = 1300.0,
    ratio: Fraction = 0.65,
    init: Init = "sum",
    scale: Scale = 1.0,
    matrices: Matrices = "linear",
) -> Tensor:
    """Stop the gradient flow of WUDI's loss at `time`, in the `ratio` largest directions. [k, *shape] -> [*shape].

    Directions left out keep `init` of the tasks: their sum, or their mean, which reproduces a task from k copies of it.
    time, ratio: the authors use 1300 and 0.65 for ViT-B/32 and eight tasks, 300 and 0.85 for Llama-3.2-3B.
    Tensors that are not matrices get the mean. One eigendecomposition of n × n: seconds at 3072, minutes at 11008.
    Source: WalkerWorldPeace/MLLMerging, not the paper's text.
    """

    def weights(squares: Tensor) -> Tensor:
        n = len(squares)
        kept = torch.arange(n, device=squares.device) < min(n, max(1, math.floor(n * ratio + 0.999)))
        return torch.where(kept, -torch.expm1(-squares * time), 0.0)

    return merge_matrices(deltas, where, matrices, lambda tasks: solve(tasks, init, weights), scale)
