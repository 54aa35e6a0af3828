"""ASWUDI: SWUDI with a rank that follows from the spectrum of each matrix."""

import math
from typing import Literal

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_other, merge_matrices, of_matrices
from flexmerge_cli.methods.method import Where, method
from flexmerge_cli.methods.swudi import Init, solve

Rule = Literal["participation_sqrt", "participation", "stable_rank", "entropy", "none", "gavish_donoho"]


def rank(squares: Tensor, rule: Rule, m: int) -> int:
    """Return how many of the n eigenvalues to keep, 1 to n. squares [n] float64, falling, above 0; m: the size of the
    other side."""
    n, total = len(squares), squares.sum()
    if rule == "participation_sqrt":
        found = math.ceil((squares.sqrt().sum().square() / total).item())
    elif rule == "participation":
        found = math.ceil((total.square() / squares.square().sum()).item())
    elif rule == "stable_rank":
        found = math.ceil((squares.square().sum() / squares[0].square()).item())
    elif rule == "entropy":
        p = (squares / total).clamp(min=1e-30)
        found = math.ceil((-(p * p.log()).sum()).exp().item())
    elif rule == "gavish_donoho":
        values = squares.sqrt()
        found = int((values > _threshold(min(m, n) / max(m, n)) * values.median()).sum())
    else:
        found = n
    return min(n, max(1, found))


def _threshold(beta: float) -> float:
    """Return Gavish and Donoho's threshold for unknown noise as a multiple of the median, with the authors' median."""
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return omega / (math.sqrt((1 - beta) ** 2 + beta) if beta < 0.9999 else math.sqrt(2 + math.sqrt(3)))


@method(
    paper="Wei et al. 2026",
    scope="tensor",
    elementwise=is_other,
    when="like swudi, but without numbers to choose",
    workspace=of_matrices(1, 3.5, wide=4.2),
)
def aswudi(
    deltas: Tensor,
    where: Where,
    *,
    rule: Rule = "participation_sqrt",
    init: Init = "sum",
    scale: Scale = 1.0,
    matrices: Matrices = "linear",
) -> Tensor:
    """Find WUDI's minimiser in as many of the largest directions as the rule says. [k, *shape] float32 -> [*shape].

    rule: gavish_donoho is the authors' choice for full Llama deltas; none takes all directions, and divides by noise if
    the deltas have low rank. Directions left out keep `init`, as in swudi. Tensors that are not matrices get the mean.
    Source: WalkerWorldPeace/MLLMerging, where float32 can put a rank off by one at exact integers.
    """

    def merge(tasks: Tensor) -> Tensor:
        def weights(squares: Tensor) -> Tensor:
            kept = torch.arange(len(squares), device=squares.device) < rank(squares, rule, tasks.shape[1])
            return kept.to(squares.dtype)

        return solve(tasks, init, weights)

    return merge_matrices(deltas, where, matrices, merge, scale)
