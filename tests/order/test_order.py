"""The order beside a slow and obvious Algorithm 1, which looks at all pairs of groups of all blocks at every step."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexmerge_cli.errors import UsageError
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Merge, Strategy, count_near_ties, groups_after, merge_order
from flexmerge_cli.order.similarity import Similarity, comparison_unit
from flexmerge_cli.random import Stream, key64

from .measures import measure_of

COMBINATIONS = [
    (linkage, similarity)
    for linkage, similarity in itertools.product(Linkage, Similarity)
    if (linkage, similarity) != (Linkage.CENTROID, Similarity.SIGN)
]


def vector_similarity(a, b, how):
    if how == "sign":
        return np.mean(np.sign(a) == np.sign(b))
    if how == "euclidean":
        return -np.sqrt(np.mean((a - b) ** 2))
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def group_similarity(deltas, left, right, linkage, how):
    if linkage == "centroid":
        return vector_similarity(deltas[list(left)].mean(axis=0), deltas[list(right)].mean(axis=0), how)
    pairs = [vector_similarity(deltas[i], deltas[j], how) for i in left for j in right]
    return {"complete": min, "single": max, "average": np.mean}[linkage](pairs)


def algorithm_1(family, linkage, strategy, how, seed):
    """family: per block the task vectors, [M, N]. Merges as (block, left, right, similarity)."""
    unit = 1.0
    if how == "euclidean":
        distances = [-vector_similarity(a, b, how) for deltas in family for a in deltas for b in deltas]
        unit = max(distances, default=0) or 1.0
    groups = [[(task,) for task in range(len(deltas))] for deltas in family]
    stream = Stream(key64("flexmerge/order/1", seed))
    merges = []
    while unfinished := [block for block in range(len(family)) if len(groups[block]) > 1]:
        if strategy == "random":
            block = unfinished[stream.below(len(unfinished))]
            first = stream.below(len(groups[block]))
            second = stream.below(len(groups[block]) - 1)
            second += second >= first
            left, right = sorted((groups[block][first], groups[block][second]))
        else:
            blocks = {"greedy": unfinished, "left-to-right": unfinished[:1], "right-to-left": unfinished[-1:]}
            best = -np.inf
            for candidate in blocks[strategy]:
                for a, b in itertools.combinations(groups[candidate], 2):
                    value = group_similarity(family[candidate], a, b, linkage, how) / unit
                    if np.rint(value * 2**20) > best:
                        best, block, left, right = np.rint(value * 2**20), candidate, a, b
        merges.append((block, left, right, group_similarity(family[block], left, right, linkage, how)))
        groups[block] = sorted([group for group in groups[block] if group not in (left, right)] + [left + right])
        groups[block] = [tuple(sorted(group)) for group in groups[block]]
    return merges


def assert_equals_algorithm_1(family, linkage, strategy, similarity, seed=0):
    family = [np.asarray(deltas, dtype=np.float64) for deltas in family]
    expected = algorithm_1(family, linkage.value, strategy.value, similarity.value, seed)
    blocks = [measure_of(deltas, name=str(index)) for index, deltas in enumerate(family)]
    merges = merge_order(blocks, linkage=linkage, strategy=strategy, similarity=similarity, seed=seed)
    assert [(merge.block, merge.left, merge.right) for merge in merges] == [merge[:3] for merge in expected]
    # Looser for distances: from a Gram matrix, one of 0 may come out as the root of a rounding error.
    assert np.allclose([merge.similarity for merge in merges], [merge[3] for merge in expected], rtol=0, atol=1e-7)


@st.composite
def families(draw):
    """Blocks of small integers: many ties, zero vectors, opposites, duplicates and multiples."""
    num_tasks = draw(st.integers(1, 6))
    family = []
    for _ in range(draw(st.integers(0, 4))):
        num_elements = draw(st.sampled_from([1, 2, 3, 5]))
        vectors = st.lists(st.integers(-2, 2), min_size=num_elements, max_size=num_elements)
        family.append(np.array(draw(st.lists(vectors, min_size=num_tasks, max_size=num_tasks)), dtype=np.float64))
    return family


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize(("linkage", "similarity"), COMBINATIONS)
@settings(max_examples=20, deadline=None)
@given(family=families(), seed=st.integers(0, 2**70))
@example(family=[], seed=0)
@example(family=[[[1.0]]], seed=0)
@example(family=[[[1.0], [2.0]], [[0.0], [0.0]], [[0.0], [1.0]]], seed=0)
@example(family=[np.ones((5, 3)), np.zeros((5, 3))], seed=0)
def test_order_equals_algorithm_1_on_degenerate_families(linkage, strategy, similarity, family, seed):
    assert_equals_algorithm_1(family, linkage, strategy, similarity, seed)


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize(("linkage", "similarity"), COMBINATIONS)
@pytest.mark.parametrize(("num_tasks", "num_elements"), [(2, 99), (7, 99), (9, 4)])
def test_order_equals_algorithm_1_on_generic_families(linkage, strategy, similarity, num_tasks, num_elements):
    rng = np.random.default_rng(num_tasks)
    family = rng.normal(size=(3, num_tasks, num_elements)) * rng.uniform(0.1, 9, size=(3, 1, 1))
    family += rng.normal(size=(3, 1, num_elements))
    assert_equals_algorithm_1(family, linkage, strategy, similarity)


def test_a_block_of_no_elements_is_of_equal_tasks():
    for linkage, similarity in COMBINATIONS:
        merges = merge_order([measure_of(np.zeros((3, 0)))], linkage=linkage, similarity=similarity)
        assert [merge.similarity for merge in merges] == [0 if similarity is Similarity.EUCLIDEAN else 1] * 2


def test_scaling_all_task_vectors_does_not_change_the_order():
    rng = np.random.default_rng(1)
    family = rng.normal(size=(6, 7, 20))
    for linkage, similarity in COMBINATIONS:
        orders = [
            merge_order([measure_of(scale * deltas) for deltas in family], linkage=linkage, similarity=similarity)
            for scale in (1.0, 1e-6, 1e6)
        ]
        steps = [[(merge.block, merge.left, merge.right) for merge in order] for order in orders]
        assert steps[0] == steps[1] == steps[2]


def test_only_the_random_order_depends_on_the_seed():
    blocks = [measure_of(deltas) for deltas in np.random.default_rng(2).normal(size=(4, 6, 9))]
    for strategy in Strategy:
        orders = {merge_order(blocks, strategy=strategy, seed=seed) for seed in range(3)}
        assert len(orders) == (3 if strategy is Strategy.RANDOM else 1)


def test_settings_that_do_not_go_together_are_refused_before_any_work():
    with pytest.raises(UsageError, match="centroid"):
        merge_order([], linkage=Linkage.CENTROID, similarity=Similarity.SIGN)


def test_blocks_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="different numbers of tasks"):
        merge_order([measure_of(np.eye(2)), measure_of(np.eye(3))])


@given(family=families(), data=st.data())
def test_every_prefix_of_an_order_partitions_the_tasks(family, data):
    num_tasks = len(family[0]) if family else 1
    merges = merge_order([measure_of(deltas) for deltas in family])
    assert len(merges) == len(family) * (num_tasks - 1)
    num_merges = data.draw(st.integers(0, len(merges)))
    groups = groups_after(len(family), num_tasks, merges[:num_merges])
    assert sum(map(len, groups)) == len(family) * num_tasks - num_merges
    for of_block in groups:
        assert sorted(sum(of_block, ())) == list(range(num_tasks))
        assert [group[0] for group in of_block] == sorted(min(group) for group in of_block)


def merge(block, left, right, similarity=0.5):
    return Merge(block=block, left=left, right=right, similarity=similarity)


def test_groups_after_some_merges():
    merges = [merge(1, (0,), (3,)), merge(1, (1,), (2,)), merge(1, (0, 3), (1, 2)), merge(0, (1,), (2,))]
    assert groups_after(2, 4, []) == [[(0,), (1,), (2,), (3,)]] * 2
    assert groups_after(2, 4, merges[:2]) == [[(0,), (1,), (2,), (3,)], [(0, 3), (1, 2)]]
    assert groups_after(2, 4, merges) == [[(0,), (1, 2), (3,)], [(0, 1, 2, 3)]]


@pytest.mark.parametrize(
    "unsound",
    [
        merge(0, (0,), (2,)),  # the order has merged it already
        merge(0, (1,), (0,)),
        merge(0, (1,), (1,)),
        merge(0, (), (1,)),
        merge(0, (1,), ()),
        merge(0, (1,), (9,)),
        merge(2, (0,), (1,)),
        merge(-1, (0,), (1,)),
    ],
)
def test_a_merge_of_what_are_no_groups_is_refused(unsound):
    with pytest.raises(ValueError, match="not two groups"):
        groups_after(2, 4, [merge(0, (0,), (2,)), unsound])


def test_near_ties_are_counted_on_both_sides():
    def count(*similarities, unit=1.0):
        return count_near_ties([merge(0, (0,), (1,), value) for value in similarities], unit=unit)

    assert count() == count(0.5) == count(0.9, 0.5) == 0
    assert count(0.5, 0.5) == 2
    assert count(0.9, 0.5, 0.5 - 2**-19, 0.1) == 2
    assert count(0.5, 0.5 - 2**-19, 0.5 - 2**-18) == 3
    assert count(0.5, 0.5 - 2**-18) == 0
    assert count(-500, -500.001) == 0
    assert count(-500, -500.001, unit=1000.0) == 2


def test_near_ties_of_distances_do_not_depend_on_the_scale_of_the_weights():
    deltas = np.array([[0, 0], [1, 0], [10, 0], [11 + 1e-6, 0]])
    counts = set()
    for scale in (1e-6, 1.0, 1e6):
        blocks = [measure_of(scale * deltas)]
        unit = comparison_unit(blocks, Similarity.EUCLIDEAN)
        counts.add(count_near_ties(merge_order(blocks, similarity=Similarity.EUCLIDEAN), unit=unit))
    assert counts == {2}
