"""PCB: lets parameters compete, inside a task by size and between tasks by agreement, and drops the losers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Fraction, Per, Positive, Scope, Statistic, StatisticScope, method, per_element
from flexmerge_cli.methods.places import AtPlaces, FoundKeys, magnitudes, value_keys, values
from flexmerge_cli.methods.reductions import flat, sum_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """The bounds of |τ| in the scope, and the threshold and maximum of its scores. [k] float64."""

    lowest: np.ndarray
    highest: np.ndarray
    threshold: np.ndarray
    best: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The threshold and maximum of each task's scores among all tasks and over the whole model. [M] float64."""

    threshold: np.ndarray
    best: np.ndarray
    num_tasks: int
    """M, also after `take` selected some tasks."""

    def take(self, tasks: list[int]) -> "Thresholds":
        return Thresholds(threshold=self.threshold[tasks], best=self.best[tasks], num_tasks=self.num_tasks)


Within = Literal["block", "model", "tensor", "whole"]


def clamped(deltas: Tensor, lowest: np.ndarray, highest: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return |τ| clamped to the bounds, float64 [k, n], and the bounds' difference [k, 1]."""
    low, high = (torch.from_numpy(bound).to(deltas.device)[:, None] for bound in (lowest, highest))
    return deltas.abs().double().maximum(low).minimum(high), high - low


def scores(deltas: Tensor, lowest: np.ndarray, highest: np.ndarray) -> Tensor:
    """Compute P = exp(k (own - 1)) · tanh(τ Σ τ), own the square of |τ| scaled to [0, 1]. [k, n] -> [k, n] float64.

    The authors' exp(k own) is e^k times as large, gives the same result, and overflows float32 from k = 89 on.
    """
    return _scores(deltas, sum_tasks(deltas), len(deltas), lowest, highest)


def _scores(deltas: Tensor, total: Tensor, k: int, lowest: np.ndarray, highest: np.ndarray) -> Tensor:
    """Compute the scores of some of k tasks whose sum is known."""
    sizes, span = clamped(deltas, lowest, highest)
    start = torch.from_numpy(lowest).to(deltas.device)[:, None]
    own = torch.where(span > 0, (sizes - start) / span, 0.0).square()
    return (k * (own - 1)).exp() * (deltas * total).tanh()


def _bound_places(n: int) -> tuple[int, int]:
    """Return the places of the bounds of magnitudes, counted from the smallest, 0, of n."""
    return int(0.0001 * n), max(0, int(0.9999 * n - 1))


def _statistics(*, K: float, scope: Within, **_: object) -> Statistic:
    over: StatisticScope = "model" if scope in ("model", "whole") else scope  # type: ignore[assignment]
    per: Per = "task" if scope == "model" else "group"

    def bounds(n: int, _positive: int) -> tuple[int, int]:
        low, high = _bound_places(n)
        return n - low, n - high

    def thresholds(n: int, _positive: int) -> tuple[int, int]:
        return n - min(n - 1, int(n * (1 - K))), 1

    def compete(sizes: FoundKeys) -> AtPlaces:
        lowest, highest = magnitudes(sizes.key_RT).astype(np.float64).T

        def scored(found: FoundKeys) -> Competition | Thresholds:
            threshold, best = values(found.key_RT).T
            if scope == "model":
                return Thresholds(threshold=threshold, best=best, num_tasks=len(best))
            return Competition(lowest=lowest, highest=highest, threshold=threshold, best=best)

        return AtPlaces(
            scope=over,
            per=per,
            keys=lambda deltas, _where: value_keys(scores(deltas, lowest, highest)),
            key_bytes=8,
            places=thresholds,
            then=scored,
        )

    return AtPlaces(
        scope=over,
        per=per,
        key_bytes=8,
        places=bounds,
        then=compete,
    )


def _scope(*, scope: Within, **_: object) -> Scope:
    return "block" if scope == "model" else "element"


def _workspace(num_tasks: int, shape: tuple[int, ...], *, scope: Within, **_: object) -> int:
    return (per_element(46, 170) if scope == "model" else per_element(46, 64))(num_tasks, shape)


@method(
    paper="Du et al. 2024",
    scope=_scope,
    statistics=_statistics,
    when="like ties, where size within a task should count too",
    workspace=_workspace,
)
def pcb(
    deltas: Any,
    stats: Any,
    *,
    K: Fraction = 0.1,
    scale: Positive = 1.0,
    scope: Within = "block",
) -> Any:
    """Average the clamped deltas, weighted by the scores above each task's threshold. [k, n] float32 -> [n].

    K: fraction kept per task; the authors' example uses 0.05. scale: their search starts at 1.2. scope: where the tasks
    of a group compete, with `whole` for the whole model; or `model` for FlexMerge's release, where each of all tasks
    sets a threshold over the whole model, which applies to the scores of a group in a block: {name: [k, *shape]} of a
    block -> {name: [*shape]}. Its K is the dropped fraction, 1 - K here. Magnitudes are clamped to their 0.01 % and
    99.99 % places. A task whose scores are all equal has weight 1, or 0 if they are not above its threshold. Scores are
    float64 and depend on the group, so each group takes four or five passes, except with `model`. The method is not
    homogeneous: tanh of products of deltas saturates for deltas near 1.
    Source: duguodong7/pcb-merging; sacs-epfl/flexmerge, which has NaN where a block has no score above the threshold.
    """
    if scope == "model":
        return {name: scale * merged for name, merged in _with_thresholds(deltas, stats).items()}
    best, threshold = (torch.from_numpy(x).to(deltas.device)[:, None] for x in (stats.best, stats.threshold))
    span = best - threshold
    above = scores(deltas, stats.lowest, stats.highest).maximum(threshold) - threshold
    weight = torch.where(span > 0, above / span, (threshold > 0).double())
    return scale * _weighted(deltas, weight, stats.lowest, stats.highest)


def _weighted(deltas: Tensor, weight: Tensor, lowest: np.ndarray, highest: np.ndarray) -> Tensor:
    sizes, _ = clamped(deltas, lowest, highest)
    total = sum_tasks(weight)
    return torch.where(total > 0, sum_tasks(deltas.sign() * sizes * weight) / total, 0.0)


def _with_thresholds(deltas: Mapping[str, Tensor], stats: Thresholds) -> dict[str, Tensor]:
    """Merge as FlexMerge does: score the block in memory, cut off at the model's thresholds, and scale to [0, 1].

    It handles one task after another, which takes the memory of one.
    """
    rows = torch.cat([flat(delta) for delta in deltas.values()], 1)
    k, n = rows.shape
    above, below = (torch.zeros(n, dtype=torch.float64, device=rows.device) for _ in range(2))
    total = sum_tasks(rows)
    # Scores are e^-k times the authors', so they compare with thresholds of other group sizes only after this.
    unit = np.exp(min(stats.num_tasks - k, 700))
    places = _bound_places(n)
    for row, threshold, best in zip(rows if n else (), stats.threshold * unit, stats.best * unit):
        lowest, highest = np.partition(row.abs().cpu().numpy(), places)[[*places], None].astype(np.float64)
        weight = _scores(row[None], total, k, lowest, highest)[0].clamp_(threshold, best)
        least, most = float(weight.min()), float(weight.max())
        weight = (weight - least) / (most - least) if most > least else torch.full_like(weight, least > threshold)
        above += clamped(row[None], lowest, highest)[0][0].mul_(row.sign()).mul_(weight)
        below += weight
    merged, found, start = torch.where(below > 0, above / below, 0.0), {}, 0
    for name, delta in deltas.items():
        stop = start + delta[0].numel()
        found[name], start = merged[start:stop].view(delta.shape[1:]), stop
    return found
