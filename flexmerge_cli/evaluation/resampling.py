"""Means over tasks, resampled: every task's examples are drawn with repetition, the same for all models. Pure.

Draws are equal for equal seed and number of examples, so that models are compared on the same ones.
"""

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from flexmerge_cli.evaluation.intervals import RESAMPLES, SEED, resamples
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.scored import Scored

# R draws, n examples

MAX_KEPT = 4_000_000  # indices, 16 MB: of more examples the draws are made anew for every model


def draws_of(scored: Scored, seed: int, count: int = RESAMPLES) -> np.ndarray:
    """The metric's value in each of R draws, [R] float64; equal draws for equal seed and n."""
    outcomes = scored.outcomes
    if outcomes is not None and scored.n * count <= MAX_KEPT:
        return np.asarray(outcomes[_rows(scored.n, seed, count)].mean(axis=1))
    if outcomes is not None:
        return np.array([outcomes[rows].mean() for rows in resamples(scored.n, seed, count)])
    measure = METRICS[scored.metric].value
    return np.array([measure(scored.predictions[r], scored.labels[r]) for r in resamples(scored.n, seed, count)])


@functools.lru_cache(maxsize=32)
def _rows(n: int, seed: int, count: int) -> np.ndarray:
    """[R, n] int32: the draws of `resamples`, which many models share."""
    return np.array(list(resamples(n, seed, count)), np.int32)


def mean_drops(
    merged: Mapping[str, Scored], references: Mapping[str, Scored], *, relative: bool, seed: int = SEED
) -> tuple[float, np.ndarray]:
    """(mean drop over tasks, the same in each draw [R]); above 0 is worse. relative: as parts of the references."""
    drops, draws = [], []
    for number, (_, ours, theirs) in enumerate(_pairs(merged, references)):
        sign = 1.0 if ours.higher_is_better else -1.0
        ours_R, theirs_R = (draws_of(scored, _seed(seed, number)) for scored in (ours, theirs))
        drops.append(float(_drop(np.array(ours.value), np.array(theirs.value), sign, relative)))
        draws.append(_drop(ours_R, theirs_R, sign, relative))
    return float(np.mean(drops)), np.mean(draws, axis=0)


def mean_kept(
    merged: Mapping[str, Scored], references: Mapping[str, Scored], *, seed: int = SEED
) -> tuple[float, np.ndarray]:
    """(mean normalised score over tasks, the same in each draw [R]); 1 is as good as the fine-tuned models."""
    kept, draws = [], []
    for number, (_, ours, theirs) in enumerate(_pairs(merged, references)):
        ours_R, theirs_R = (draws_of(scored, _seed(seed, number)) for scored in (ours, theirs))
        kept.append(float(_kept(np.array(ours.value), np.array(theirs.value), ours.higher_is_better)))
        draws.append(_kept(ours_R, theirs_R, ours.higher_is_better))
    return float(np.mean(kept)), np.mean(draws, axis=0)


def _pairs(merged: Mapping[str, Scored], references: Mapping[str, Scored]) -> Iterator[tuple[str, Scored, Scored]]:
    for task, ours in merged.items():
        theirs = references[task]
        if ours.n != theirs.n or ours.metric != theirs.metric:
            raise ValueError(f"{task}: {ours.metric} of {ours.n} examples beside {theirs.metric} of {theirs.n}")
        yield task, ours, theirs


def _seed(seed: int, number: int) -> int:
    """Tasks are independent."""
    return seed * 1_000_003 + number


def _drop(ours: np.ndarray, theirs: np.ndarray, sign: float, relative: bool) -> np.ndarray:
    drop = sign * (theirs - ours)
    return _over(drop, theirs) if relative else np.asarray(drop)


def _kept(ours: np.ndarray, theirs: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Of nothing to keep, all is kept."""
    return _over(ours, theirs, 1.0) if higher_is_better else _over(theirs, ours, 1.0)


def _over(above: np.ndarray, below: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), otherwise)
