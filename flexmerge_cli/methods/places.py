"""Finds the values at given places in the order of a scope, per row, exactly and in bounded memory.

Keys are integers in the order of the values: float32 magnitudes in 32 bits, float64 in 64. The key at a place is found
by digits of 16 bits, from the top: a pass counts one digit of the keys that agree so far, and if those are few it
gathers them all and no further pass is needed. Small scopes take one pass, others two for 32 bits and two to four for
64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Per, StatisticScope, Where
from flexmerge_cli.random import tie_numbers

# R rows (tasks, or one), T places of each row, B bins of a digit, N elements

DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS

# Keys of a row that are gathered before they are counted: 2 MiB. The second pass over a block of seven million
# elements gathers all that are left, and a tensor of fewer elements takes one pass.
GATHERED = 1 << 18

MANY = 64  # the pieces of a list at which they are joined into one array

# Elements whose keys are made at once: keys may take a hundred bytes per element and task, ranges have half a million.
TILE_ELEMENTS = 1 << 16

NO_SIGN = 0x7FFFFFFF  # the bits of a float32 magnitude


def magnitude_keys(deltas: Tensor) -> Tensor:
    """Map float32 to int32 of the same shape, ordered like |x|; 0 for 0."""
    return deltas.contiguous().view(torch.int32) & NO_SIGN


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
    last_RT: np.ndarray | None = None
    """The tie number of the last element up to the place, 1 where all with this key are; None if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtPlaces:
    """The first pass of a search for keys at given places."""

    scope: StatisticScope
    per: Per = "task"
    keys: Callable[[Tensor, Where], Tensor] | None = None
    """Computes the keys: float32 [R, N] -> [R, N] or fewer rows, int32 or int64. None: magnitudes."""
    key_bytes: int = 4
    """Bytes of a key, in this pass and those that follow."""
    splits_ties: bool = False
    """Whether tie numbers are gathered with the keys, which spares a pass over elements that tie."""
    places: Callable[[int, int], tuple[int, ...]]
    """Maps (elements of the scope, those of a row with a key above 0) to places from the top; 1 is the largest key.

    A place past the last one means the last.
    """
    then: Callable[[FoundKeys], Any]
    """Makes what follows from the keys: the next statistic, or a value."""

    def measure(self, deltas: Tensor, where: Where) -> "_Scope":
        positive_R, tally = np.zeros((), np.int64), None
        for rows, _ in self.rows(deltas, where):
            if tally is None:
                tally = _Tally.of(len(rows), rows[0].num_bits, rows[0].num_bits)
                if deltas.shape[1] > GATHERED:
                    tally.count_all()
            positive_R = positive_R + tally.add(rows)
        assert tally is not None
        return _Scope(deltas.shape[1], positive_R, tally.settle())

    def rows(self, deltas: Tensor, where: Where) -> Iterator[tuple[list["_Row"], Where]]:
        """Yield the keys of each row of a range, piece by piece, and the place of each piece."""
        if self.keys is None and native.lib is not None and deltas.device.type == "cpu":
            yield [_Row(row.contiguous().view(torch.int32), NO_SIGN) for row in deltas], where
            return
        for tile, there in tiles(deltas, where):
            keys = magnitude_keys(tile) if self.keys is None else self.keys(tile, there)
            yield [_Row(row.contiguous(), -1) for row in keys], there

    def memory(self, num_tasks: int, num_elements: int) -> tuple[int, int]:
        """Return the bytes of the tally of a range of this many elements, and of such a scope: keys are gathered or
        counted.

        It is at least twice what finding the last tie takes (selection.py).
        """
        lists, item_bytes = num_tasks * len(self.places(2, 1)), self.key_bytes + (8 if self.splits_ties else 0)
        gathered = item_bytes * min(num_elements, GATHERED)
        ties = int(128 * num_elements**0.5) + 2048
        if num_elements <= GATHERED:
            return lists * max(gathered, ties), lists * max(gathered, ties)
        return lists * max(8 * BINS, ties), lists * max(gathered + 2 * 8 * BINS, ties)

    def combine(self, left: "_Scope", right: "_Scope") -> "_Scope":
        positive_R = left.positive_R + right.positive_R
        return _Scope(left.size + right.size, positive_R, left.tally.join(right.tally))

    def finish(self, total: "_Scope") -> Any:
        places = [self.places(total.size, int(positive)) for positive in total.positive_R]
        place_RT = np.minimum(np.array(places, np.int64), total.size)
        rows = np.broadcast_to(np.arange(len(place_RT))[:, None], place_RT.shape)
        return _narrow(self, np.zeros_like(place_RT), place_RT, rows, total.tally)


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
        tally = _Tally.of(self.prefix_RT.size, self.shift, self.bits)
        for rows, there in self.search.rows(deltas, where):
            pairs = [(row, int(prefix)) for row, own in zip(rows, self.prefix_RT, strict=True) for prefix in own]
            at = [row.at(self.shift, prefix) for row, prefix in pairs]
            numbers = []
            if self.search.splits_ties and tally.counts_XB is None:
                start = np.uint64(there.start)
                numbers = [tie_numbers(there.tensor, indices.astype(np.uint64) + start) for indices in at]
            tally.add([row.picked(indices) for (row, _), indices in zip(pairs, at)], numbers)
        return tally.settle()

    def combine(self, left: "_Tally", right: "_Tally") -> "_Tally":
        return left.join(right)

    def finish(self, total: "_Tally") -> Any:
        own = np.arange(self.prefix_RT.size).reshape(self.prefix_RT.shape)
        return _narrow(self.search, self.prefix_RT, self.quota_RT, own, total)


def _narrow(
    search: AtPlaces,
    prefix_RT: np.ndarray,
    quota_RT: np.ndarray,
    list_RT: np.ndarray,
    tally: "_Tally",
) -> Any:
    """Start what follows a pass. list_RT: the index of the tally's list for each row and place."""
    bits, shift = tally.bits, tally.shift
    if tally.counts_XB is None:
        return search.then(_pick(tally.settle(), list_RT, quota_RT))
    tally.count_all()
    digit_RT, above_RT, inside_RT = _locate(tally.counts_XB[list_RT], quota_RT)
    prefix_RT = digit_RT - BINS // 2 if shift == bits else (prefix_RT << DIGIT_BITS) | digit_RT
    quota_RT = quota_RT - above_RT
    if shift == DIGIT_BITS:
        return search.then(FoundKeys(key_RT=prefix_RT, quota_RT=quota_RT, equal_RT=inside_RT))
    return _Narrowed(search=search, prefix_RT=prefix_RT, quota_RT=quota_RT, bits=bits, shift=shift - DIGIT_BITS)


def _pick(tally: "_Tally", list_RT: np.ndarray, place_RT: np.ndarray) -> FoundKeys:
    key_RT, quota_RT, equal_RT = (np.zeros_like(place_RT) for _ in range(3))
    last_RT = np.ones(place_RT.shape)
    sorted_X = [np.sort(keys)[::-1] for (keys,) in tally.loose_X]
    for at, place in np.ndenumerate(place_RT):
        keys, numbers = sorted_X[list_RT[at]], tally.numbers_X[list_RT[at]]
        key = int(keys[place - 1]) if place else int(np.iinfo(np.int64).max)
        key_RT[at], quota_RT[at], equal_RT[at] = key, place - (keys > key).sum(), (keys == key).sum()
        if numbers and 0 < quota_RT[at] < equal_RT[at]:
            last_RT[at] = np.sort(numbers[0][tally.loose_X[list_RT[at]][0] == key])[quota_RT[at] - 1]
    known = any(tally.numbers_X)
    return FoundKeys(key_RT=key_RT, quota_RT=quota_RT, equal_RT=equal_RT, last_RT=last_RT if known else None)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What the first pass has seen of a scope."""

    size: int
    positive_R: np.ndarray
    tally: "_Tally"


@dataclass(slots=True)
class _Tally:
    """Keys of X lists: gathered while they are few, then counted by one digit."""

    shift: int
    bits: int
    loose_X: list[list[np.ndarray]]
    numbers_X: list[list[np.ndarray]]
    """The tie numbers of the loose keys, if they are known."""
    size_X: np.ndarray
    """The number of loose keys in each list."""
    counts_XB: np.ndarray | None = None

    @staticmethod
    def of(lists: int, shift: int, bits: int) -> "_Tally":
        """Begin to tally keys that agree above their lower `shift` bits."""
        return _Tally(shift, bits, [[] for _ in range(lists)], [[] for _ in range(lists)], np.zeros(lists, np.int64))

    def count_all(self) -> None:
        """Count what is gathered, and all that is added from now on."""
        if self.counts_XB is None:
            self.counts_XB = np.zeros((len(self.loose_X), BINS), np.int64)
        for counts_B, loose, numbers in zip(self.counts_XB, self.loose_X, self.numbers_X):
            for keys in loose:
                _Row(torch.from_numpy(keys), -1).count(self.shift, counts_B)
            loose.clear()
            numbers.clear()
        self.size_X[:] = 0

    def add(self, rows: Sequence["_Row"], numbers: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Add keys to each list, and return how many of them are above 0, [X]."""
        if self.counts_XB is not None:
            counted = zip(self.counts_XB, rows, strict=True)
            return np.array([row.count(self.shift, counts_B) for counts_B, row in counted])
        for loose, row in zip(self.loose_X, rows, strict=True):
            loose.append(row.keys())
        for known, added in zip(self.numbers_X, numbers):
            known.append(added)
        self.size_X += [len(row.bits) for row in rows]
        positive = np.array([np.count_nonzero(loose[-1] > 0) for loose in self.loose_X])
        self._check_size()
        return positive

    def join(self, other: "_Tally") -> "_Tally":
        """Add what another has tallied, which is consumed."""
        for ours, theirs in ((self.loose_X, other.loose_X), (self.numbers_X, other.numbers_X)):
            for known, added in zip(ours, theirs, strict=True):
                known.extend(added)
        if self.counts_XB is None:
            self.counts_XB = other.counts_XB
        elif other.counts_XB is not None:
            self.counts_XB += other.counts_XB
        self.size_X += other.size_X
        self._check_size()
        return self

    def _check_size(self) -> None:
        if self.size_X.max(initial=0) > GATHERED:
            self.count_all()
        elif max(map(len, self.loose_X), default=0) >= MANY:
            self._pack()

    def settle(self) -> "_Tally":
        """Count the gathered keys too if any keys are counted, in the thread that measured them."""
        if self.counts_XB is None:
            self._pack()
        else:
            self.count_all()
        return self

    def _pack(self) -> None:
        """Join the keys of each list into one array: small pieces that stay keep large blocks from being reused."""
        for pieces in (*self.loose_X, *self.numbers_X):
            pieces[:] = [np.concatenate(pieces)] if pieces else []


@dataclass(frozen=True, slots=True)
class _Row:
    """The keys of one row. They may be magnitudes of task vectors that are not computed but read as they lie."""

    bits: Tensor
    """Adjacent in memory, int32 or int64 [N]."""
    mask: int
    """The key consists of these bits."""

    @property
    def num_bits(self) -> int:
        return 8 * self.bits.element_size()

    def keys(self) -> np.ndarray:
        return (self.bits if self.mask == -1 else self.bits & self.mask).cpu().numpy()

    def picked(self, at: np.ndarray) -> "_Row":
        return _Row(self.bits[torch.from_numpy(at).to(self.bits.device)], self.mask)

    def at(self, shift: int, prefix: int) -> np.ndarray:
        """Return the indices of the keys whose bits above the lower `shift` equal the prefix, int64."""
        if native.lib is None or self.bits.device.type != "cpu":
            # numpy finds few of them in a quarter of torch's time.
            return np.flatnonzero((((self.bits & self.mask) >> shift) == prefix).cpu().numpy())
        count, found = len(self.bits), np.empty(len(self.bits) + 1, np.int64)
        native.lib.flexmerge_find(
            self.bits.data_ptr(), self.num_bits, count, self.mask, shift, prefix, found.ctypes.data
        )
        return found[1 : 1 + found[0]].copy()

    def count(self, shift: int, counts_B: np.ndarray) -> int:
        """Count each digit, which is the upper 16 of the lower `shift` bits, and return how many keys are above 0.

        counts_B: int64 [BINS], in the order of the keys; it is added to.
        """
        if native.lib is not None and self.bits.device.type == "cpu":
            positive, count = np.zeros(1, np.int64), len(self.bits)
            native.lib.flexmerge_count(
                self.bits.data_ptr(), self.num_bits, count, self.mask, shift, counts_B.ctypes.data, positive.ctypes.data
            )
            return int(positive[0])
        keys = self.bits & self.mask
        digits = keys >> (shift - DIGIT_BITS)
        digits = digits + BINS // 2 if shift == self.num_bits else digits & (BINS - 1)  # keys are signed
        counts_B += torch.bincount(digits, minlength=BINS).cpu().numpy()
        return int((keys > 0).sum())


def _locate(counts_RTB: np.ndarray, place_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the bin that contains the place from the top, and the numbers of elements in the bins above it and in it."""
    from_top_RTB = counts_RTB[..., ::-1].cumsum(-1)
    bin_RT = (from_top_RTB < place_RT[..., None]).sum(-1)
    up_to_RT = np.take_along_axis(from_top_RTB, bin_RT[..., None], -1)[..., 0]
    before_RT = np.take_along_axis(from_top_RTB, np.maximum(bin_RT - 1, 0)[..., None], -1)[..., 0]
    above_RT = np.where(bin_RT > 0, before_RT, 0)
    return BINS - 1 - bin_RT, above_RT, up_to_RT - above_RT
