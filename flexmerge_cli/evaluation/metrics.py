"""Defines metrics by name: predictions and labels in, one number out. Values agree with scikit-learn's and scipy's.

A metric that is a mean over examples has `outcomes`, the numbers that it averages: Wilson intervals and paired bounds
follow from them. For the others (F1, correlations, perplexity) intervals come from resampling. Only computing a value
needs more than numpy.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np

from flexmerge_cli.evaluation import generation

Measure = Callable[[np.ndarray, np.ndarray], float]
Outcomes = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Takes(StrEnum):
    """The form of the predictions of n examples. Labels are what they are compared with."""

    CLASSES = "classes"
    """int [n]: a class, or -1 if the output names none. Labels: int [n]."""
    SCORES = "scores"
    """float [n, classes], higher is likelier. Labels: int [n], or the scores of another model."""
    NUMBERS = "numbers"
    """float [n], NaN if the output is not a number. Labels: float [n]."""
    TEXTS = "texts"
    """str [n]. Labels: str [n]."""
    GENERATED = "generated"
    """str [n], as generated. Labels: str [n], several references of one text on a line each."""
    PIXELS = "pixels"
    """int [n, classes, 3]: pixels of a class in prediction and label, in prediction alone, in label alone. Labels are
    not read."""
    ERRORS = "errors"
    """float [n]: an error of each example. Labels are not read."""
    LIKELIHOODS = "likelihoods"
    """float [n]: the sum of log likelihoods of an example's tokens. Labels: int [n], the number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    takes: Takes
    value: Measure
    higher_is_better: bool = True
    outcomes: Outcomes | None = None
    """Computes [n] numbers whose mean is the value; None if the value is not a mean."""
    percent: bool = True
    """Whether it is shown in percent: proportions and correlations."""
    only_two_classes: bool = False
    sums: "MetricSums | None" = None
    """The sums from which the value of a corpus is computed, if it is not a mean."""
    needs: tuple[str, ...] = ()
    """Modules of the `generation` extra."""


@dataclass(frozen=True, slots=True)
class MetricSums:
    """A value that depends on sums over the examples."""

    statistics: Outcomes
    """Computes the terms of the sums, [n, S]."""
    value: Callable[[np.ndarray], float]
    """Computes the value from the sums, [S]."""


def _sklearn(name: str, **options: Any) -> Measure:
    def value(predictions: np.ndarray, labels: np.ndarray) -> float:
        import sklearn.metrics

        with warnings.catch_warnings():  # a resample may lack a class
            warnings.simplefilter("ignore")
            return float(getattr(sklearn.metrics, name)(labels, predictions, **options))

    return value


def _hits(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(predictions == labels, np.float64)


def _agrees(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return whether the most likely classes are equal; for texts, whether the texts are."""
    return _hits(*((found.argmax(-1) if found.ndim == 2 else found) for found in (predictions, labels)))


def _macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Average F1 over classes. An output that names no class (-1) is a miss, not a class of its own."""
    from sklearn.metrics import f1_score

    classes = np.union1d(predictions, labels)
    return float(f1_score(labels, predictions, labels=classes[classes >= 0], average="macro", zero_division=0.0))


def _mean_of(outcomes: Outcomes) -> Measure:
    return lambda predictions, labels: float(np.mean(outcomes(predictions, labels)))


def _correlation(predictions: np.ndarray, labels: np.ndarray, *, ranked: bool) -> float:
    """Compute Pearson's or Spearman's correlation; 0 without variance. NaN outputs count as no correlation.

    The value is the correlation of the other outputs, times their fraction.
    """
    import scipy.stats

    known = np.isfinite(predictions)
    x, y = np.asarray(predictions)[known], np.asarray(labels)[known]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    measure = scipy.stats.spearmanr if ranked else scipy.stats.pearsonr
    found = float(measure(x, y).statistic)
    return found if len(x) == len(known) else found * len(x) / len(known)


def _perplexity(predictions: np.ndarray, labels: np.ndarray) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(-predictions.sum(dtype=np.float64) / max(1, labels.sum())))


def _divergence(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute KL(labels' model || predictions' model) in nats, [n]."""
    from scipy.special import log_softmax

    theirs, ours = log_softmax(labels.astype(np.float64), -1), log_softmax(predictions.astype(np.float64), -1)
    found: np.ndarray = np.maximum(0.0, (np.exp(theirs) * (theirs - ours)).sum(-1))
    return found


def _shared_words(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute F1 of the words of each text, counted with multiplicity, [n]; two empty texts agree."""
    from collections import Counter

    found = []
    for ours, theirs in zip(predictions, labels):
        left, right = Counter(str(ours).split()), Counter(str(theirs).split())
        total = sum(left.values()) + sum(right.values())
        found.append(2 * sum((left & right).values()) / total if total else 1.0)
    return np.array(found)


def _given(predictions: np.ndarray, _labels: np.ndarray) -> np.ndarray:
    return np.asarray(predictions, np.float64)


def _pixels(predictions: np.ndarray, _labels: np.ndarray) -> np.ndarray:
    return predictions.reshape(len(predictions), -1)


def _mean_iou(sums: np.ndarray) -> float:
    """Average intersection over union over the classes that occur in predictions or labels; 0 if none does."""
    counts = sums.reshape(-1, 3)
    union = counts.sum(1)
    return float((counts[union > 0, 0] / union[union > 0]).mean()) if union.any() else 0.0


def _pixel_accuracy(sums: np.ndarray) -> float:
    both, _, labelled = sums.reshape(-1, 3).sum(0)
    return float(both / max(1, both + labelled))


def _recall_at(k: int) -> Metric:
    """Make the metric: whether the label is among the k most likely classes. Among equals the later comes first, as in
    scikit-learn."""

    def outcomes(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
        best = np.argsort(predictions, axis=1, kind="stable")[:, ::-1][:, :k]
        return np.asarray((best == labels[:, None]).any(1), np.float64)

    def value(predictions: np.ndarray, labels: np.ndarray) -> float:
        classes = predictions.shape[1]
        if classes < 3 or k >= classes:  # two classes are another problem for scikit-learn; k of k always holds
            return float(outcomes(predictions, labels).mean())
        from sklearn.metrics import top_k_accuracy_score

        return float(top_k_accuracy_score(labels, predictions, k=k, labels=np.arange(classes)))

    return Metric(name=f"recall@{k}", takes=Takes.SCORES, value=value, outcomes=outcomes)


class _Metrics(dict[str, Metric]):
    """Metrics by name; accepts `recall@k` for any k."""

    def __missing__(self, name: str) -> Metric:
        match = re.fullmatch(r"recall@([1-9]\d{0,5})", name)
        if match is None:
            raise KeyError(name)
        return self.setdefault(name, _recall_at(int(match[1])))


def _all() -> list[Metric]:
    classes, numbers, texts, scores = Takes.CLASSES, Takes.NUMBERS, Takes.TEXTS, Takes.SCORES
    return [
        Metric(name="accuracy", takes=classes, value=_sklearn("accuracy_score"), outcomes=_hits),
        Metric(name="balanced_accuracy", takes=classes, value=_sklearn("balanced_accuracy_score")),
        Metric(
            name="f1",
            takes=classes,
            value=_sklearn("f1_score", average="macro", labels=[1], zero_division=0.0),
            only_two_classes=True,
        ),
        Metric(name="f1_macro", takes=classes, value=_macro_f1),
        Metric(name="matthews", takes=classes, value=_sklearn("matthews_corrcoef")),
        Metric(name="pearson", takes=numbers, value=lambda p, y: _correlation(p, y, ranked=False)),
        Metric(name="spearman", takes=numbers, value=lambda p, y: _correlation(p, y, ranked=True)),
        Metric(name="exact_match", takes=texts, value=_mean_of(_hits), outcomes=_hits),
        Metric(name="word_f1", takes=texts, value=_mean_of(_shared_words), outcomes=_shared_words),
        Metric(name="perplexity", takes=Takes.LIKELIHOODS, value=_perplexity, higher_is_better=False, percent=False),
        Metric(name="agreement", takes=scores, value=_mean_of(_agrees), outcomes=_agrees),
        Metric(
            name="kl_divergence",
            takes=scores,
            value=_mean_of(_divergence),
            higher_is_better=False,
            outcomes=_divergence,
            percent=False,
        ),
        *map(_recall_at, (1, 5, 10)),
        _of_sums("miou", MetricSums(_pixels, _mean_iou), Takes.PIXELS),
        _of_sums("pixel_accuracy", MetricSums(_pixels, _pixel_accuracy), Takes.PIXELS),
        Metric(name="delta1", takes=Takes.ERRORS, value=_mean_of(_given), outcomes=_given),
        *(
            Metric(
                name=name,
                takes=Takes.ERRORS,
                value=_mean_of(_given),
                outcomes=_given,
                higher_is_better=False,
                percent=False,
            )
            for name in ("abs_rel", "rmse")
        ),
        _of_sums("bleu", MetricSums(generation.bleu_statistics, generation.bleu), Takes.GENERATED, "sacrebleu"),
        *(_of_texts(kind, partial(generation.rouge, kind), "rouge_score") for kind in ("rouge1", "rouge2", "rougeL")),
        _of_texts("meteor", generation.meteor, "nltk"),
        _of_texts("cider", generation.cider, "pycocoevalcap"),
    ]


def _of_sums(name: str, sums: MetricSums, takes: Takes, *needs: str) -> Metric:
    def value(predictions: np.ndarray, labels: np.ndarray) -> float:
        return sums.value(sums.statistics(predictions, labels).sum(0))

    return Metric(name=name, takes=takes, value=value, sums=sums, needs=needs)


def _of_texts(name: str, outcomes: Outcomes, *needs: str) -> Metric:
    return Metric(name=name, takes=Takes.GENERATED, value=_mean_of(outcomes), outcomes=outcomes, needs=needs)


METRICS: dict[str, Metric] = _Metrics({metric.name: metric for metric in _all()})
"""f1 is that of class 1 of two; f1_macro is the mean over classes. exact_match and word_f1 compare texts."""


def normalised(value: float, reference: float, *, higher_is_better: bool) -> float | None:
    """Return the fraction of the fine-tuned model's score that is kept; None if the reference is not above 0."""
    above, below = (value, reference) if higher_is_better else (reference, value)
    return above / below if below > 0 and np.isfinite(above / below) else None
