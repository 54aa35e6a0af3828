"""The c elements of largest magnitude (or of the largest score) of each row over a scope: exactly c, in bounded memory.

One total order: larger key first, ties by position (tensors by name, then C order). The key at place c comes from
places.py; where only some of the elements with that key are kept, one more pass finds the last of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.methods.method import Per, StatisticScope, Where
from flexmerge_cli.methods.places import AtPlaces, Found, magnitude_keys

# R rows, T places of each row, N elements

Position = tuple[str, int]
"""The name of a tensor and an index in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The elements that are among the c largest, for R rows and T numbers c."""

    key_RT: np.ndarray
    """int64: elements with larger keys are kept."""
    last: dict[tuple[int, int], Position] = field(default_factory=dict)
    """(row, place) -> the last element with this very key that is kept; without an entry all of them are."""

    def take(self, tasks: list[int]) -> "Kept":
        last = {
            (new, place): position
            for new, old in enumerate(tasks)
            for (row, place), position in self.last.items()
            if row == old
        }
        return Kept(key_RT=self.key_RT[tasks], last=last)

    def mask(self, keys: Tensor, where: Where, place: int = 0) -> Tensor:
        """Keys [R, *] of elements from where.start on -> bool [R, *]."""
        flat = keys.reshape(len(keys), keys[0].numel())
        key_R = np.minimum(self.key_RT[:, place], torch.iinfo(flat.dtype).max)
        kept = flat >= torch.from_numpy(key_R).to(flat.device, flat.dtype)[:, None]
        for (row, column), (tensor, index) in self.last.items():
            if column == place and (where.tensor, where.start + flat.shape[1] - 1) > (tensor, index):
                first = index + 1 - where.start if where.tensor == tensor else 0  # the first tie that is dropped
                first = max(first, 0)
                kept[row, first:] = flat[row, first:] > int(self.key_RT[row, column])
        return kept.view(keys.shape)


def places_of(keys: Tensor) -> Tensor:
    """The rank of each element along the last axis, in memory: 0 is the largest key, ties by index. int64, same
    shape."""
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order)
    return places.scatter_(-1, order, torch.arange(keys.shape[-1], device=keys.device).expand_as(order))


def keep_largest(
    *,
    scope: StatisticScope,
    counts: Callable[[int, int], tuple[int, ...]],
    keys: Callable[[Tensor, Where], Tensor] = lambda deltas, _where: magnitude_keys(deltas),
    per: Per = "task",
    then: Callable[[Kept], object] = lambda kept: kept,
) -> AtPlaces:
    """A statistic whose value is a Kept.

    counts: (elements of the scope, those of a row with a key above 0) -> numbers c, each at most the elements.
    keys: of what is compared, by default the magnitude. then: what follows, by default the Kept itself.
    Elements with key 0 are all kept where one of them is: zeros are the same kept or not.
    """

    def settle(found: Found) -> object:
        split_RT = (found.quota_RT > 0) & (found.quota_RT < found.equal_RT) & (found.key_RT > 0)
        if split_RT.any():
            return _Ties(
                scope=scope, per=per, keys=keys, key_RT=found.key_RT, quota_RT=found.quota_RT * split_RT, then=then
            )
        return then(Kept(key_RT=found.key_RT))

    return AtPlaces(scope=scope, per=per, keys=keys, places=counts, then=settle)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ties:
    """The last pass, only where some ties are kept and some are not: find the last one that is."""

    scope: StatisticScope
    per: Per
    keys: Callable[[Tensor, Where], Tensor]
    key_RT: np.ndarray
    quota_RT: np.ndarray
    """The number of ties to keep; 0 if there is nothing to find."""
    then: Callable[[Kept], object]

    def measure(self, deltas: Tensor, where: Where) -> "_Walk":
        keys = self.keys(deltas, where)
        ties_RTN = keys[:, None, :] == torch.from_numpy(self.key_RT).to(keys.device)[:, :, None]
        return _Walk(seen_RT=np.zeros_like(self.quota_RT), last={}, ahead=[(where, ties_RTN.cpu().numpy())])

    def combine(self, left: "_Walk", right: "_Walk") -> "_Walk":
        return self._walk(_Walk(seen_RT=left.seen_RT, last=left.last, ahead=left.ahead + right.ahead))

    def finish(self, total: "_Walk") -> object:
        return self.then(Kept(key_RT=self.key_RT, last=self._walk(total).last))

    def _walk(self, walk: "_Walk") -> "_Walk":
        seen_RT, last = walk.seen_RT, walk.last
        for where, ties_RTN in walk.ahead:
            before_RT, seen_RT = seen_RT, seen_RT + ties_RTN.sum(2)
            for row, place in np.argwhere((before_RT < self.quota_RT) & (self.quota_RT <= seen_RT)):
                nth = self.quota_RT[row, place] - before_RT[row, place] - 1
                index = where.start + int(np.flatnonzero(ties_RTN[row, place])[nth])
                last[int(row), int(place)] = (where.tensor, index)
        return _Walk(seen_RT=seen_RT, last=last, ahead=[])


@dataclass(frozen=True, slots=True)
class _Walk:
    """Ties seen so far, the positions found among them, and ranges that were not walked yet."""

    seen_RT: np.ndarray
    last: dict[tuple[int, int], Position]
    ahead: list[tuple[Where, np.ndarray]]
