import dataclasses

import numpy as np
import pytest

from flexmerge_cli.errors import UsageError
from flexmerge_cli.order.similarity import BlockMeasure, Similarity, comparable, comparison_unit, similarity

from .measures import measure_of

ZERO, X, Y, TWO_X, MINUS_X = [0, 0], [1, 0], [0, 1], [2, 0], [-1, 0]


@pytest.mark.parametrize(
    ("a", "b", "cosine", "euclidean", "sign"),
    [
        (ZERO, ZERO, 1, 0, 1),
        (ZERO, X, 0, -(0.5**0.5), 0.5),
        (X, X, 1, 0, 1),
        (X, Y, 0, -1, 0),
        (X, TWO_X, 1, -(0.5**0.5), 1),
        (X, MINUS_X, -1, -(2**0.5), 0.5),
    ],
)
def test_similarity_of_two_vectors(a, b, cosine, euclidean, sign):
    measure = measure_of(np.array([a, b]))
    for how, expected in (("cosine", cosine), ("euclidean", euclidean), ("sign", sign)):
        similarity_MM = similarity(measure, Similarity(how))
        assert similarity_MM[0, 1] == similarity_MM[1, 0] == pytest.approx(expected, abs=1e-15)
        assert similarity_MM[0, 0] == (0 if how == "euclidean" else 1)


def test_tiny_and_huge_task_vectors_keep_their_cosine():
    measure = measure_of(np.array([[1e-100, 1e-100], [1e100, 0], [1e-100, 0]]))
    assert np.allclose(similarity(measure, Similarity.COSINE)[0], [1, 0.5**0.5, 0.5**0.5])


def test_identical_tasks_are_most_similar_whatever_rounding_did_to_their_gram():
    gram = np.array([[1.0, 0.999, 0.5], [0.999, 1.0, 0.5], [0.5, 0.5, 1.0]])
    identical = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    measure = BlockMeasure(name="b", gram=gram, num_elements=4, identical=identical)
    assert similarity(measure, Similarity.COSINE)[0, 1] == 1
    assert similarity(measure, Similarity.EUCLIDEAN)[0, 1] == 0
    assert similarity(measure, Similarity.COSINE)[0, 2] == 0.5


def test_cosines_stay_in_range_where_rounding_exceeds_it():
    gram = np.array([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]])
    measure = BlockMeasure(name="b", gram=gram, num_elements=4, identical=np.eye(2, dtype=bool))
    assert similarity(measure, Similarity.COSINE).max() == 1
    assert similarity(measure, Similarity.EUCLIDEAN)[0, 1] == 0


def test_sign_without_counts_says_how_to_get_them():
    measure = dataclasses.replace(measure_of(np.ones((2, 3)), name="layers.0.mlp"), agreement=None)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp") as error:
        similarity(measure, Similarity.SIGN)
    assert "--similarity sign" in error.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"gram": np.ones((2, 3))},
        {"gram": np.array([[1.0, 0.5], [0.4, 1.0]])},
        {"gram": np.array([[1.0, np.nan], [np.nan, 1.0]])},
        {"identical": np.zeros((2, 2), dtype=bool)},
        {"identical": np.ones((3, 3), dtype=bool)},
        {"agreement": np.ones(2, dtype=np.int64)},
    ],
)
def test_a_measure_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="block"):
        dataclasses.replace(measure_of(np.array([X, Y])), **change)


def test_comparison_rounds_to_a_millionth_half_to_even():
    step = 2.0**-20
    values = np.array([0.5, 1.5, 2.5, 2.5000001, -0.5, -1.5]) * step
    assert (comparable(values, 1.0) == np.array([0, 2, 2, 3, 0, -2]) * step).all()
    assert (comparable(values * 8, 8.0) == comparable(values, 1.0)).all()


def test_distances_are_compared_in_units_of_the_largest_of_the_family():
    near, far = measure_of(np.array([X, Y])), measure_of(np.array([[3, 0], [0, 3]]))
    assert comparison_unit([near, far], Similarity.EUCLIDEAN) == 3
    assert comparison_unit([near, far], Similarity.COSINE) == 1
    assert comparison_unit([measure_of(np.array([X, X]))], Similarity.EUCLIDEAN) == 1
    assert comparison_unit([], Similarity.EUCLIDEAN) == 1
