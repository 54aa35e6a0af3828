"""Selects the c elements of largest magnitude, or of the largest score, of each row over a scope, in bounded memory.

Elements have a total order: the larger key comes first and, among equal keys, the smaller number, which is a hash of
the tensor's name and the element's index. So every tensor, and every part of one, keeps its share of equal magnitudes.
places.py finds the key at place c; if only some of the elements with that key are kept, one more pass finds the number
of the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Per, StatisticScope, Where
from flexmerge_cli.methods.places import MANY, AtPlaces, FoundKeys, magnitude_keys, tiles
from flexmerge_cli.methods.reductions import native_rows, only
from flexmerge_cli.random import tie_key, tie_numbers

# R rows, T places of each row, S of them that split ties, N elements

WIDTH = 8.0
"""Half the width of the window in which the last tie is searched, in standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The elements that are among the c largest, for R rows and T numbers c."""

    key_RT: np.ndarray
    """int64: elements with larger keys are kept."""
    last_RT: np.ndarray
    """float64: elements with exactly this key are kept up to this number; numbers are below 1, so 1 keeps all."""

    def take(self, tasks: list[int]) -> "Kept":
        return Kept(key_RT=self.key_RT[tasks], last_RT=self.last_RT[tasks])

    def mask(self, keys: Tensor, where: Where, place: int = 0) -> Tensor:
        """Map keys [R, *] of elements from where.start on to bool [R, *]: whether each is kept."""
        flat = keys.reshape(len(keys), keys[0].numel())
        key_R1 = np.minimum(self.key_RT[:, place, None], torch.iinfo(flat.dtype).max)
        key_R1 = torch.from_numpy(key_R1).to(flat.device, flat.dtype)
        kept, last_R1 = flat >= key_R1, self.last_RT[:, place, None]
        if (last_R1 < 1).any():
            rows, columns, numbers = _ties((flat == key_R1).cpu().numpy() & (last_R1 < 1), where)
            lost = numbers > last_R1[rows, 0]
            at = (torch.from_numpy(axis[lost]).to(flat.device) for axis in (rows, columns))
            kept[tuple(at)] = False
        return kept.view(keys.shape)

    def limits(self, place: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the least magnitude that is kept of each row, int32 [R], and the last number at it, float64 [R]."""
        least_R = np.minimum(self.key_RT[:, place], np.iinfo(np.int32).max).astype(np.int32)
        return least_R, np.ascontiguousarray(self.last_RT[:, place])

    def largest(self, deltas: Tensor, where: Where, place: int = 0, *, drop: bool = False) -> Tensor:
        """Zero the deltas that are not kept by their magnitudes or, with `drop`, those that are. [R, *] -> [R, *]."""
        if native.lib is None or (rows := native_rows(deltas)) is None:
            return only(self.mask(magnitude_keys(deltas), where, place) ^ drop, deltas)
        trimmed = torch.empty(rows.shape)
        least_R, last_R = self.limits(place)
        native.lib.flexmerge_trim(
            rows.data_ptr(), len(rows), rows[0].numel(), rows.stride(0), least_R.ctypes.data, last_R.ctypes.data,
            tie_key(where.tensor), where.start, drop, trimmed.data_ptr(),
        )  # fmt: skip
        return trimmed


def _ties(ties_RN: np.ndarray, where: Where) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, columns and numbers of the elements that tie, row by row. ties_RN: bool, from where.start on."""
    rows, columns = np.divmod(np.flatnonzero(ties_RN), ties_RN.shape[1])
    return rows, columns, tie_numbers(where.tensor, columns.astype(np.uint64) + np.uint64(where.start))


def places_of(keys: Tensor, where: Where) -> Tensor:
    """Rank the elements along the last axis, in memory: 0 is the largest key, ties by number. int64, same shape.

    keys: [k, *shape], of the elements of the tensor from where.start on.
    """
    indices = np.arange(where.start, where.start + keys[0].numel(), dtype=np.uint64)
    by_number = torch.from_numpy(tie_numbers(where.tensor, indices)).view(keys.shape[1:])
    first = by_number.argsort(dim=-1, stable=True).to(keys.device).expand(keys.shape)
    order = first.gather(-1, keys.gather(-1, first).sort(dim=-1, descending=True, stable=True).indices)
    places = torch.empty_like(order)
    return places.scatter_(-1, order, torch.arange(keys.shape[-1], device=keys.device).expand_as(order))


def keep_largest(
    *,
    scope: StatisticScope,
    counts: Callable[[int, int], tuple[int, ...]],
    keys: Callable[[Tensor, Where], Tensor] | None = None,
    per: Per = "task",
    then: Callable[[Kept], object] = lambda kept: kept,
) -> AtPlaces:
    """Make a statistic whose value is a Kept.

    counts: maps (elements of the scope, those of a row with a key above 0) to numbers c, each at most the elements.
    keys: computes the keys to compare, by default magnitudes. then: makes the value from the Kept, by default itself.
    If one element with key 0 is kept, all of them are: it makes no difference whether zeros are kept.
    """

    def settle(found: FoundKeys) -> object:
        split_RT = (found.quota_RT > 0) & (found.quota_RT < found.equal_RT) & (found.key_RT > 0)
        if split_RT.any() and found.last_RT is None:
            return _Ties(scope=scope, per=per, keys=keys, found=found, split_RT=split_RT, then=then, width=WIDTH)
        last_RT = np.ones(found.key_RT.shape)
        if found.last_RT is not None:
            last_RT[split_RT] = found.last_RT[split_RT]
        return then(Kept(key_RT=found.key_RT, last_RT=last_RT))

    return AtPlaces(scope=scope, per=per, keys=keys, places=counts, then=settle, splits_ties=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ties:
    """The last pass, needed if only some ties are kept: it finds the number of the last one that is kept.

    q of E numbers that are spread evenly over [0, 1) lie below q/E, give or take √(q (1 - q/E))/E. So only the
    numbers in a window around it are gathered, and those below it are counted. If the last one is not in the window,
    wider windows are tried, up to all of [0, 1).
    """

    scope: StatisticScope
    per: Per
    keys: Callable[[Tensor, Where], Tensor] | None
    found: FoundKeys
    split_RT: np.ndarray
    """The rows and places where some ties are kept and some are not."""
    then: Callable[[Kept], object]
    width: float

    def measure(self, deltas: Tensor, where: Where) -> "_Window":
        at = self.split_RT.nonzero()
        quota_S, equal_S = self.found.quota_RT[at], self.found.equal_RT[at]
        half_S = self.width * np.sqrt(quota_S * (1 - quota_S / equal_S)) + self.width**2
        low_S, high_S = ((quota_S + half) / equal_S for half in (-half_S, half_S))
        key_S1 = torch.from_numpy(self.found.key_RT[at][:, None]).to(deltas.device)
        below_S, inside = np.zeros(len(quota_S), np.int64), []
        for tile, there in tiles(deltas, where):
            keys = magnitude_keys(tile) if self.keys is None else self.keys(tile, there)
            which, _, numbers = _ties((keys[at[0]] == key_S1).cpu().numpy(), there)
            is_below = numbers < low_S[which]
            below_S += np.bincount(which[is_below], minlength=len(below_S))
            near = ~is_below & (numbers < high_S[which])
            inside.append(np.split(numbers[near], np.searchsorted(which[near], np.arange(1, len(below_S)))))
        return _Window(below_S, inside).packed()

    def combine(self, left: "_Window", right: "_Window") -> "_Window":
        joined = _Window(left.below_S + right.below_S, left.inside + right.inside)
        return joined if len(joined.inside) < MANY else joined.packed()

    def finish(self, total: "_Window") -> object:
        last_RT = np.ones(self.split_RT.shape)
        place_S = self.found.quota_RT[self.split_RT] - total.below_S
        for at, place, numbers in zip(zip(*self.split_RT.nonzero()), place_S, total.packed().inside[0]):
            if not 0 < place <= len(numbers):
                return replace(self, width=4 * self.width + 1)
            last_RT[at] = np.sort(numbers)[place - 1]
        return self.then(Kept(key_RT=self.found.key_RT, last_RT=last_RT))


@dataclass(frozen=True, slots=True)
class _Window:
    """For S rows and places: the number of ties below the window, and the numbers of those in it, in pieces."""

    below_S: np.ndarray
    inside: list[list[np.ndarray]]

    def packed(self) -> "_Window":
        """Join the numbers into one piece."""
        return _Window(self.below_S, [[np.concatenate(numbers) for numbers in zip(*self.inside)]])
