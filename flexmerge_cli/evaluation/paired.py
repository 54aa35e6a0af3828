"""Computes one-sided limits of a paired difference from the outcomes of two models on the same examples.

ours, theirs: [n] outcomes of the merged and of the reference model. The drop is mean(theirs) - mean(ours), or its
fraction of mean(theirs). Pure; numpy and scipy.
"""

from collections.abc import Callable

import numpy as np


def absolute_limit(ours: np.ndarray, theirs: np.ndarray, confidence: float, *, upper: bool) -> float:
    """Compute the limit for hits and misses, in [-1, 1]: the drop that a score test just fails to reject.

    Tango (1998), Statistics in Medicine 17:891. It is sound even if few or no examples were judged differently.
    """
    n = len(ours)
    lost, gained = int(((theirs == 1) & (ours == 0)).sum()), int(((theirs == 0) & (ours == 1)).sum())

    def statistic(drop: float) -> float:
        """Return observed minus assumed drop, in standard errors under the assumed drop. Falls as the assumed drop
        rises."""
        a, b = 2 * n, -lost - gained + (2 * n - lost + gained) * drop
        c = -gained * drop * (1 - drop)
        share = (np.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # the proportion gained, at the assumed drop
        variance = n * (2 * share + drop * (1 - drop))
        return _over(lost - gained - n * drop, variance)

    return _crossing(statistic, confidence, upper, -1.0)


def relative_limit(ours: np.ndarray, theirs: np.ndarray, confidence: float, *, upper: bool) -> float:
    """Compute the limit for hits and misses as a part of the reference's proportion of hits; at most 1, inf if that is
    0.

    Tang, Tang and Chan (2003), Statistics in Medicine 22:1217: the score test of a ratio of paired shares.
    """
    n = len(ours)
    both, lost = int(((theirs == 1) & (ours == 1)).sum()), int(((theirs == 1) & (ours == 0)).sum())
    gained = int(((theirs == 0) & (ours == 1)).sum())
    if both + lost == 0:
        return float("inf") if upper else float("-inf") if gained else 0.0

    def statistic(drop: float) -> float:
        ratio = 1 - drop
        a, b = n * (1 + ratio), (both + lost) * ratio**2 - (both + gained + 2 * lost)
        c = lost * (1 - ratio) * (both + gained + lost) / n
        share = (-b + np.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)  # the proportion lost, at the assumed ratio
        variance = n * (1 + ratio) * share + (both + gained + lost) * (ratio - 1)
        return -_over(both + gained - (both + lost) * ratio, variance)

    lowest = -1.0
    while not upper and statistic(lowest) < _normal(confidence) and lowest > -1e6:
        lowest *= 2
    return _crossing(statistic, confidence, upper, lowest)


def mean_limit(ours: np.ndarray, theirs: np.ndarray, confidence: float, *, upper: bool) -> float:
    """Compute the limit for any outcomes, by Student's t of their differences; infinite for n = 1."""
    return _student(theirs - ours, 1.0, confidence, upper)


def relative_mean_limit(ours: np.ndarray, theirs: np.ndarray, confidence: float, *, upper: bool) -> float:
    """Compute the limit as a part of mean(theirs), by the delta method; infinite if that mean is not above 0."""
    mean = float(theirs.mean())
    if mean <= 0:
        return float("inf") if upper else float("-inf")
    drop = 1 - float(ours.mean()) / mean
    return drop + _student((1 - drop) * theirs - ours, mean, confidence, upper)


def _student(values: np.ndarray, scale: float, confidence: float, upper: bool) -> float:
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return float("inf") if upper else float("-inf")
    width = float(t.ppf(confidence, n - 1)) * float(values.std(ddof=1)) / np.sqrt(n)
    return float(values.mean() + (width if upper else -width)) / scale


def _over(difference: float, variance: float) -> float:
    """Return the difference in standard errors. Without variance, an assumed drop is met exactly or not at all."""
    if variance > 0:
        return float(difference / np.sqrt(variance))
    return 0.0 if difference == 0 else float(np.copysign(np.inf, difference))


def _normal(confidence: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(confidence))


def _crossing(statistic: Callable[[float], float], confidence: float, upper: bool, lowest: float) -> float:
    """Find the point below 1 where the falling statistic is -z (upper) or z (lower).

    It is found by bisection, which needs no values at the ends.
    """
    highest = 1.0
    goal = -_normal(confidence) if upper else _normal(confidence)
    for _ in range(60):
        middle = (lowest + highest) / 2
        if statistic(middle) > goal:
            lowest = middle
        else:
            highest = middle
    return highest if upper else lowest
