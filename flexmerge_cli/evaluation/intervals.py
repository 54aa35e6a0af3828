"""Computes 95 % intervals of scores, and the paired difference of two models on the same examples.

Proportions have Wilson's interval with the correction of Brown, Cai and DasGupta (2001). The plain interval covers less
than 90 % if about half a hit is expected (np = 0.55); one-sided Poisson limits for up to 2 hits or misses (3 if n > 50)
correct that and change nothing else. Other metrics have percentiles of a seeded bootstrap over examples.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.evaluation.confusion import ON_COUNTS, counts_RCC
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.paired import absolute_limit, mean_limit, relative_limit, relative_mean_limit
from flexmerge_cli.evaluation.scored import Scored

CONFIDENCE = 0.95
RESAMPLES = 1000
MAX_KEPT = 4_000_000  # indices, 16 MB: with more examples the draws are made again for every model


def interval(scored: Scored) -> tuple[float, float]:
    """Return (low, high), 95 %. For an external number without an interval, the number itself, twice."""
    if scored.given is not None:
        return scored.given.interval or (scored.given.value, scored.given.value)
    outcomes = scored.outcomes
    if outcomes is not None and np.isin(outcomes, (0.0, 1.0)).all():
        return proportion(int(outcomes.sum()), len(outcomes))
    values = resampled_values(scored)
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def resampled_values(scored: Scored, seed: int = 0) -> np.ndarray:
    """Compute the value on each of RESAMPLES resamples of the examples, float64 [RESAMPLES]; paired with those of other
    models."""
    outcomes, rows = scored.outcomes, resamples(scored.n, seed)
    if outcomes is not None and scored.n * RESAMPLES <= MAX_KEPT:
        return np.asarray(outcomes[_kept_resamples(scored.n, seed)].mean(axis=1))
    if outcomes is not None:
        return np.array([outcomes[chosen].mean() for chosen in rows])
    if scored.metric in ON_COUNTS:
        return ON_COUNTS[scored.metric](counts_RCC(scored.predictions, scored.labels, rows))
    sums = METRICS[scored.metric].sums
    if sums is not None:
        statistics = sums.statistics(scored.predictions, scored.labels)
        return np.array([sums.value(statistics[chosen].sum(0)) for chosen in rows])
    measure = METRICS[scored.metric].value
    return np.array([measure(scored.predictions[chosen], scored.labels[chosen]) for chosen in rows])


def proportion(hits: int, n: int) -> tuple[float, float]:
    """Return (low, high) of a proportion with `hits` of n >= 1 observed; in [0, 1]."""
    from scipy.stats import binomtest, chi2

    low, high = binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    few = 2 if n <= 50 else 3
    if 0 < hits <= few:
        low = min(low, chi2.ppf(1 - CONFIDENCE, 2 * hits) / 2 / n)
    if 0 < n - hits <= few:
        high = max(high, 1 - chi2.ppf(1 - CONFIDENCE, 2 * (n - hits)) / 2 / n)
    return float(low), float(high)


@functools.lru_cache(maxsize=32)
def _kept_resamples(n: int, seed: int) -> np.ndarray:
    """Keep the draws of `resamples`, int32 [RESAMPLES, n], shared by many models."""
    return np.array(list(resamples(n, seed)), np.int32)


def resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield RESAMPLES draws of n examples with repetition, equal for equal n and seed, so that models are paired."""
    rng = np.random.default_rng([seed, n])
    for _ in range(RESAMPLES):
        yield rng.integers(n, size=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBound:
    """How much worse a model is than its reference, on the same n examples. Negative if it is better."""

    drop: float
    """The drop in the metric's own unit, or as a part of the reference's score."""
    low: float
    """The lower one-sided 95 % bound of the drop."""
    high: float
    """The upper one-sided 95 % bound of the drop, which a gate uses."""
    n: int

    def decides(self, limit: float) -> bool | None:
        """Decide: True if the drop is within the limit, False if it is not, None if n is too small to decide."""
        return True if self.high <= limit else False if self.low > limit else None

    def n_that_decides(self, limit: float) -> int | None:
        """Return the number of examples that would separate a drop like this from the limit; None if it equals the
        limit.

        The width of the interval falls as 1/√n.
        """
        room = abs(limit - self.drop)
        width = self.high - self.drop if self.drop <= limit else self.drop - self.low
        if room == 0 or not np.isfinite(width):
            return None
        return max(self.n, int(np.ceil(self.n * (width / room) ** 2)))


def paired_bound(
    merged: Scored, reference: Scored, *, relative: bool, same_weights: bool = False
) -> PairedBound | None:
    """Compute one-sided 95 % bounds of how much `merged` is below `reference`; None for an external number.

    relative: the drop is a fraction of the reference's score. same_weights: both models are equal, so the drop is 0.
    For hits and misses these are the score intervals of Tango (1998) and Tang, Tang and Chan (2003), for other means
    Student's t, with the delta method if relative, and for metrics that are not means a bootstrap over examples. Raises
    ValueError if the numbers of examples differ.
    """
    if merged.given is not None or reference.given is not None:
        return None
    if merged.n != reference.n or merged.metric != reference.metric:
        raise ValueError(f"{merged.metric} of {merged.n} examples beside {reference.metric} of {reference.n}")
    if same_weights:
        return PairedBound(drop=0.0, low=0.0, high=0.0, n=merged.n)
    sign = 1.0 if merged.higher_is_better else -1.0
    drop = _drop(merged.value, reference.value, sign, relative)
    ours, theirs = merged.outcomes, reference.outcomes
    if ours is None or theirs is None:
        both = zip(resampled_values(merged), resampled_values(reference))
        draws = [_drop(float(one), float(other), sign, relative) for one, other in both]
        low, high = (float(np.quantile(draws, q)) for q in (1 - CONFIDENCE, CONFIDENCE))
    elif np.isin([ours, theirs], (0.0, 1.0)).all():
        limit = relative_limit if relative else absolute_limit
        low, high = (limit(ours, theirs, CONFIDENCE, upper=upper) for upper in (False, True))
    else:
        mean = relative_mean_limit if relative else mean_limit
        low, high = (sign * mean(ours, theirs, CONFIDENCE, upper=upper) for upper in (sign < 0, sign > 0))
    return PairedBound(drop=drop, low=min(low, drop), high=max(high, drop), n=merged.n)


def _drop(merged: float, reference: float, sign: float, relative: bool) -> float:
    drop = sign * (reference - merged)
    if not relative:
        return drop
    return drop / reference if reference > 0 else (0.0 if drop <= 0 else float("inf"))
