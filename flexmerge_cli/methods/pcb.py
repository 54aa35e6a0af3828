"""PCB: parameters compete, inside a task by size and between tasks by agreement; the losers are dropped."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.methods.method import Fraction, Positive, Statistic, method, per_element
from flexmerge_cli.methods.places import AtPlaces, Found, magnitude_keys, magnitudes, value_keys, values
from flexmerge_cli.methods.reductions import sum_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """Per task of a group: the bounds of |τ| in the scope, and the threshold and maximum of its scores. [k] float64."""

    lowest: np.ndarray
    highest: np.ndarray
    threshold: np.ndarray
    best: np.ndarray


def clamped(deltas: Tensor, lowest: np.ndarray, highest: np.ndarray) -> tuple[Tensor, Tensor]:
    """|τ| inside the bounds, float64 [k, n], and the bounds' difference [k, 1]."""
    low, high = (torch.from_numpy(bound).to(deltas.device)[:, None] for bound in (lowest, highest))
    return deltas.abs().double().maximum(low).minimum(high), high - low


def scores(deltas: Tensor, lowest: np.ndarray, highest: np.ndarray) -> Tensor:
    """P = exp(k (own - 1)) · tanh(τ Σ τ), own the square of |τ| scaled to [0, 1]. [k, n] -> [k, n] float64.

    The authors' exp(k own) is e^k times as large, gives the same result, and overflows float32 from k = 89 on.
    """
    sizes, span = clamped(deltas, lowest, highest)
    start = torch.from_numpy(lowest).to(deltas.device)[:, None]
    own = torch.where(span > 0, (sizes - start) / span, 0.0).square()
    return (len(deltas) * (own - 1)).exp() * (deltas * sum_tasks(deltas)).tanh()


def _statistics(*, K: float, scope: Literal["block", "model", "tensor"], **_: object) -> Statistic:
    def bounds(n: int, _positive: int) -> tuple[int, int]:
        return n - int(0.0001 * n), n - max(0, int(0.9999 * n - 1))

    def thresholds(n: int, _positive: int) -> tuple[int, int]:
        return n - min(n - 1, int(n * (1 - K))), 1

    def compete(sizes: Found) -> AtPlaces:
        lowest, highest = magnitudes(sizes.key_RT).astype(np.float64).T

        def scored(found: Found) -> Competition:
            threshold, best = values(found.key_RT).T
            return Competition(lowest=lowest, highest=highest, threshold=threshold, best=best)

        return AtPlaces(
            scope=scope,
            per="group",
            keys=lambda deltas, _where: value_keys(scores(deltas, lowest, highest)),
            key_bytes=8,
            places=thresholds,
            then=scored,
        )

    return AtPlaces(
        scope=scope,
        per="group",
        keys=lambda deltas, _where: magnitude_keys(deltas),
        key_bytes=8,
        places=bounds,
        then=compete,
    )


@method(
    paper="Du et al. 2024",
    scope="element",
    statistics=_statistics,
    when="as ties, where size inside a task should count too",
    workspace=per_element(46, 64),
)
def pcb(
    deltas: Tensor,
    stats: Competition,
    *,
    K: Fraction = 0.1,
    scale: Positive = 1.0,
    scope: Literal["block", "model", "tensor"] = "block",
) -> Tensor:
    """Mean of the clamped deltas, weighted by the scores above each task's threshold. [k, n] float32 -> [n].

    K: fraction kept per task within `scope`; the authors' example has 0.05. scale: their search starts at 1.2.
    Magnitudes are clamped to their 0.01 % and 99.99 % places. A task whose scores are all equal has weight 1, or 0 if
    they are not above 0. Scores are float64 and depend on the group, so each group takes four or five passes. The
    method is not homogeneous: tanh of products of deltas saturates for deltas near 1.
    Source: duguodong7/pcb-merging. FlexMerge's code compares thresholds of all tasks over the model with scores of a
    group over its block; there K is the fraction that is dropped.
    """
    best, threshold = (torch.from_numpy(x).to(deltas.device)[:, None] for x in (stats.best, stats.threshold))
    sizes, _ = clamped(deltas, stats.lowest, stats.highest)
    span = best - threshold
    above = scores(deltas, stats.lowest, stats.highest).maximum(threshold) - threshold
    weight = torch.where(span > 0, above / span, (threshold > 0).double())
    total = sum_tasks(weight)
    return scale * torch.where(total > 0, sum_tasks(deltas.sign() * sizes * weight) / total, 0.0)
