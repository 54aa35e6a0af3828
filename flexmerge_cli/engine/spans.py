"""Cuts tensors into work items: ranges of elements, whole rows, whole tensors, or all tensors of a unit. Pure."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from flexmerge_cli.engine.runs import RUN_ELEMENTS
from flexmerge_cli.methods.method import Scope

# Elements of one work item, per model: 2 MiB of float32 is a large request for a disk, and consists of whole pieces of
# the digest.
CHUNK_ELEMENTS = 1 << 19
# Elements that are merged at once: task vectors, sums and results of eight tasks stay in the second-level cache.
# Measured with: python -m tests.bench merge
TILE_ELEMENTS = 1 << 16

ORDER: tuple[Scope, ...] = ("element", "row", "tensor", "block")


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of one tensor, in C order."""

    tensor: str
    start: int
    stop: int
    last: bool
    """Whether the tensor ends here."""
    run: int
    """The number of elements that are summed together (runs.py): spans and tiles start at multiples of it."""


def widest(scopes: Iterable[Scope]) -> Scope:
    """Return the widest of the scopes, which satisfies them all."""
    return max(scopes, key=ORDER.index, default="element")


def row_elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements under one index of axis 0; a tensor with 0 or 1 axes is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def cut(
    tensor: str, num_elements: int, shape: tuple[int, ...], scopes: Collection[Scope], chunk_elements: int
) -> list[Span]:
    """Cut a tensor into spans of about chunk_elements, for visits of all these scopes."""
    step, run = step_and_run(num_elements, shape, scopes, chunk_elements)
    starts: Sequence[int] = range(0, num_elements, step) if num_elements else (0,)
    return [
        Span(tensor, start, min(start + step, num_elements), start + step >= num_elements or num_elements == 0, run)
        for start in starts
    ]


def step_and_run(
    num_elements: int, shape: tuple[int, ...], scopes: Collection[Scope], chunk_elements: int
) -> tuple[int, int]:
    """Return the elements of a span, at least 1, and of a run of the widest scope.

    Rows come in multiples of eight, since packed masks must start on a byte. If single elements are a scope, too, rows
    begin where their runs do.
    """
    scope = widest(scopes)
    run = run_of(scope, shape)
    if scope in ("tensor", "block"):
        return max(1, num_elements), run
    if scope == "row":
        whole = math.lcm(8 * run, RUN_ELEMENTS if "element" in scopes else 1)
        return max(1, chunk_elements // whole) * whole, run
    return chunk_elements, run


def run_of(scope: Scope, shape: tuple[int, ...]) -> int:
    """Return the elements that are summed together where a visit sees this much of a tensor."""
    return max(1, row_elements(shape)) if scope == "row" else RUN_ELEMENTS


def tiles(num_elements: int, run: int) -> list[tuple[int, int]]:
    """Cut a span into [low, high), whole runs that are small enough for the cache."""
    step = max(1, TILE_ELEMENTS // run) * run
    return [(low, min(low + step, num_elements)) for low in range(0, num_elements, step)] or [(0, 0)]
