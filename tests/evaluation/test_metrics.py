"""Values are scikit-learn's and scipy's; odd inputs have an answer."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from flexmerge_cli.evaluation.confusion import ON_COUNTS, counts_RCC
from flexmerge_cli.evaluation.metrics import METRICS, normalised

rng = np.random.default_rng(1)
PREDICTED, LABELS = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
OURS, THEIRS = rng.normal(size=60), rng.normal(size=60)


def value(name, predictions, labels):
    return METRICS[name].value(np.asarray(predictions), np.asarray(labels))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("accuracy", sklearn.metrics.accuracy_score(LABELS, PREDICTED)),
        ("balanced_accuracy", sklearn.metrics.balanced_accuracy_score(LABELS, PREDICTED)),
        ("f1_macro", sklearn.metrics.f1_score(LABELS, PREDICTED, average="macro")),
        ("matthews", sklearn.metrics.matthews_corrcoef(LABELS, PREDICTED)),
    ],
)
def test_classes_are_scored_as_scikit_learn_does(name, wanted):
    assert value(name, PREDICTED, LABELS) == wanted


def test_f1_is_of_class_one():
    predicted, labels = PREDICTED % 2, LABELS % 2
    assert value("f1", predicted, labels) == sklearn.metrics.f1_score(labels, predicted)
    assert value("f1", np.zeros(4, int), np.zeros(4, int)) == 0.0


def test_correlations_are_scipys():
    assert value("pearson", OURS, THEIRS) == scipy.stats.pearsonr(OURS, THEIRS).statistic
    assert value("spearman", OURS, THEIRS) == scipy.stats.spearmanr(OURS, THEIRS).statistic


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_an_output_that_is_no_number_counts_as_no_correlation(name):
    half = np.where(np.arange(60) < 30, THEIRS, np.nan)
    assert value(name, THEIRS, THEIRS) == pytest.approx(1.0)
    assert value(name, half, THEIRS) == pytest.approx(0.5)
    assert value(name, np.full(60, np.nan), THEIRS) == 0.0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_what_does_not_vary_correlates_with_nothing(name):
    assert value(name, np.ones(5), np.arange(5.0)) == 0.0
    assert value(name, [1.0], [2.0]) == 0.0


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_recall_at_k_is_scikit_learns(k):
    scores, labels = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)
    wanted = sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(8))
    assert value(f"recall@{k}", scores, labels) == wanted
    assert METRICS[f"recall@{k}"].outcomes(scores, labels).mean() == wanted


def test_recall_at_k_of_equal_scores_agrees_with_its_outcomes():
    scores, labels = np.zeros((9, 5)), rng.integers(0, 5, 9)
    for k in (1, 2, 4):
        assert value(f"recall@{k}", scores, labels) == METRICS[f"recall@{k}"].outcomes(scores, labels).mean()


def test_recall_at_more_than_all_classes_always_holds():
    assert value("recall@9", rng.normal(size=(4, 2)), [0, 1, 1, 0]) == 1.0


def test_perplexity_falls_with_likelihood_and_weighs_tokens():
    assert not METRICS["perplexity"].higher_is_better
    assert value("perplexity", [-2.0, -6.0], [1, 3]) == pytest.approx(np.exp(2.0))


def test_divergence_is_zero_of_equal_models_and_scipys_otherwise():
    left, right = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    wanted = np.mean([scipy.stats.entropy(*(np.exp(x) / np.exp(x).sum() for x in pair)) for pair in zip(right, left)])
    assert value("kl_divergence", left, right) == pytest.approx(wanted)
    assert value("kl_divergence", left, left + 3.0) == pytest.approx(0.0, abs=1e-12)


def test_word_f1_counts_words():
    assert value("word_f1", ["the cat sat", "", "a"], ["the cat", "", "b"]) == pytest.approx((0.8 + 1 + 0) / 3)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.outcomes is not None])
def test_outcomes_average_to_the_value(name):
    takes = METRICS[name].takes
    texts = PREDICTED.astype(str)
    forms = {
        "classes": PREDICTED,
        "scores": rng.normal(size=(60, 3)),
        "texts": texts,
        "generated": texts,
        "errors": rng.normal(size=60),
    }
    predictions = forms[takes]
    labels = predictions[::-1] if name in ("agreement", "kl_divergence") else LABELS.astype(predictions.dtype)
    labels = LABELS if takes == "scores" and name.startswith("recall") else labels
    assert METRICS[name].outcomes(predictions, labels).mean() == pytest.approx(value(name, predictions, labels))


def test_normalised_is_one_for_an_equal_and_below_for_a_worse_model():
    assert normalised(0.8, 0.8, higher_is_better=True) == 1.0
    assert normalised(0.4, 0.8, higher_is_better=True) == 0.5
    assert normalised(20.0, 10.0, higher_is_better=False) == 0.5
    assert normalised(0.4, 0.0, higher_is_better=True) is None


def test_a_metric_that_is_none_is_a_key_error():
    for name in ("recall@0", "recall@x", "blue"):
        with pytest.raises(KeyError):
            METRICS[name]


@pytest.mark.parametrize("name", sorted(ON_COUNTS))
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_values_of_resamples_are_scikit_learns(name, classes):
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, 30)
    predictions = np.where(draw.random(30) < 0.5, labels, draw.integers(-1 if classes != 2 else 0, classes, 30))
    rows = [np.arange(30), *(draw.integers(30, size=size) for size in (1, 2, 5, 30, 30, 30))]
    found = ON_COUNTS[name](counts_RCC(predictions, labels, [rows[0], *rows]))
    wanted = [value(name, predictions[chosen], labels[chosen]) for chosen in rows]
    assert found[1:].tolist() == pytest.approx(wanted, abs=1e-12)
