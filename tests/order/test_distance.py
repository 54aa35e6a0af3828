import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.order.distance import linear_errors, weighted_errors


@given(
    deltas=st.integers(2, 6).flatmap(lambda m: arrays(np.float64, (m, 5), elements=st.integers(-9, 9))),
    scale=st.sampled_from([0.0, 0.3, 1.0, 1.5, -1.0]),
    data=st.data(),
)
def test_errors_are_those_of_the_merged_vectors(deltas, scale, data):
    group = sorted(data.draw(st.sets(st.integers(0, len(deltas) - 1), min_size=1)))
    members = deltas[group]
    expected = ((scale * members.mean(axis=0) - members) ** 2).sum(axis=1)
    if (members == members[0]).all():
        expected[:] = 0  # copied, not scaled
    assert linear_errors(deltas @ deltas.T, group, scale) == pytest.approx(expected, abs=1e-9)


def test_group_of_one_is_exact_whatever_the_scale():
    assert linear_errors(np.array([[4.0]]), [0], 1.5).tolist() == [0.0]


def test_identical_tasks_are_exact_even_if_their_products_differ_by_rounding():
    gram = np.array([[1.0, 1.0 - 1e-7], [1.0 - 1e-7, 1.0]])
    assert linear_errors(gram, [0, 1], 1.5, identical=np.ones((2, 2), dtype=bool)).tolist() == [0, 0]
    assert linear_errors(gram, [0, 1], 1.5) == pytest.approx([0.25, 0.25], abs=1e-6)


def test_equal_products_of_near_duplicates_do_not_make_them_identical():
    assert linear_errors(np.ones((2, 2)), [0, 1], 1.5, identical=np.eye(2, dtype=bool)) == pytest.approx([0.25, 0.25])


def test_errors_are_never_negative():
    gram = np.array([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]])
    assert linear_errors(gram, [0, 1], 1.0).tolist() == [0, 0]


def test_weights_need_not_be_equal():
    deltas = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    weights = np.array([0.5, 0.25, -1.0])
    expected = ((weights @ deltas - deltas) ** 2).sum(axis=1)
    assert weighted_errors(deltas @ deltas.T, weights) == pytest.approx(expected)
