"""How tensors are cut into work items: ranges of elements, whole rows, whole tensors, or all of a unit. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexmerge_cli.methods.method import Scope

ORDER: tuple[Scope, ...] = ("element", "row", "tensor", "block")


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of one tensor, in C order."""

    tensor: str
    start: int
    stop: int
    last: bool
    """Whether the tensor ends here."""


def widest(scopes: Iterable[Scope]) -> Scope:
    """What all of them can work with."""
    return max(scopes, key=ORDER.index, default="element")


def row_elements(shape: tuple[int, ...]) -> int:
    """Elements under one index of axis 0; a tensor with 0 or 1 axes is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def cut(tensor: str, num_elements: int, shape: tuple[int, ...], scope: Scope, chunk_elements: int) -> list[Span]:
    """Spans of about chunk_elements. Rows come in multiples of eight, so that packed masks start on a byte."""
    step = chunk_elements
    if scope in ("tensor", "block"):
        step = num_elements
    elif scope == "row":
        row = max(1, row_elements(shape))
        step = max(8, chunk_elements // row // 8 * 8) * row
    starts: Sequence[int] = range(0, num_elements, max(1, step)) if num_elements else (0,)
    return [
        Span(tensor, start, min(start + step, num_elements), start + step >= num_elements or num_elements == 0)
        for start in starts
    ]


def tiles(num_elements: int, tile_elements: int) -> list[tuple[int, int]]:
    """[low, high) within a span: small enough for the cache."""
    return [(low, min(low + tile_elements, num_elements)) for low in range(0, num_elements, max(1, tile_elements))] or [
        (0, 0)
    ]
