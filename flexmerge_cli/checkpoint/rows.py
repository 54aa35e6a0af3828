"""Represents a selection of rows as runs (first row, count), with each row at most once. No I/O, no tensors.

An enlarged vocabulary is one run; one with shuffled tokens may have as many runs as rows.
"""

from collections.abc import Iterable
from functools import lru_cache

Runs = tuple[tuple[int, int], ...]


def runs_of(rows: Iterable[int]) -> Runs:
    """Join rows that follow each other into runs."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][0] + found[-1][1] == row:
            found[-1][1] += 1
        else:
            found.append([row, 1])
    return tuple((first, count) for first, count in found)


@lru_cache(maxsize=1024)
def every(count: int, step: int, first: int) -> Runs:
    """Return `count` runs of one row each, `step` rows apart. Cached, since tensors of one form share them."""
    return tuple((first + place * step, 1) for place in range(count))


def num_rows(runs: Runs) -> int:
    return sum(count for _, count in runs)


def other_rows(runs: Runs, total: int) -> Runs:
    """Return the rows of [0, total) that are in no run, ascending."""
    found, position = [], 0
    for first, count in sorted(runs):
        if first > position:
            found.append((position, first - position))
        position = first + count
    if position < total:
        found.append((position, total - position))
    return tuple(found)


def are_runs(runs: Runs, total: int) -> bool:
    """Return whether these are runs within [0, total), none of them empty and no two overlapping."""
    position = 0
    for first, count in sorted(runs):
        if first < position or count < 1 or first + count > total:
            return False
        position = first + count
    return True
