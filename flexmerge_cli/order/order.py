"""Makes one merge order of all blocks: Algorithm 1 of the FlexMerge paper. Numpy only; no tensors, files or sizes.

The order depends on the task vectors alone, not on method or target size; a prefix of it gives every block's groups.
linkage.py makes the merges of one block; `allocation/` decides where to cut.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from flexmerge_cli.order.linkage import Groups, Join, Linkage, check_settings, dendrogram
from flexmerge_cli.order.similarity import BlockMeasure, Similarity, comparable, comparison_unit
from flexmerge_cli.random import Stream, key64

NEAR_TIE = 2.0**-18


class Strategy(StrEnum):
    """How the block of the next merge is chosen."""

    GREEDY = "greedy"
    """The most similar pair of all blocks."""
    LEFT_TO_RIGHT = "left-to-right"
    """Block after block in forward order, each until one group is left."""
    RIGHT_TO_LEFT = "right-to-left"
    """Like left-to-right, from the last block to the first."""
    RANDOM = "random"
    """Any block with two groups, and any two groups of it: a baseline that shows what the order is worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Two groups of one block become one."""

    block: int
    """Index in forward order."""
    left: tuple[int, ...]
    """Indices of the tasks, ascending. Left is the group that holds the smallest task of both."""
    right: tuple[int, ...]
    similarity: float
    """The linkage's similarity, unrounded; for `euclidean` it is minus a distance in the units of the weights."""


def merge_order(
    blocks: Sequence[BlockMeasure],
    *,
    linkage: Linkage = Linkage.COMPLETE,
    strategy: Strategy = Strategy.GREEDY,
    similarity: Similarity = Similarity.COSINE,
    seed: int = 0,
) -> tuple[Merge, ...]:
    """Return all B (M - 1) merges, in order. blocks: in forward order, all with the same tasks.

    The greedy strategy takes the most similar pair of groups of all blocks, again and again. Similarities are compared
    after rounding to 2^-20 (see `comparable`); ties go to the earlier block, then to its earlier left and right group.
    seed: for strategy `random`, which alone draws numbers. O(B M^3) time at worst.
    Raises UsageError if linkage and similarity do not go together, or signs were not counted.
    """
    check_settings(linkage, similarity)
    if len({block.num_tasks for block in blocks}) > 1:
        raise ValueError("blocks are of different numbers of tasks")
    unit = comparison_unit(blocks, similarity)
    if strategy is Strategy.RANDOM:
        groups = [Groups(block, linkage=linkage, how=similarity, unit=unit) for block in blocks]
        return _random_order(groups, Stream(key64("flexmerge/order/1", seed)))

    joins = [dendrogram(block, linkage=linkage, how=similarity, unit=unit) for block in blocks]
    match strategy:
        case Strategy.GREEDY:
            return _greedy_order(joins, unit)
        case Strategy.LEFT_TO_RIGHT:
            return tuple(_merge(index, join) for index in range(len(blocks)) for join in joins[index])
        case Strategy.RIGHT_TO_LEFT:
            return tuple(_merge(index, join) for index in reversed(range(len(blocks))) for join in joins[index])


def groups_after(num_blocks: int, num_tasks: int, merges: Iterable[Merge]) -> list[list[tuple[int, ...]]]:
    """Return each block's groups after these merges, by smallest task; tasks of a group ascend.

    Raises ValueError if a merge joins something that is not a group at that point.
    """
    groups: list[dict[int, tuple[int, ...]]] = [{task: (task,) for task in range(num_tasks)} for _ in range(num_blocks)]
    for merge in merges:
        of_block = groups[merge.block] if 0 <= merge.block < num_blocks else {}
        is_sound = merge.left and merge.right and merge.left[0] < merge.right[0]
        if not is_sound or any(of_block.get(side[0]) != side for side in (merge.left, merge.right)):
            raise ValueError(f"{merge} joins what are not two groups of its block")
        del of_block[merge.right[0]]
        of_block[merge.left[0]] = tuple(sorted(merge.left + merge.right))
    return [[of_block[task] for task in sorted(of_block)] for of_block in groups]


def count_near_ties(merges: Sequence[Merge], *, unit: float = 1.0) -> int:
    """Count merges whose similarity is within 2^-18 of that of the merge before or after: noise could swap them.

    unit: what similarities are divided by first; `comparison_unit` of the same blocks and similarity.
    """
    values = np.array([merge.similarity for merge in merges]) / unit
    near = np.abs(np.diff(values)) < NEAR_TIE
    return int(np.count_nonzero(np.append(near, False) | np.append(False, near))) if merges else 0


def _greedy_order(joins: Sequence[Sequence[Join]], unit: float) -> tuple[Merge, ...]:
    """Interleave the blocks' merges. Only the next merge of a block competes: its later ones may be more similar
    (centroid linkage), yet cannot come first."""

    def entry(block: int, index: int) -> tuple[float, int, int]:
        return -float(comparable(joins[block][index].similarity, unit)), block, index

    heap = [entry(block, 0) for block in range(len(joins)) if joins[block]]
    heapq.heapify(heap)
    merges = []
    while heap:
        _, block, index = heap[0]
        merges.append(_merge(block, joins[block][index]))
        if index + 1 < len(joins[block]):
            heapq.heapreplace(heap, entry(block, index + 1))
        else:
            heapq.heappop(heap)
    return tuple(merges)


def _random_order(groups: Sequence[Groups], stream: Stream) -> tuple[Merge, ...]:
    """Draw three numbers per merge: a block, a group of it, and another group of it."""
    unfinished = [block for block in range(len(groups)) if len(groups[block].names()) > 1]
    merges = []
    while unfinished:
        block = unfinished[stream.below(len(unfinished))]
        names = groups[block].names()
        first, second = stream.below(len(names)), stream.below(len(names) - 1)
        second += second >= first
        left, right = sorted((names[first], names[second]))
        merges.append(_merge(block, groups[block].join(left, right)))
        if len(names) == 2:
            unfinished.remove(block)
    return tuple(merges)


def _merge(block: int, join: Join) -> Merge:
    return Merge(block=block, left=join.left, right=join.right, similarity=join.similarity)
