"""Means over tasks as a curve tells them."""

import pytest

from flexmerge_cli.evaluation.curve_record import mean_of, reference_means
from flexmerge_cli.evaluation.evaluate import means


def reference(metric: str, fine_tuned: float | None, base: float | None, *, rises: bool = True) -> dict:
    return {
        "metric": metric, "higher_is_better": rises, "fine_tuned": fine_tuned, "base": base, "merged": None,
        "normalised": None,
    }  # fmt: skip


def score(value: float | None, low: float | None, high: float | None, normalised: float | None) -> dict:
    return {"value": value, "interval": None if low is None else [low, high], "normalised": normalised}


def test_a_mean_of_one_metric_is_of_scores():
    references = {"a": reference("accuracy", 0.8, 0.4), "b": reference("accuracy", 1.0, 0.6)}
    found = mean_of({"a": score(0.4, 0.3, 0.6, 0.5), "b": score(0.8, 0.8, 0.8, 0.8)}, references)
    assert found == {
        "value": pytest.approx(0.6), "interval": [pytest.approx(0.55), pytest.approx(0.7)],
        "normalised": pytest.approx(0.65),
    }  # fmt: skip
    assert reference_means(references) == {"fine_tuned": pytest.approx(0.9), "base": pytest.approx(0.5)}


def test_a_mean_of_different_metrics_is_of_parts_of_the_fine_tuned_scores():
    """An accuracy and a perplexity were averaged: the perplexity decided, and the worse was the better."""
    references = {"a": reference("accuracy", 0.8, 0.4), "b": reference("perplexity", 5.0, 20.0, rises=False)}
    found = mean_of({"a": score(0.4, 0.4, 0.4, 0.5), "b": score(10.0, 8.0, 12.5, 0.5)}, references)
    assert found["value"] == found["normalised"] == pytest.approx(0.5)
    assert found["interval"] == [pytest.approx(0.5 - 0.05), pytest.approx(0.5 + 0.0625)]
    assert reference_means(references) == {"fine_tuned": 1.0, "base": pytest.approx((0.5 + 0.25) / 2)}
    assert means(references)["fine_tuned"] is None


def test_what_is_beyond_all_numbers_makes_a_mean_of_one_metric_null_and_counts_as_nothing_among_others():
    lost, one = score(None, None, None, None), score(0.4, 0.4, 0.4, 0.5)
    of_one = {task: reference("perplexity", 5.0, 9.0, rises=False) for task in "ab"}
    assert mean_of({"a": one, "b": lost}, of_one) == {"value": None, "interval": None, "normalised": None}
    mixed = of_one | {"a": reference("accuracy", 0.8, 0.4)}
    assert mean_of({"a": one, "b": lost}, mixed)["value"] == pytest.approx(0.25)
