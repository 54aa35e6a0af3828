"""Finds the values at given places in the order of a scope, per row, exactly and in bounded memory.

Keys are integers in the order of the values: float32 magnitudes in 32 bits, float64 in 64. The key at a place is found
by digits of 16 bits, from the top: a pass counts one digit of the keys that agree so far, and if those are few it
gathers them all and no further pass is needed. Small scopes take one pass, others two for 32 bits and two to four for
64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Per, StatisticScope, Where

# R rows (tasks, or one), T places of each row, B bins of a digit, N elements

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS

# Keys of a row that are gathered before they are counted: 2 MiB. The second pass over a block of seven million
# elements gathers all that are left, and a tensor of fewer elements takes one pass.
GATHERED = 1 << 18

MANY = 64  # the pieces of a list at which they are joined into one array

# Elements whose keys are made at once: keys may take a hundred bytes per element and task, ranges have half a million.
TILE_ELEMENTS = 1 << 16


def magnitude_keys(deltas: Tensor) -> Tensor:
    """Map float32 to int32 of the same shape, ordered like |x|; 0 for 0."""
    return deltas.contiguous().view(torch.int32) & 0x7FFFFFFF


def magnitudes(keys: np.ndarray) -> np.ndarray:
    """Return the |x| of these keys, float32."""
    return keys.astype(np.int32).view(np.float32)


def value_keys(values: Tensor) -> Tensor:
    """Map float64 to int64 of the same shape, ordered like x; 0 for 0."""
    bits = (values + 0.0).view(torch.int64)  # + 0.0: negative zero would come before zero
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def values(keys: np.ndarray) -> np.ndarray:
    """Return the x of these keys, float64."""
    keys = keys.astype(np.int64)
    found: np.ndarray = (keys ^ ((keys >> 63) & 0x7FFFFFFFFFFFFFFF)).view(np.float64)
    return found


def tiles(deltas: Tensor, where: Where) -> Iterator[tuple[Tensor, Where]]:
    """Yield a range piece by piece, at least one: [R, n] and the place of each."""
    for low in range(0, max(1, deltas.shape[1]), TILE_ELEMENTS):
        yield deltas[:, low : low + TILE_ELEMENTS].contiguous(), replace(where, start=where.start + low)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundKeys:
    """The keys at the requested places. Place 0, before the first, has the largest of all keys and quota 0."""

    key_RT: np.ndarray
    """Keys, int64."""
    quota_RT: np.ndarray
    """The number of elements with this key among the first elements up to the place."""
    equal_RT: np.ndarray
    """The number of elements with this key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtPlaces:
    """The first pass of a search for keys at given places."""

    scope: StatisticScope
    per: Per = "task"
    keys: Callable[[Tensor, Where], Tensor]
    """Computes the keys: float32 [R, N] -> [R, N] or fewer rows, int32 or int64."""
    key_bytes: int = 4
    """Bytes of a key, in this pass and those that follow."""
    places: Callable[[int, int], tuple[int, ...]]
    """Maps (elements of the scope, those of a row with a key above 0) to places from the top; 1 is the largest key.

    A place past the last one means the last.
    """
    then: Callable[[FoundKeys], Any]
    """Makes what follows from the keys: the next statistic, or a value."""

    def measure(self, deltas: Tensor, where: Where) -> "_Scope":
        positive_R, tally, bits = np.zeros((), np.int64), None, 0
        for keys in self._tiles(deltas, where):
            bits = keys.element_size() * 8
            tile = _tally(list(keys), bits, bits)
            tally = tile if tally is None else tally.joined(tile)
            positive_R = positive_R + np.count_nonzero((keys > 0).cpu().numpy(), axis=1)
        assert tally is not None
        return _Scope(deltas.shape[1], positive_R, bits, tally.settled())

    def memory(self, num_tasks: int, num_elements: int) -> tuple[int, int]:
        """Return the bytes of the tally of a range of this many elements, and of such a scope: keys are gathered or
        counted.

        It is at least twice what finding the last tie takes (selection.py).
        """
        lists, gathered = num_tasks * len(self.places(2, 1)), self.key_bytes * min(num_elements, GATHERED)
        ties = int(128 * num_elements**0.5) + 2048
        if num_elements <= GATHERED:
            return lists * max(gathered, ties), lists * max(gathered, ties)
        return lists * max(8 * BINS, ties), lists * max(gathered + 2 * 8 * BINS, ties)

    def _tiles(self, deltas: Tensor, where: Where) -> Iterator[Tensor]:
        for tile, there in tiles(deltas, where):
            yield self.keys(tile, there)

    def combine(self, left: "_Scope", right: "_Scope") -> "_Scope":
        positive_R = left.positive_R + right.positive_R
        return _Scope(left.size + right.size, positive_R, left.bits, left.tally.joined(right.tally))

    def finish(self, total: "_Scope") -> Any:
        places = [self.places(total.size, int(positive)) for positive in total.positive_R]
        place_RT = np.minimum(np.array(places, np.int64), total.size)
        rows = np.broadcast_to(np.arange(len(place_RT))[:, None], place_RT.shape)
        return _narrow(self, np.zeros_like(place_RT), place_RT, rows, total.bits, total.bits, total.tally)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Narrowed:
    """A later pass, over the keys whose upper bits equal the prefix."""

    search: AtPlaces
    prefix_RT: np.ndarray
    quota_RT: np.ndarray
    """The place among these keys."""
    bits: int
    shift: int
    """The number of bits of a key below the prefix."""

    @property
    def scope(self) -> StatisticScope:
        return self.search.scope

    @property
    def per(self) -> Per:
        return self.search.per

    def measure(self, deltas: Tensor, where: Where) -> "_Tally":
        tally = None
        for keys in self.search._tiles(deltas, where):
            left = [
                row[_indices((row >> self.shift) == int(prefix))]
                for row, prefix_T in zip(keys, self.prefix_RT, strict=True)
                for prefix in prefix_T
            ]
            tile = _tally(left, self.shift, self.bits)
            tally = tile if tally is None else tally.joined(tile)
        assert tally is not None
        return tally.settled()

    def combine(self, left: "_Tally", right: "_Tally") -> "_Tally":
        return left.joined(right)

    def finish(self, total: "_Tally") -> Any:
        own = np.arange(self.prefix_RT.size).reshape(self.prefix_RT.shape)
        return _narrow(self.search, self.prefix_RT, self.quota_RT, own, self.bits, self.shift, total)


def _narrow(
    search: AtPlaces,
    prefix_RT: np.ndarray,
    quota_RT: np.ndarray,
    list_RT: np.ndarray,
    bits: int,
    shift: int,
    tally: "_Tally",
) -> Any:
    """Start what follows a pass. list_RT: the index of the tally's list for each row and place."""
    if tally.counts_XB is None:
        sorted_X = [np.sort(np.concatenate(keys))[::-1].astype(np.int64) for keys in tally.loose_X]
        return search.then(_pick(sorted_X, list_RT, quota_RT))
    digit_RT, above_RT, inside_RT = _locate(tally.counted()[list_RT], quota_RT)
    prefix_RT = digit_RT - BINS // 2 if shift == bits else (prefix_RT << DIGIT_BITS) | digit_RT
    quota_RT = quota_RT - above_RT
    if shift == DIGIT_BITS:
        return search.then(FoundKeys(key_RT=prefix_RT, quota_RT=quota_RT, equal_RT=inside_RT))
    return _Narrowed(search=search, prefix_RT=prefix_RT, quota_RT=quota_RT, bits=bits, shift=shift - DIGIT_BITS)


def _pick(sorted_X: list[np.ndarray], list_RT: np.ndarray, quota_RT: np.ndarray) -> FoundKeys:
    key_RT, above_RT, equal_RT = (np.zeros_like(quota_RT) for _ in range(3))
    for at, place in np.ndenumerate(quota_RT):
        keys = sorted_X[list_RT[at]]
        key = int(keys[place - 1]) if place else int(np.iinfo(np.int64).max)
        key_RT[at], above_RT[at], equal_RT[at] = key, (keys > key).sum(), (keys == key).sum()
    return FoundKeys(key_RT=key_RT, quota_RT=quota_RT - above_RT, equal_RT=equal_RT)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the first pass has seen of a scope."""

    size: int
    positive_R: np.ndarray
    bits: int
    tally: "_Tally"


@dataclass(frozen=True, slots=True)
class _Tally:
    """Keys of X lists: gathered while they are few, then counted by one digit."""

    counts_XB: np.ndarray | None
    loose_X: list[list[np.ndarray]]
    size_X: np.ndarray
    """The number of loose keys in each list."""
    shift: int
    bits: int

    def joined(self, other: "_Tally") -> "_Tally":
        for loose, added in zip(self.loose_X, other.loose_X, strict=True):
            loose.extend(added)
        counts_XB = self.counts_XB
        if other.counts_XB is not None:
            counts_XB = other.counts_XB if counts_XB is None else counts_XB + other.counts_XB
        joined = replace(self, counts_XB=counts_XB, size_X=self.size_X + other.size_X)
        if joined.size_X.max(initial=0) > GATHERED:
            return joined._all_counted()
        return joined if max(map(len, self.loose_X), default=0) < MANY else joined._packed()

    def settled(self) -> "_Tally":
        """Count the gathered keys too if any keys are counted, in the thread that measured them."""
        return self._packed() if self.counts_XB is None or not self.size_X.any() else self._all_counted()

    def _packed(self) -> "_Tally":
        """Join the keys of each list into one array: small pieces that stay keep large blocks from being reused."""
        return replace(self, loose_X=[[np.concatenate(loose)] if loose else [] for loose in self.loose_X])

    def _all_counted(self) -> "_Tally":
        return replace(self, counts_XB=self.counted(), loose_X=[[] for _ in self.loose_X], size_X=self.size_X * 0)

    def counted(self) -> np.ndarray:
        """Count all keys, int64 [X, BINS]."""
        counts_XB = np.zeros((len(self.loose_X), BINS), np.int64) if self.counts_XB is None else self.counts_XB
        for list_, loose in enumerate(self.loose_X):
            if loose:
                counts_XB[list_] += _count(torch.from_numpy(np.concatenate(loose)), self.shift, self.bits)
        return counts_XB


def _tally(rows: list[Tensor], shift: int, bits: int) -> _Tally:
    """Tally keys that agree above their lower `shift` bits."""
    if any(len(row) > GATHERED for row in rows):
        counts_XB = np.stack([_count(row, shift, bits) for row in rows])
        return _Tally(counts_XB, [[] for _ in rows], np.zeros(len(rows), np.int64), shift, bits)
    loose_X = [[row.cpu().numpy()] for row in rows]
    return _Tally(None, loose_X, np.array([len(row) for row in rows]), shift, bits)


def _indices(mask_N: Tensor) -> Tensor:
    """Return the indices of elements that are true, int64: numpy finds few of them in a quarter of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask_N.cpu().numpy())).to(mask_N.device)


def _count(keys: Tensor, shift: int, bits: int) -> np.ndarray:
    """Count each digit, which is the upper 16 of the lower `shift` bits. int64 [BINS], ordered like the keys."""
    digits = keys >> (shift - DIGIT_BITS)
    digits = digits + BINS // 2 if shift == bits else digits & (BINS - 1)  # keys are signed
    return torch.bincount(digits, minlength=BINS).cpu().numpy()


def _locate(counts_RTB: np.ndarray, place_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the bin that contains the place from the top, and the numbers of elements in the bins above it and in it."""
    from_top_RTB = counts_RTB[..., ::-1].cumsum(-1)
    bin_RT = (from_top_RTB < place_RT[..., None]).sum(-1)
    up_to_RT = np.take_along_axis(from_top_RTB, bin_RT[..., None], -1)[..., 0]
    before_RT = np.take_along_axis(from_top_RTB, np.maximum(bin_RT - 1, 0)[..., None], -1)[..., 0]
    above_RT = np.where(bin_RT > 0, before_RT, 0)
    return BINS - 1 - bin_RT, above_RT, up_to_RT - above_RT
