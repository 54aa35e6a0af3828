"""Computes class metrics on many resamples at once, like scikit-learn, from counts of (label, prediction).

scikit-learn takes a millisecond per resample, and an interval needs a thousand of them. The tests compare both.
"""

from collections.abc import Callable, Iterable

import numpy as np

# R resamples, C classes; the last prediction column counts outputs that name no class
Values = Callable[[np.ndarray], np.ndarray]


def counts_RCC(predictions: np.ndarray, labels: np.ndarray, rows: Iterable[np.ndarray]) -> np.ndarray:
    """Count [R, C, C + 1] on each resample. rows: its examples. predictions, labels: int [n], prediction -1 for no
    class."""
    classes = int(max(predictions.max(), labels.max())) + 1
    column = np.where(predictions < 0, classes, predictions)
    cells = labels * (classes + 1) + column
    size = classes * (classes + 1)
    return np.stack([np.bincount(cells[chosen], minlength=size) for chosen in rows]).reshape(-1, classes, classes + 1)


def _parts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hits, labels and predictions of each class, [R, C] float64."""
    square = counts[:, :, :-1].astype(np.float64)
    return np.einsum("rcc->rc", square), counts.sum(2).astype(np.float64), square.sum(1)


def _f1_of_classes(counts: np.ndarray) -> np.ndarray:
    hits, labels, predictions = _parts(counts)
    return _over(2 * hits, labels + predictions)


def f1(counts: np.ndarray) -> np.ndarray:
    found = _f1_of_classes(counts)
    return found[:, 1] if found.shape[1] > 1 else np.zeros(len(found))


def f1_macro(counts: np.ndarray) -> np.ndarray:
    _, labels, predictions = _parts(counts)
    return _over(_f1_of_classes(counts).sum(1), (labels + predictions > 0).sum(1))


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    hits, labels, _ = _parts(counts)
    return _over(_over(hits, labels).sum(1), (labels > 0).sum(1))


def matthews(counts: np.ndarray) -> np.ndarray:
    hits, labels, predictions = _parts(counts)
    none = counts[:, :, -1].sum(1, keepdims=True)  # the additional class is predicted and never right
    predictions, labels = np.hstack([predictions, none]), np.hstack([labels, np.zeros_like(none)])
    n, right = labels.sum(1), hits.sum(1)
    covariance = right * n - (labels * predictions).sum(1)
    spread = (n**2 - (labels**2).sum(1)) * (n**2 - (predictions**2).sum(1))
    return _over(covariance, np.sqrt(spread))


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the quotient, or 0 if the divisor is 0."""
    found: np.ndarray = np.divide(above, below, out=np.zeros_like(above, np.float64), where=below > 0)
    return found


ON_COUNTS: dict[str, Values] = {
    "f1": f1,
    "f1_macro": f1_macro,
    "balanced_accuracy": balanced_accuracy,
    "matthews": matthews,
}
