"""Chooses a centre for each tensor and a residual for each task, so that the predicted damage is least for a budget of
bytes.

From the tables of all tensors (see auto_table.py) and a budget it finds choices in milliseconds, from the plan alone.
It promises nothing about accuracy. The layout says how many bytes on disk the choices take, headers and all.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.auto_centres import CentreBits
from flexmerge_cli.allocation.auto_hull import slopes
from flexmerge_cli.allocation.auto_statistics import Groups, TensorStatistics, weights
from flexmerge_cli.allocation.auto_table import AutoTable, TensorChoice
from flexmerge_cli.errors import GateError
from flexmerge_cli.request.auto_options import Limits

# T tensors, P points of one tensor's frontier

# A target in bytes on disk is met by shrinking the budget by the excess. Names and headers hardly change, so one or two
# rounds are enough. After this many rounds the steps double, so that the loop ends.
PLAIN_ROUNDS = 3

# Then larger budgets are tried, by what is left and by halves of it. Each round lays out a bundle, so there are few.
GROWTH_ROUNDS = 12

# At last single better points are tried. Each trial lays out a whole bundle, so more tensors get fewer trials: this
# number divided by the number of tensors. For 207 tensors of eight tasks that adds up to 1.6 s to a search of 0.4 s.
TRIAL_TENSORS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The choices for all tensors."""

    choices: tuple[TensorChoice, ...]
    """Sorted by tensor name."""
    num_bytes: int
    cost: float
    """The predicted damage Σ w·P, which ranks plans of one family; it is no estimate of accuracy."""


class Search:
    """The tables of a plan. It is made once and then asked for any number of budgets."""

    def __init__(self, tables: Iterable[AutoTable]) -> None:
        self.tables = sorted(tables, key=lambda table: table.tensor.name)
        self._segments = self._sorted_segments()
        energies = [np.maximum(np.diag(table.tensor.gram), 0.0) for table in self.tables]
        self._energy_M: np.ndarray = np.sum(energies, axis=0)

    @property
    def smallest_bytes(self) -> int:
        return sum(int(table.num_bytes[0]) for table in self.tables)

    def solve(self, budget_bytes: int) -> Solution:
        """Take the greatest savings per byte first, then fill the rest of the budget, which is never exceeded.

        Raises GateError if the budget is below the smallest size.
        """
        if budget_bytes < self.smallest_bytes:
            raise GateError(
                f"`auto` cannot store mergeable tensors in {budget_bytes:,} bytes; it needs {self.smallest_bytes:,}",
                hint="raise the size",
            )
        points, left = self._prefix(budget_bytes)
        self._fill(points, left)
        return self._solution(points)

    def solve_priced(
        self, max_bytes: float, price: Callable[[Solution], float], smallest: Solution | None = None
    ) -> Solution:
        """Solve for a limit on the size of the whole bundle, as `price` gives it. The limit is never exceeded.

        smallest: choices that are within the limit, if any are known. Raises GateError if even the smallest exceed it.
        """
        smallest = smallest or self.solve(self.smallest_bytes)
        if price(smallest) > max_bytes:
            smallest = self.smallest_priced(price)
        if price(smallest) > max_bytes:
            raise GateError(
                f"`auto` cannot reach {max_bytes:,.0f} bytes; its smallest bundle has {price(smallest):,.0f}",
                hint="raise the size",
            )
        return self._spent(smallest, max_bytes, price)

    def _spent(self, smallest: Solution, max_bytes: float, price: Callable[[Solution], float]) -> Solution:
        """Return choices that weigh no more than the limit, which `smallest` does not exceed."""
        budget = int(max_bytes - (price(smallest) - smallest.num_bytes))
        rounds = 0
        while budget > self.smallest_bytes:
            solution = self.solve(budget)
            excess = price(solution) - max_bytes
            if excess <= 0:
                return self._improved(self._grown(solution, budget, max_bytes, price), max_bytes, price)
            rounds += 1
            budget = solution.num_bytes - math.ceil(excess) * 2 ** max(0, rounds - PLAIN_ROUNDS)
        return self._improved(smallest, max_bytes, price)

    def smallest_priced(self, price: Callable[[Solution], float]) -> Solution:
        """Start from the choices with the fewest bytes, and take single better ones as long as the bundle shrinks.

        Then as many bytes are spent as for any limit, again and again as long as the result weighs less.
        """
        smallest = self.solve(self.smallest_bytes)
        least = self._improved(smallest, price(smallest) - 1, price, shrink=True)
        while price(found := self._spent(least, price(least), price)) < price(least):
            least = found
        return least

    def _grown(self, solution: Solution, budget: int, max_bytes: float, price: Callable[[Solution], float]) -> Solution:
        """Spend what is left of the limit: more bytes may mean fewer parts, and so smaller headers."""
        spare = int(max_bytes - price(solution))
        for _ in range(GROWTH_ROUNDS):
            larger = self.solve(budget + spare)
            if larger == solution:
                break
            if price(larger) <= max_bytes:
                solution, budget = larger, budget + spare
                spare = int(max_bytes - price(solution))
            else:
                spare //= 2
        return solution

    def _improved(
        self, solution: Solution, max_bytes: float, price: Callable[[Solution], float], *, shrink: bool = False
    ) -> Solution:
        """Replace single choices by better ones until none fits: a better choice may need smaller headers and fewer
        names.

        Among the better points whose data alone fit, it tries the nearest, greatest saving per byte first, over and
        over until a pass over all of them takes none or the trials are used up. shrink: each choice must make the
        bundle smaller than the one before.
        """
        points = [int(np.searchsorted(t.num_bytes, c.num_bytes)) for t, c in zip(self.tables, solution.choices)]
        trials = TRIAL_TENSORS // max(1, len(points))
        takes_any = True
        while takes_any:
            takes_any = False
            for tensor, point in self._better(points, int(max_bytes - solution.num_bytes), trials):
                if point <= points[tensor]:
                    continue  # this pass took a better one
                if not trials:
                    return solution
                trials -= 1
                tried = self._solution([*points[:tensor], point, *points[tensor + 1 :]])
                weight = price(tried)
                if weight <= max_bytes:
                    solution, points[tensor], takes_any = tried, point, True
                    max_bytes = weight - 1 if shrink else max_bytes
        return solution

    def _better(self, points: list[int], most_bytes: int, count: int) -> list[tuple[int, int]]:
        """List the better points (tensor, point) that add the fewest bytes, greatest saving per byte first."""
        found: list[tuple[int, float, int, int]] = []
        for tensor, (table, now) in enumerate(zip(self.tables, points)):
            added = table.num_bytes[now + 1 :] - table.num_bytes[now]
            saved = (table.cost[now] - table.cost[now + 1 :]) / added
            stop = int(np.searchsorted(added, most_bytes, side="right"))
            found += zip(
                added[:stop].tolist(),
                (-saved[:stop]).tolist(),
                itertools.repeat(tensor),
                range(now + 1, now + 1 + stop),
            )
        nearest = sorted(found)[:count]
        return [(tensor, point) for _, _, tensor, point in sorted(nearest, key=lambda item: item[1:])]

    def solve_distance(self, max_distance: float) -> Solution:
        """Return the smallest choices whose predicted distances stay under a limit, among those that are best for some
        price of a byte.

        Exact copies reach any distance, so there are always such choices. A task that equals the base has a distance
        only if it is exact, so it is stored exactly.
        """
        limit_M = max_distance**2 * self._energy_M
        points = [int(table.vertices[0]) for table in self.tables]
        lost_TM = np.array([table.choice(point).errors for table, point in zip(self.tables, points)])
        for tensor, vertex in self._segments[0]:
            if (lost_TM.sum(axis=0) <= limit_M).all():
                break
            points[tensor] = int(self.tables[tensor].vertices[vertex])
            lost_TM[tensor] = self.tables[tensor].choice(points[tensor]).errors
        return self._solution(points)

    def distances(self, solution: Solution) -> np.ndarray:
        """Return the predicted ‖θ̂ - θ‖ / ‖τ‖ of every task, over all tensors searched: [M].

        For a task that equals the base it is 0 if the task is exact, and nan otherwise.
        """
        lost_M = np.sum([choice.errors for choice in solution.choices], axis=0)
        of_base_M = np.where(lost_M > 0, np.nan, 0.0)
        found: np.ndarray = np.sqrt(np.divide(lost_M, self._energy_M, out=of_base_M, where=self._energy_M > 0))
        return found

    def uniform(self, *, centre_bits: CentreBits, bits: int) -> tuple[int, float]:
        """Return the bytes and cost of a plan without a search: all tasks in one group, with the same number of bits.

        That is `low_bit:bits=…,centre=average,centre_bits=…` with the codes of `auto`; vectors take 8 bits on a centre
        of 8 bits.
        """
        prices = [table.uniform(centre_bits, bits) for table in self.tables]
        return sum(num_bytes for num_bytes, _ in prices), sum(cost for _, cost in prices)

    def _sorted_segments(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """List the hull segments of all tensors, greatest saving per byte first, as (tensor, vertex reached), and the
        bytes that each adds."""
        owners, vertices, saved, added = [], [], [], []
        for number, table in enumerate(self.tables):
            num_bytes, cost = table.num_bytes[table.vertices], table.cost[table.vertices]
            owners.append(np.full(len(num_bytes) - 1, number))
            vertices.append(np.arange(1, len(num_bytes)))
            saved.append(slopes(num_bytes, cost))
            added.append(np.diff(num_bytes))
        if not owners:
            return [], np.zeros(0, np.int64)
        order = np.argsort(-np.concatenate(saved), kind="stable")  # ties: tensor by name, then position
        reached = zip(np.concatenate(owners)[order].tolist(), np.concatenate(vertices)[order].tolist())
        return list(reached), np.concatenate(added)[order]

    def _prefix(self, budget_bytes: int) -> tuple[list[int], int]:
        """Take segments until the first that does not fit. Returns the points on the frontiers, and the bytes left."""
        reached, added = self._segments
        spent = np.cumsum(added)
        count = int(np.searchsorted(spent, budget_bytes - self.smallest_bytes, side="right"))
        points = [int(table.vertices[0]) for table in self.tables]
        for tensor, vertex in reached[:count]:
            points[tensor] = int(self.tables[tensor].vertices[vertex])
        left = budget_bytes - self.smallest_bytes - (int(spent[count - 1]) if count else 0)
        return points, left

    def _fill(self, points: list[int], left: int) -> None:
        """Take the greatest saving per byte among all points that fit, until none does. Changes `points`.

        Points off a frontier are never better, so every step costs bytes. A tensor's best point stays its best while it
        fits.
        """
        saved_T = np.empty(len(points))
        added_T = np.empty(len(points), np.int64)
        best_T = np.empty(len(points), np.int64)
        stale: Iterable[int] = range(len(points))
        while True:
            for tensor in stale:
                saved_T[tensor], added_T[tensor], best_T[tensor] = _best(self.tables[tensor], points[tensor], left)
            # Greatest saving, then fewest bytes, then the first by name.
            taken = int(np.lexsort((added_T, -saved_T))[0]) if len(points) else 0
            if not len(points) or saved_T[taken] == 0:
                return
            points[taken] = int(best_T[taken])
            left -= int(added_T[taken])
            added_T[taken] = left + 1
            stale = np.flatnonzero(added_T > left)

    def _solution(self, points: list[int]) -> Solution:
        return Solution(
            choices=tuple(table.choice(point) for table, point in zip(self.tables, points)),
            num_bytes=sum(int(table.num_bytes[point]) for table, point in zip(self.tables, points)),
            cost=sum(float(table.cost[point]) for table, point in zip(self.tables, points)),
        )


def search(
    tensors: Iterable[TensorStatistics],
    block_of: Mapping[str, str],
    levels: Mapping[str, Mapping[int, Groups]],
    limits: Limits = Limits(),
) -> Search:
    """Make the tables of all mergeable tensors.

    block_of: tensor -> block; levels: block -> `auto_statistics.partitions` of its part of the merge order.
    """
    tensors = list(tensors)
    weight = weights(tensors, block_of)
    return Search(AutoTable(tensor, levels[block_of[tensor.name]], weight[tensor.name], limits) for tensor in tensors)


def _best(table: AutoTable, point: int, left: int) -> tuple[float, int, int]:
    """Find the greatest saving per byte from a point of the frontier: (saving, bytes added, point). A saving of 0 means
    that none fits."""
    stop = int(np.searchsorted(table.num_bytes, table.num_bytes[point] + left, side="right"))
    if stop <= point + 1:
        return 0.0, 0, point
    added = table.num_bytes[point + 1 : stop] - table.num_bytes[point]
    saved = (table.cost[point] - table.cost[point + 1 : stop]) / added
    best = int(saved.argmax())
    return float(saved[best]), int(added[best]), point + 1 + best
