import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.order.distance import weighted_errors


@given(
    deltas=st.integers(1, 6).flatmap(lambda m: arrays(np.float64, (m, 5), elements=st.integers(-9, 9))),
    scale=st.sampled_from([0.0, 0.3, 1.0, 1.5, -1.0]),
)
def test_errors_are_those_of_the_merged_vectors(deltas, scale):
    expected = ((scale * deltas.mean(axis=0) - deltas) ** 2).sum(axis=1)
    found = weighted_errors(deltas @ deltas.T, np.full(len(deltas), scale / len(deltas)))
    assert found == pytest.approx(expected, abs=1e-9)


def test_errors_are_never_negative():
    gram = np.array([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]])
    assert weighted_errors(gram, np.full(2, 0.5)).tolist() == [0, 0]


def test_weights_need_not_be_equal():
    deltas = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    weights = np.array([0.5, 0.25, -1.0])
    expected = ((weights @ deltas - deltas) ** 2).sum(axis=1)
    assert weighted_errors(deltas @ deltas.T, weights) == pytest.approx(expected)
