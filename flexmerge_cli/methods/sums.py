"""Sums over a scope in float64, with the same bits for any chunks, threads and device.

A tensor is cut into pieces of 2^16 elements from its first element on. A piece is summed by halving (x[:h] + x[h:]),
that is by elementwise additions, and the pieces are added in order, tensors by name. A range that ends inside a piece
keeps the piece's elements until it is complete, so all ranges give the same bits; ranges that end at multiples of
PIECE_ELEMENTS keep nothing.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Per, StatisticScope, Where

# R tasks, Q sums, N elements

PIECE_ELEMENTS = 1 << 16


def fold(terms: Tensor) -> Tensor:
    """Sum the last axis by halving. [*, N] float64 -> [*]; 0 if N = 0."""
    size = 1 << max(0, terms.shape[-1] - 1).bit_length()
    total = torch.nn.functional.pad(terms, (0, size - terms.shape[-1]))
    while size > 1:
        size //= 2
        total = total[..., :size] + total[..., size:]
    return total[..., 0]


def gram(vectors: Tensor) -> Tensor:
    """Compute ⟨x_i, x_j⟩ for i <= j, row by row of the triangle. [k, *, N] -> [k (k + 1) / 2, *] float64."""
    vectors = vectors.to(torch.float64)
    return torch.cat([fold(vectors[i] * vectors[i:]) for i in range(len(vectors))])


def square(triangle: np.ndarray, k: int) -> np.ndarray:
    """Return the symmetric [k, k] of such a triangle."""
    full = np.zeros((k, k))
    full[np.triu_indices(k)] = triangle
    return full + np.triu(full, 1).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """One pass that sums terms of each element."""

    scope: StatisticScope
    per: Per = "task"
    terms: Callable[[Tensor, Where], Iterable[Tensor]]
    """Maps float32 [R, N] to tensors [*, N] float64, whose sums over N are strung together into Q numbers."""
    then: Callable[[np.ndarray], Any]
    """Maps the sums, [Q] float64, to what follows: the next statistic, or a value."""

    def measure(self, deltas: Tensor, where: Where) -> "_Total":
        parts: list[np.ndarray | _Part] = []
        start, end = where.start, where.start + deltas.shape[1]
        while start < end:
            stop = min(end, (start // PIECE_ELEMENTS + 1) * PIECE_ELEMENTS)
            part = _Part(deltas[:, start - where.start : stop - where.start], replace(where, start=start))
            # What another thread joins later lies on the CPU: devices have a stream for each thread.
            parts.append(self._sum(part) if part.is_whole else replace(part, deltas=part.deltas.to("cpu", copy=True)))
            start = stop
        return _Total(None, parts or [self._sum(_Part(deltas, where))])

    def memory(self, num_tasks: int, num_elements: int) -> tuple[int, int]:
        """Return the bytes of an incomplete piece and of the sums, and those of two pieces when they are joined."""
        piece = 4 * num_tasks * min(num_elements, PIECE_ELEMENTS)
        sums = 8 * num_tasks**2 * (2 + num_elements // PIECE_ELEMENTS)
        return (piece if num_elements < PIECE_ELEMENTS else 0) + sums, 2 * piece + 8 * num_tasks**2

    def combine(self, left: "_Total", right: "_Total") -> "_Total":
        return self._settle(_Total(left.sums, left.ahead + right.ahead))

    def finish(self, total: "_Total") -> Any:
        total = self._settle(total)
        assert total.sums is not None and not total.ahead
        return self.then(total.sums)

    def _sum(self, part: "_Part") -> np.ndarray:
        return torch.cat([fold(term).flatten() for term in self.terms(part.deltas, part.where)]).cpu().numpy()

    def _settle(self, total: "_Total") -> "_Total":
        sums, begun = total.sums, None
        for item in total.ahead:
            if isinstance(item, _Part):
                if begun is not None:
                    item = replace(begun, deltas=torch.cat([begun.deltas, item.deltas], 1))
                begun = None if item.is_whole else item
                if begun is not None:
                    continue
                item = self._sum(item)
            sums = item if sums is None else sums + item
        return _Total(sums, [] if begun is None else [begun])


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece, or part of one."""

    deltas: Tensor
    where: Where

    @property
    def is_whole(self) -> bool:
        end = self.where.start + self.deltas.shape[1]
        at_end = end % PIECE_ELEMENTS == 0 or end == math.prod(self.where.shape)
        return self.where.start % PIECE_ELEMENTS == 0 and at_end


@dataclass(frozen=True, slots=True)
class _Total:
    """The sums of the pieces so far, and what was not yet added, in order: sums of pieces, and parts of pieces."""

    sums: np.ndarray | None
    ahead: list["np.ndarray | _Part"]
