"""What samples/compare_auto.py computes from scores."""

import importlib

import numpy as np
import pytest

from .program import ROOT


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "samples")
    return importlib.import_module("compare_auto")


def test_a_hypervolume_is_the_area_under_the_best_so_far(compare):
    assert compare.hypervolume({"sizes": ["0.5x", "1x", "3x", "4x"]}, [50.0, 80.0, 60.0, 100.0]) == 25 + 160 + 80


def test_a_difference_counts_examples_that_only_one_of_both_gets_right(compare):
    right, wrong, tuned = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 1, 0]), np.ones(4)
    found = compare.measures({"a": wrong, "b": right}, {"a": right, "b": right}, {"a": tuned, "b": tuned})
    assert found["tasks"] == {"a": 50.0, "b": 75.0} and found["worst"] == 50.0
    assert found["better"]["difference"] == 12.5 and found["better"]["low"] == 0.0 < found["better"]["high"]
    same = compare.measures({"a": right, "b": right}, {"a": right, "b": right}, {"a": tuned, "b": tuned})
    assert same["better"] == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_sizes_and_four_thirds_of_them_are_points_of_one_ladder(compare):
    for smallest, first in ((0.29, 0.3164), (0.71, 0.75)):
        sizes, steps = compare.sizes_by_quarters(smallest)
        factors = [float(size.rstrip("x")) for size in sizes]
        assert factors[0] == first and factors[4] == 1
        assert factors[steps:] == pytest.approx([4 / 3 * factor for factor in factors[:5]], abs=2e-4)
