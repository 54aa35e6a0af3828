"""Resamples means over tasks: every task's examples are drawn with repetition, identically for all models. Pure.

The seed is the task's number, so that draws of tasks are independent.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from flexmerge_cli.evaluation.intervals import resampled_values
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.scored import Scored

# R draws, n examples


def mean_drops(
    merged: Mapping[str, Scored], references: Mapping[str, Scored], *, relative: bool
) -> tuple[float, np.ndarray]:
    """Return (mean drop over tasks, the same in each draw [R]); above 0 is worse.

    relative: as fractions of the references; otherwise in points / 100, where a unit of perplexity or divergence is
    one point.
    """
    drops, draws = [], []
    for number, (_, ours, theirs) in enumerate(_pairs(merged, references)):
        sign = 1.0 if ours.higher_is_better else -1.0
        if not relative and not METRICS[ours.metric].percent:
            sign /= 100  # one unit of the metric is a point
        ours_R, theirs_R = (resampled_values(scored, number) for scored in (ours, theirs))
        drops.append(float(_drop(np.array(ours.value), np.array(theirs.value), sign, relative)))
        draws.append(_drop(ours_R, theirs_R, sign, relative))
    return float(np.mean(drops)), np.mean(draws, axis=0)


def parts_kept(merged: Mapping[str, Scored], references: Mapping[str, Scored]) -> dict[str, tuple[float, np.ndarray]]:
    """Map each task to (normalised score, the same in each draw [R]); 1 is as good as the fine-tuned model."""
    found = {}
    for number, (task, ours, theirs) in enumerate(_pairs(merged, references)):
        ours_R, theirs_R = (resampled_values(scored, number) for scored in (ours, theirs))
        value = float(_kept(np.array(ours.value), np.array(theirs.value), ours.higher_is_better))
        found[task] = value, _kept(ours_R, theirs_R, ours.higher_is_better)
    return found


def _pairs(merged: Mapping[str, Scored], references: Mapping[str, Scored]) -> Iterator[tuple[str, Scored, Scored]]:
    for task, ours in merged.items():
        theirs = references[task]
        if ours.n != theirs.n or ours.metric != theirs.metric:
            raise ValueError(f"{task}: {ours.metric} of {ours.n} examples beside {theirs.metric} of {theirs.n}")
        yield task, ours, theirs


def _drop(ours: np.ndarray, theirs: np.ndarray, sign: float, relative: bool) -> np.ndarray:
    drop = sign * (theirs - ours)
    return _over(drop, theirs) if relative else np.asarray(drop)


def _kept(ours: np.ndarray, theirs: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Return the fraction kept; 1 if the reference has nothing to keep."""
    return _over(ours, theirs, 1.0) if higher_is_better else _over(theirs, ours, 1.0)


def _over(above: np.ndarray, below: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), otherwise)
