"""Model Stock: the mean, moved towards the base by as much as the tasks disagree in direction."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Scope, Where, method, per_element
from flexmerge_cli.methods.reductions import mean_tasks
from flexmerge_cli.methods.sums import Sums, gram, square


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of the task vectors over a scope, [M, M] float64."""

    products: np.ndarray

    def take(self, tasks: list[int]) -> "Gram":
        return Gram(self.products[np.ix_(tasks, tasks)])


def _scope(*, scope: str) -> Scope:
    return "row" if scope == "row" else "element"


def _statistics(*, scope: Literal["row", "tensor", "block"]) -> Sums | None:
    if scope == "row":
        return None

    def triangle(deltas: Tensor, _where: Where) -> Iterable[Tensor]:
        vectors = deltas.double()
        return (vectors[i] * vectors[i:] for i in range(len(vectors)))

    def products(sums: np.ndarray) -> Gram:
        num_tasks = (int((8 * len(sums) + 1) ** 0.5) - 1) // 2
        return Gram(square(sums, num_tasks))

    return Sums(scope=scope, terms=triangle, then=products)


def ratio(gram_kk: Tensor) -> Tensor:
    """Compute the fraction of the mean kept: t = k c / (1 + (k - 1) c), c the mean cosine, at least 0. [k, k, *] ->
    [*].

    It is in [0, 1]. Two zero vectors have cosine 1; a zero vector and another have cosine 0.
    """
    k = len(gram_kk)
    if k == 1:
        return torch.ones_like(gram_kk[0, 0])
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            squares = gram_kk[i, i] * gram_kk[j, j]
            cosine = (gram_kk[i, j] / squares.sqrt()).clamp(-1, 1)
            both_zero = ((gram_kk[i, i] == 0) & (gram_kk[j, j] == 0)).to(cosine.dtype)
            cosines.append(torch.where(squares == 0, both_zero, cosine))
    mean = (sum(cosines[1:], cosines[0]) / len(cosines)).clamp(min=0)
    return k * mean / (1 + (k - 1) * mean)


@method(
    paper="Jang et al. 2024",
    scope=_scope,
    statistics=_statistics,
    when="fine-tunes of one task, whose mean overshoots",
    workspace=per_element(46, 16),
)
def model_stock(deltas: Tensor, stats: Gram | None, *, scope: Literal["row", "tensor", "block"] = "tensor") -> Tensor:
    """Multiply the mean of the task vectors by a ratio that follows from their mean cosine. [k, n] float32 -> [n].

    scope: what the cosines and the ratio are computed over; scope=row takes [k, r, n] and returns [r, n].
    Source: arcee-ai/mergekit, which bounds products of norms below by 1e-6, so that small deltas get too small a ratio,
    and uses negative mean cosines, which moves away from the mean or divides by 0. tanganke/fusion_bench averages
    angles, not cosines. mergekit's filter_wise equals scope=row for tensors of one and two axes.
    """
    if stats is None:
        pairs = gram(deltas)
        upper = torch.triu_indices(len(deltas), len(deltas))
        gram_kk = pairs.new_zeros(len(deltas), len(deltas), *pairs.shape[1:])
        gram_kk[upper[0], upper[1]] = pairs
        return ratio(gram_kk)[:, None] * mean_tasks(deltas)
    return ratio(torch.from_numpy(stats.products)).to(deltas.device) * mean_tasks(deltas)
