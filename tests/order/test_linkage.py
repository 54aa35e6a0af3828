import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from flexmerge_cli.errors import UsageError
from flexmerge_cli.order.linkage import Groups, Linkage, check_settings, dendrogram
from flexmerge_cli.order.similarity import Similarity, similarity

from .measures import measure_of


def random_measure(*, num_tasks, seed=0):
    return measure_of(np.random.default_rng(seed).normal(size=(num_tasks, 12)))


@pytest.mark.parametrize("linkage", [Linkage.COMPLETE, Linkage.AVERAGE, Linkage.SINGLE])
@pytest.mark.parametrize("num_tasks", [2, 3, 30])
def test_dendrogram_is_that_of_scipy(linkage, num_tasks):
    measure = random_measure(num_tasks=num_tasks)
    distance = 1 - similarity(measure, Similarity.COSINE)
    expected = hierarchy.linkage(squareform(distance, checks=False), method=linkage.value)

    clusters = [frozenset([task]) for task in range(num_tasks)]
    for left, right, *_ in expected:
        clusters.append(clusters[int(left)] | clusters[int(right)])
    joins = dendrogram(measure, linkage=linkage, how=Similarity.COSINE)
    assert [frozenset(join.left + join.right) for join in joins] == clusters[num_tasks:]
    assert np.allclose([1 - join.similarity for join in joins], expected[:, 2])


def test_linkages_differ_in_which_pair_speaks_for_two_groups():
    # Cosines: a-b 0.8, a-c 0.6, b-c 0 (to rounding).
    measure = measure_of(np.array([[1, 0, 0], [0.8, 0.6, 0], [0.6, -0.8, 0]]))

    def last(linkage):
        return dendrogram(measure, linkage=linkage, how=Similarity.COSINE)[-1].similarity

    assert last(Linkage.COMPLETE) == pytest.approx(0)
    assert last(Linkage.AVERAGE) == pytest.approx(0.3)
    assert last(Linkage.SINGLE) == pytest.approx(0.6)
    assert last(Linkage.CENTROID) == pytest.approx(0.6 / 3.6**0.5)


def test_centroid_linkage_of_opposites_is_that_of_a_zero_vector():
    measure = measure_of(np.array([[1, 0], [-1, 0], [0, 1], [0, 0]]))
    groups = Groups(measure, linkage=Linkage.CENTROID, how=Similarity.COSINE)
    assert groups.join(0, 1).similarity == -1
    assert groups.closest() == (0, 3)
    assert groups.join(0, 3).similarity == 1
    assert groups.join(0, 2).similarity == 0


def test_no_similarity_is_minus_zero():
    for deltas in (np.eye(3), -np.eye(3), np.array([[3.0], [3.0 + 1e-12], [-0.0]])):
        for linkage in Linkage:
            for how in (Similarity.COSINE, Similarity.EUCLIDEAN):
                joins = dendrogram(measure_of(deltas), linkage=linkage, how=how)
                assert not any(str(join.similarity) == "-0.0" for join in joins)


def test_centroids_of_identical_tasks_are_at_no_distance():
    measure = measure_of(np.full((7, 5), 0.1))
    joins = dendrogram(measure, linkage=Linkage.CENTROID, how=Similarity.EUCLIDEAN)
    assert [join.similarity for join in joins] == [0] * 6


@pytest.mark.parametrize("linkage", Linkage)
def test_ties_go_to_the_first_groups(linkage):
    joins = dendrogram(measure_of(np.eye(4)), linkage=linkage, how=Similarity.COSINE)
    assert [(join.left, join.right) for join in joins] == [((0,), (1,)), ((0, 1), (2,)), ((0, 1, 2), (3,))]


def test_noise_below_the_comparison_step_is_a_tie():
    quiet = measure_of(np.eye(4))
    noise = np.random.default_rng(0).normal(size=(4, 4)) * 1e-8
    noisy = measure_of(np.linalg.cholesky(np.eye(4) + noise + noise.T))
    for linkage in Linkage:
        joins = [dendrogram(measure, linkage=linkage, how=Similarity.COSINE) for measure in (quiet, noisy)]
        assert [join[:2] for join in joins[0]] == [join[:2] for join in joins[1]]


@pytest.mark.parametrize("linkage", [Linkage.COMPLETE, Linkage.AVERAGE, Linkage.SINGLE])
@pytest.mark.parametrize("how", Similarity)
def test_monotone_linkages_never_become_more_similar(linkage, how):
    similarities = [join.similarity for join in dendrogram(random_measure(num_tasks=20), linkage=linkage, how=how)]
    assert similarities == sorted(similarities, reverse=True)


def test_centroid_linkage_has_no_signs():
    with pytest.raises(UsageError, match="centroid") as error:
        check_settings(Linkage.CENTROID, Similarity.SIGN)
    assert "--linkage complete" in error.value.hint
