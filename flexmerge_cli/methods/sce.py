"""SCE: selects the elements on which the tasks differ most, weighs each task by its energy there, erases the
minority."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import (
    Fraction,
    Positive,
    Scope,
    Statistic,
    StatisticScope,
    Where,
    method,
    per_element,
)
from flexmerge_cli.methods.places import value_keys
from flexmerge_cli.methods.reductions import elect, mean_tasks, only, sum_tasks
from flexmerge_cli.methods.selection import Kept, keep_largest, places_of
from flexmerge_cli.methods.sums import Sums, fold


@dataclass(frozen=True, slots=True)
class Shares:
    """The selected elements and the weight of each task, for a group."""

    kept: Kept | None
    """The elements selected by variance, in one row. None means all."""
    weight_k: np.ndarray


def variance(deltas: Tensor) -> Tensor:
    """Compute the population variance over tasks. [k, *] -> [*] float64."""
    mean = mean_tasks(deltas)
    return sum_tasks((deltas.double() - mean).square()) / len(deltas)


def _variance_keys(deltas: Tensor, _where: Where) -> Tensor:
    return value_keys(variance(deltas))[None]


def _select(deltas: Tensor, where: Where, kept: Kept | None) -> Tensor:
    if kept is None:
        return deltas
    return only(kept.mask(_variance_keys(deltas, where), where), deltas)


def _weights(energy: np.ndarray) -> np.ndarray:
    """Return each task's share of the energy, [k, *]; equal shares if there is no energy."""
    total = energy.sum(0)
    found: np.ndarray = np.divide(energy, total, out=np.full_like(energy, 1 / len(energy)), where=total > 0)
    return found


def _scope(*, scope: str, **_: object) -> Scope:
    return "row" if scope == "row" else "element"


def _statistics(*, density: float, scope: Literal["tensor", "block", "row"], **_: object) -> Statistic | None:
    if scope == "row":
        return None
    if density == 1:
        return _energies(None, scope)

    def counts(num_elements: int, differing: int) -> tuple[int]:
        return (max(1, int(differing * density)) if differing else num_elements,)

    return keep_largest(
        scope=scope, per="group", keys=_variance_keys, counts=counts, then=lambda kept: _energies(kept, scope)
    )


def _energies(kept: Kept | None, scope: StatisticScope) -> Sums:
    def terms(deltas: Tensor, where: Where) -> Iterable[Tensor]:
        yield _select(deltas, where, kept).double().square()

    return Sums(scope=scope, per="group", terms=terms, then=lambda energy: Shares(kept, _weights(energy)))


@method(
    paper="Wan et al. 2024",
    scope=_scope,
    statistics=_statistics,
    when="few tasks that disagree in a few places",
    workspace=per_element(32, 32),
)
def sce(
    deltas: Tensor,
    where: Where,
    stats: Shares | None,
    *,
    density: Fraction = 0.1,
    scale: Positive = 1.0,
    scope: Literal["tensor", "block", "row"] = "tensor",
) -> Tensor:
    """Take the weighted mean, of the elected sign, of the elements that vary most over tasks. [k, n] float32 -> [n].

    density: the fraction of the elements with variance above 0; 1 selects all (mergekit's default). A task's weight is
    its share of the selected squares. If no element differs, nothing is zeroed. scope=row: [k, r, n] -> [r, n].
    Source: arcee-ai/mergekit. There squares that sum to less than 1e-6 give equal weights, as in most tensors of a
    language model, and a tensor on which all tasks agree returns to the base.
    """
    if stats is None:
        deltas, weight = _rows(deltas, where, density)
    else:
        deltas = _select(deltas, where, stats.kept)
        weight = torch.from_numpy(stats.weight_k).to(deltas.device)[:, None]
    agreeing = torch.where(deltas * elect(deltas) > 0, weight, 0.0)
    total = sum_tasks(agreeing)
    return scale * torch.where(total > 0, sum_tasks(agreeing * deltas) / total, 0.0)


def _rows(deltas: Tensor, where: Where, density: float) -> tuple[Tensor, Tensor]:
    """Select the elements and weigh the tasks of each row, in memory. [k, r, n] -> the same, [k, r, 1]."""
    if density < 1:
        differences = variance(deltas)
        differing = (differences > 0).sum(-1, keepdim=True)
        count = (differing * density).double().trunc().clamp(min=1).where(differing > 0, deltas.shape[-1])
        deltas = torch.where(places_of(value_keys(differences)[None], where)[0] < count, deltas, 0.0)
    energy = fold(deltas.double().square()).cpu().numpy()
    return deltas, torch.from_numpy(_weights(energy)).to(deltas.device)[..., None]
