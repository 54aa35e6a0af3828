"""Chooses the smallest bundle that keeps enough, on one half of the data, and reports it on the other half. Pure.

A point qualifies if the lower bound of a one-sided paired 95 % bootstrap of its mean normalised score reaches the
target; with `each`, that of every task must. The halves are drawn with a fixed seed, and both models of a pair see the
same examples. A point looks better on the data it was chosen on than it is, so the score to trust is that on the other
half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.curve import Point
from flexmerge_cli.evaluation.intervals import CONFIDENCE
from flexmerge_cli.evaluation.resampling import parts_kept
from flexmerge_cli.evaluation.scored import Scored

SEED = 20260101
Scores = Mapping[str, Scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptScore:
    """The part of the fine-tuned scores that a point keeps, on some data."""

    value: float
    """The mean over tasks."""
    low: float
    """The lower bound, with 95 % confidence."""
    worst: str
    """The task with the lowest bound."""
    worst_low: float
    n: int
    """The number of examples of the task that has the fewest."""

    def reaches(self, target: float, *, each: bool) -> bool:
        return (self.worst_low if each else self.low) >= target


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPoint:
    """The chosen point, and its scores on data that it was not chosen on."""

    point: Point
    qualifies: bool
    """Whether the point qualifies. If false, it is the best of the points that do not."""
    target: float
    each: bool
    chosen_on: KeptScore
    reported: KeptScore
    data: str
    """The data that it was chosen on, in words."""

    @property
    def message(self) -> str:
        what = "every task" if self.each else "the mean"
        found, reported = self.chosen_on, self.reported
        start = (
            f"{self.point.method} in {self.point.tensor_bytes:,} bytes is the smallest where {what} keeps "
            f"{self.target:g} of the fine-tuned score with 95 %"
            if self.qualifies
            else f"none is sure to keep {self.target:g} of the fine-tuned score ({what}, with 95 %); the best is "
            f"{self.point.method} in {self.point.tensor_bytes:,} bytes"
        )
        low = (found.worst_low, reported.worst_low) if self.each else (found.low, reported.low)
        return (
            f"{start}: {found.value:.4f}, at least {low[0]:.4f}, on {self.data}; "
            f"reported on the rest: {reported.value:.4f}, at least {low[1]:.4f} (worst task {reported.worst})"
        )

    def record(self) -> dict[str, Any]:
        def kept(found: KeptScore) -> dict[str, Any]:
            return {
                "value": found.value, "low": found.low, "worst": found.worst, "worst_low": found.worst_low,
                "n": found.n,
            }  # fmt: skip

        return {
            "qualifies": self.qualifies,
            "target": self.target,
            "of": "each task" if self.each else "mean",
            "method": self.point.method,
            "sizes": list(self.point.sizes),
            "bytes": self.point.tensor_bytes,
            "total_bytes": self.point.total_bytes,
            "command": self.point.command,
            "chosen_on": kept(self.chosen_on) | {"data": self.data},
            "reported": kept(self.reported),
            "message": self.message,
        }


def choose(
    points: Sequence[tuple[Point, Scores, Scores]],
    references: tuple[Scores, Scores],
    target: float,
    *,
    each: bool,
    data: str,
) -> ChosenPoint:
    """Choose the smallest point in bytes that qualifies or, if none does, the one with the highest bound.

    points, references: the scores on the data to choose on, and those on the data to report. Among points of one size
    the better one is chosen.
    """
    found = []
    for point, tuned_on, reported in points:
        on = kept_of(tuned_on, references[0])
        found.append((point, on, reported))
    good = [item for item in found if item[1].reaches(target, each=each)]
    if good:
        point, on, reported = min(good, key=lambda item: (item[0].tensor_bytes, item[0].total_bytes, -item[1].value))
    else:
        point, on, reported = max(found, key=lambda item: item[1].worst_low if each else item[1].low)
    return ChosenPoint(
        point=point,
        qualifies=bool(good),
        target=target,
        each=each,
        chosen_on=on,
        reported=kept_of(reported, references[1]),
        data=data,
    )


def kept_of(merged: Scores, references: Scores) -> KeptScore:
    parts = parts_kept(merged, references)
    draws_TR = np.array([draws_R for _, draws_R in parts.values()])
    bounds = {task: float(np.quantile(draws_R, 1 - CONFIDENCE)) for task, (_, draws_R) in parts.items()}
    worst = min(bounds, key=lambda task: bounds[task])
    return KeptScore(
        value=float(np.mean([value for value, _ in parts.values()])),
        low=float(np.quantile(draws_TR.mean(axis=0), 1 - CONFIDENCE)),
        worst=worst,
        worst_low=bounds[worst],
        n=min(scored.n for scored in merged.values()),
    )


def halves(scores: Scores) -> tuple[dict[str, Scored], dict[str, Scored]]:
    """Split every task's examples into two halves. Raises UsageError for fewer than two, or if there are none to
    split."""
    one, other = {}, {}
    for task, scored in scores.items():
        if scored.given is not None or scored.n < 2:
            raise UsageError(
                f"task `{task}` has no examples to choose on and others to report on",
                hint="--tune-spec with other data, or a kind that scores examples",
            )
        order = np.random.default_rng([SEED, scored.n]).permutation(scored.n)
        one[task], other[task] = (scored.take(np.sort(part)) for part in np.split(order, [scored.n // 2]))
    return one, other
