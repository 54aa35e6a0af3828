"""Clusters tasks by their Gram matrices instead of following a merge order: baselines of the FlexMerge paper.

channels      spherical k-means in each tensor separately, after channel merging (Zhang et al. 2025): this module
whole models  agglomerative clustering: an order of one block, cut at `Kx`: `plan --blocks model --linkage average`.
              Private tensors take bytes beyond K models: if there are any, use `--merges M-K` instead

Pure, and without a second pass over the weights: a row is a task vector scaled to length 1, and a centre the mean of
rows scaled to length 1, so everything that k-means compares follows from the inner products in a plan. The authors'
code differs in two ways: it takes the mean of the unnormalised rows, so that large task vectors decide, and it begins
every layer at the same task.
"""

import numpy as np

from flexmerge_cli.allocation.allocation import Allocation, Group, Unit
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.order.similarity import BlockMeasure, Similarity, comparable, cosine, similarity
from flexmerge_cli.random import Stream, key64
from flexmerge_cli.request.choices import Cluster

MAX_ITERATIONS = 100
# A squared length of a mean of rows below this counts as 0: rounding alone leaves up to 1e-15 where rows cancel.
NO_LENGTH = 1e-14

# M tasks, C clusters


def cluster_channels(
    plan: Plan, num_clusters: int, method: MethodUse, *, seed: int = 0, dtype: str | None = None
) -> Allocation:
    """Make one unit per tensor, whose groups are the clusters; num_clusters in [1, M]. At worst O(M^3) per tensor.

    `method` must see no more than one tensor, as `merge_request` ensures.
    """
    units = []
    for name in (name for block in plan.blocks for name in block.tensors):
        stream = Stream(key64("flexmerge/kmeans/1", seed, name))
        labels = spherical_kmeans(unit_gram(plan, plan.tensor(name)), num_clusters, stream)
        members = [tuple(np.flatnonzero(labels == label).tolist()) for label in range(labels.max() + 1)]
        groups = tuple(Group(tasks=tasks, method=0 if len(tasks) > 1 else None) for tasks in members)
        units.append(Unit(name=name, tensors=(name,), groups=groups))
    merges = sum(len(plan.tasks) - len(unit.groups) for unit in units)
    return Allocation(methods=(method,), units=tuple(units), dtype=dtype, merges=merges, fit=Cluster.CHANNELS.value)


def unit_gram(plan: Plan, tensor: PlanTensor) -> np.ndarray:
    """Return ⟨row_i, row_j⟩ of task vectors scaled to length 1, [M, M] float64; a zero vector stays 0."""
    same_M = np.array(tensor.same)
    measure = BlockMeasure(
        name=tensor.name,
        gram=plan.gram(tensor),
        num_elements=tensor.num_elements,
        identical=same_M[:, None] == same_M[None, :],
    )
    zero_M = measure.gram.diagonal() <= 0
    return np.where(zero_M[:, None] | zero_M, 0.0, similarity(measure, Similarity.COSINE))


def spherical_kmeans(unit_MM: np.ndarray, num_clusters: int, stream: Stream) -> np.ndarray:
    """Return the label of every row, [M], numbered by first appearance, with num_clusters labels; with fewer rows, each
    is alone.

    unit_MM: inner products of rows of length 1 or 0. The distance is 1 - cosine, 0 between two zeros and 1 from a zero
    to anything else. Cosines are rounded to the nearest 2^-20, as in the merge order, so that rounding errors move no
    task. Ties go to the lowest centre, then the lowest task. An empty cluster takes the task that is farthest from its
    centre.
    """
    num_tasks = len(unit_MM)
    if num_clusters >= num_tasks:
        return np.arange(num_tasks)
    labels_M: np.ndarray | None = None
    weights_CM = np.eye(num_tasks)[_first_centres(unit_MM, num_clusters, stream)]
    for _ in range(MAX_ITERATIONS):
        distances_MC = _distances(unit_MM, weights_CM)
        found_M = distances_MC.argmin(axis=1)
        _fill_empty(found_M, distances_MC)
        if labels_M is not None and np.array_equal(found_M, labels_M):
            break
        labels_M = found_M
        members_CM = labels_M == np.arange(num_clusters)[:, None]
        weights_CM = members_CM / members_CM.sum(axis=1, keepdims=True)
    assert labels_M is not None
    return _by_first_appearance(labels_M)


def _first_centres(unit_MM: np.ndarray, num_clusters: int, stream: Stream) -> list[int]:
    """Choose distinct tasks: the first at random, each next one with a probability proportional to its squared distance
    to the nearest so far."""
    num_tasks = len(unit_MM)
    distances_MM = _distances(unit_MM, np.eye(num_tasks))
    chosen = [stream.below(num_tasks)]
    while len(chosen) < num_clusters:
        weight_M = distances_MM[:, chosen].min(axis=1) ** 2
        drawn = stream.uniform() * weight_M.sum()
        if weight_M.sum() == 0:
            chosen.append(min(set(range(num_tasks)) - set(chosen)))
        else:
            chosen.append(int(np.argmax(np.cumsum(weight_M) > drawn)))
    return chosen


def _distances(unit_MM: np.ndarray, weights_CM: np.ndarray) -> np.ndarray:
    """Return the distance of every row to centres that are weighted sums of rows, [M, C]."""
    squared_C = np.einsum("ci,ij,cj->c", weights_CM, unit_MM, weights_CM)
    squared_C[squared_C < NO_LENGTH] = 0.0
    return 1.0 - comparable(cosine(unit_MM @ weights_CM.T, unit_MM.diagonal()[:, None], squared_C), 1.0)


def _fill_empty(labels_M: np.ndarray, distances_MC: np.ndarray) -> None:
    """Fill the empty clusters one after another, in place."""
    tasks = np.arange(len(labels_M))
    for centre in range(distances_MC.shape[1]):
        sizes_C = np.bincount(labels_M, minlength=distances_MC.shape[1])
        if sizes_C[centre] == 0:
            own_M = np.where(sizes_C[labels_M] > 1, distances_MC[tasks, labels_M], -np.inf)
            labels_M[own_M.argmax()] = centre


def _by_first_appearance(labels_M: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(labels_M, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
