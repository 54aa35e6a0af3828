"""Clusters the tasks of one block: its measurements in, its merges out. Numpy only; knows of no other block.

Complete linkage of two groups is their *least* similar pair, as everywhere but in the FlexMerge paper and its code,
which call it single. Interleaving the merges of all blocks into one order: order.py.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from flexmerge_cli.errors import UsageError
from flexmerge_cli.order.similarity import (
    BlockMeasure,
    Similarity,
    comparable,
    cosine,
    rms_distance,
    similarity,
    similarity_of_identical,
)


class Linkage(StrEnum):
    """How the similarity of two groups is computed from the similarities of their tasks."""

    COMPLETE = "complete"
    """The similarity of the least similar pair: Eq. (1) of the FlexMerge paper."""
    AVERAGE = "average"
    """The mean over all pairs of one task from each group."""
    SINGLE = "single"
    """The similarity of the most similar pair."""
    CENTROID = "centroid"
    """The similarity of the mean task vectors. Not monotone: a merge can be more similar than the one before it."""


class Join(NamedTuple):
    """One merge of one block."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    similarity: float


def check_settings(linkage: Linkage, how: Similarity) -> None:
    """Raise UsageError if a linkage and a similarity do not go together. Cheap: runs before the weights are read."""
    if linkage is Linkage.CENTROID and how is Similarity.SIGN:
        raise UsageError(
            "linkage `centroid` compares mean task vectors, and similarity `sign` knows only the signs of single ones",
            hint="use `--linkage complete`, or `--similarity cosine`",
        )


def dendrogram(measure: BlockMeasure, *, linkage: Linkage, how: Similarity, unit: float = 1.0) -> list[Join]:
    """Merge the two most similar groups of the block until one is left: M - 1 merges.

    unit: see comparison_unit. Ties, after rounding, go to the pair whose left group comes first, then to the one whose
    right group does; groups come in the order of their smallest task, and the first of a pair is the left one.
    The similarities returned are unrounded. Once rounded they never increase, except with centroid linkage.
    O(M^3) time at worst, M numpy operations on [M, M] arrays.
    """
    groups = Groups(measure, linkage=linkage, how=how, unit=unit)
    return [groups.join(*groups.closest()) for _ in range(measure.num_tasks - 1)]


class Groups:
    """The groups of one block while they merge. A group is named by its smallest task; at first every task is one."""

    def __init__(self, measure: BlockMeasure, *, linkage: Linkage, how: Similarity, unit: float = 1.0) -> None:
        check_settings(linkage, how)
        self._linkage, self._how, self._unit = linkage, how, unit
        self._num_elements = measure.num_elements
        self._tasks: dict[int, tuple[int, ...]] = {task: (task,) for task in range(measure.num_tasks)}
        self._sizes_M = np.ones(measure.num_tasks)
        self._identical_MM = measure.identical.copy()
        # Per pair of groups: the least or greatest similarity, the sum of similarities, or for centroids of inner
        # products.
        self._pairs_MM = measure.gram.copy() if linkage is Linkage.CENTROID else similarity(measure, how)
        # Comparable similarity of (left, right), left < right; -inf elsewhere. The first greatest entry in C order
        # is then the merge to make, ties included.
        is_pair_MM = np.triu(np.ones(self._pairs_MM.shape, dtype=bool), k=1)
        similarity_MM = self._similarity(slice(None))
        self._compared_MM = np.where(is_pair_MM, comparable(similarity_MM, unit), -np.inf)

    def names(self) -> list[int]:
        """Return the smallest task of each group, ascending."""
        return sorted(self._tasks)

    def closest(self) -> tuple[int, int]:
        """Return the two groups to merge next, left and right. There must be at least two."""
        left, right = divmod(int(self._compared_MM.argmax()), len(self._compared_MM))
        return left, right

    def join(self, left: int, right: int) -> Join:
        """Make one group of two, left < right. It keeps the name of the left one."""
        value = float(self._similarity(left)[right]) + 0.0  # + 0.0: so that the plan's JSON never says -0.0
        join = Join(self._tasks[left], self._tasks.pop(right), value)
        self._tasks[left] = tuple(sorted(join.left + join.right))
        self._sizes_M[left] += self._sizes_M[right]

        pairs_M = self._combine(self._pairs_MM[left], self._pairs_MM[right])
        pairs_M[left] = self._combine(pairs_M[left], pairs_M[right])  # with itself: all pairs within the group
        self._pairs_MM[left] = self._pairs_MM[:, left] = pairs_M
        identical_M = self._identical_MM[left] & self._identical_MM[right]
        self._identical_MM[left] = self._identical_MM[:, left] = identical_M

        # A pair that is -inf stays so: the lower triangle, and all pairs of groups that no longer exist.
        self._compared_MM[right] = self._compared_MM[:, right] = -np.inf
        compared_M = comparable(self._similarity(left), self._unit)
        for view in (self._compared_MM[left], self._compared_MM[:, left]):
            np.copyto(view, compared_M, where=view > -np.inf)
        return join

    def _combine(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        combined: np.ndarray
        match self._linkage:
            case Linkage.COMPLETE:
                combined = np.minimum(left, right)
            case Linkage.SINGLE:
                combined = np.maximum(left, right)
            case Linkage.AVERAGE | Linkage.CENTROID:
                combined = left + right
        return combined

    def _similarity(self, group: int | slice) -> np.ndarray:
        """Return the similarities of one group to all groups, [M], or of all to all, [M, M]. They are undefined for
        groups that have already merged into another."""
        pairs = self._pairs_MM[group]
        if self._linkage in (Linkage.COMPLETE, Linkage.SINGLE):
            return pairs
        means = pairs / (self._sizes_M[group, None] * self._sizes_M).reshape(pairs.shape)
        if self._linkage is Linkage.AVERAGE:
            return means
        squared_M = self._pairs_MM.diagonal() / self._sizes_M**2
        own = squared_M[group] if isinstance(group, int) else squared_M[:, None]
        if self._how is Similarity.COSINE:
            value = cosine(means, own, squared_M)
        else:
            value = -rms_distance(means, own, squared_M, self._num_elements)
        # Groups of one and the same vector, such as three tasks and one task: the sums above are only nearly equal.
        return np.where(self._identical_MM[group], similarity_of_identical(self._how), value)
