"""Measures how well a tensor codes in few bits: what `auto` needs to know of a tensor besides its Gram matrix.

Takes all rows of the base, and a sample of the rows of the tasks and of their average. Gives `weights`, the squared
errors of coding the base and the average whole, and `residuals`, the part of a residual's energy that coding loses.

The base's error is an exact sum, because a sample misses outliers: with one, 4 bits were off by a factor of 4. The
average's is the base's times the ratio of both on the sampled rows. It lies between the least and the largest ratio of
a row, and outliers are in the base as well. Where the ratio is large, the base codes better in the sampled rows than in
others, or the tasks have moved far: then the difference of both is added to the base's error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmerge_cli.later import Tensor
from flexmerge_cli.random import key64, uniform
from flexmerge_cli.residuals.coder import Matrix

WEIGHT_BITS = (2, 3, 4, 8)
RESIDUAL_BITS = (1, 2, 3, 4, 8)
MOST_RATIO = 2  # the largest by which the base's error is multiplied
ROW_TASKS = 8  # the most tasks whose residuals are measured in one sampled row

# Used if no sampled row has moved: the ratios of a normal distribution, and of evenly spaced levels across it.
NORMAL_RATIOS = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.0115, 8: 0.00005}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodingError:
    """The errors of coding one tensor, with codes without gain, as in `low_bit.weight_code`."""

    base: Mapping[int, float]
    """Maps bits to Σ (x - coded x)² over all elements of the base."""
    average: Mapping[int, float]
    """Like the above, for θ_0 + mean τ of all tasks, in float32; estimated unless every row is sampled."""
    ratio: Mapping[int, float]
    """Maps bits to the lost part of ‖θ_k - average‖², over sampled rows of all tasks."""

    def to_dict(self) -> dict[str, Any]:
        weights = {"base": _keyed(self.base), "average": _keyed(self.average)}
        return {"weights": weights, "residuals": _keyed(self.ratio)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "CodingError":
        """Invert `to_dict`. Raises KeyError if a number is missing, ValueError if one is negative or not finite."""
        weights = data["weights"]
        return CodingError(
            base=_numbers(weights["base"], WEIGHT_BITS),
            average=_numbers(weights["average"], WEIGHT_BITS),
            ratio=_numbers(data["residuals"], RESIDUAL_BITS),
        )


def sample_rows(tensor: str, shape: Matrix) -> np.ndarray:
    """Choose the rows of the tasks that are measured: int64, ascending, one drawn from each of equal stretches.

    There are at least 64, with at least 2^14 elements, if the tensor has as many. tensor: its name, which seeds the
    draw.
    """
    m, n = shape
    if 0 in shape:
        return np.zeros(0, np.int64)
    count = min(m, max(64, -(-(2**14) // n)))
    edges = _edges(count, m)
    draws = uniform(key64("flexmerge/rows/1", 0, tensor), 0, count)
    found: np.ndarray = edges[:-1] + np.floor(draws * np.diff(edges)).astype(np.int64)
    return found


def residual_tasks(sampled: slice, num_tasks: int) -> np.ndarray:
    """Return which tasks are measured in some of the sampled rows, each ascending: int64 [s, t]. More than ROW_TASKS
    take turns."""
    first = ROW_TASKS * np.arange(sampled.start, sampled.stop)
    return np.sort((first[:, None] + np.arange(min(ROW_TASKS, num_tasks))) % num_tasks, axis=1)


def _edges(count: int, m: int) -> np.ndarray:
    """Return where the stretches of m rows begin, and the last ends: int64 [count + 1]."""
    return np.arange(count + 1) * m // max(1, count)


@dataclass(frozen=True, slots=True, eq=False)
class RowErrors:
    """The contribution of some rows of a tensor."""

    base: np.ndarray
    """[bits, r] float64: of the base, for each of WEIGHT_BITS, row by row."""
    pairs: np.ndarray
    """[2 · bits, sampled rows]: of base and average, times the number of rows that the sampled one stands for."""
    lost: np.ndarray
    """[bits, sampled rows · their tasks]: of residuals, for each of RESIDUAL_BITS."""
    energy: np.ndarray
    """[1, sampled rows · their tasks]."""


class CodingErrorSum:
    """Adds up the rows of one tensor in order, in chunks of any size, until `finish`. The sums do not show the
    chunks."""

    def __init__(self, tensor: str, shape: Matrix) -> None:
        self.sampled = sample_rows(tensor, shape)
        """The rows of the tasks that are measured."""
        self._all = len(self.sampled) == shape[0]
        self._stands_for = np.diff(_edges(len(self.sampled), shape[0]))
        self._base = np.zeros(len(WEIGHT_BITS))
        self._pairs = np.zeros(2 * len(WEIGHT_BITS))
        self._lost = np.zeros(len(RESIDUAL_BITS))
        self._energy = np.zeros(1)

    def sampled_in(self, first_row: int, count: int) -> slice:
        """Return which of the sampled rows are among `count` rows from first_row on."""
        return slice(*np.searchsorted(self.sampled, [first_row, first_row + count]))

    def measure(self, first_row: int, base: Tensor, average: Tensor, residuals: Tensor) -> RowErrors:
        """Measure the rows from first_row on. base: all of them, float32 [r, n]; average: the sampled ones among them,
        [s, n]; residuals: θ_k - average of those of `residual_tasks`, row by row, [s · t, n].

        Changes nothing here: it may run in any thread.
        """
        from flexmerge_cli.residuals.row_errors import row_energies, row_errors

        sampled = self.sampled_in(first_row, len(base))
        of_base = row_errors(base, WEIGHT_BITS)
        pairs = [of_base[:, self.sampled[sampled] - first_row], row_errors(average, WEIGHT_BITS)]
        return RowErrors(
            base=of_base,
            pairs=np.concatenate(pairs) * self._stands_for[sampled],
            lost=row_errors(residuals, RESIDUAL_BITS),
            energy=row_energies(residuals)[None],
        )

    def add(self, found: RowErrors) -> None:
        """Add the rows that follow those that were added before."""
        self._base = _add(self._base, found.base)
        self._pairs = _add(self._pairs, found.pairs)
        self._lost = _add(self._lost, found.lost)
        self._energy = _add(self._energy, found.energy)

    def finish(self) -> CodingError:
        on_sample, average = np.split(self._pairs, 2)
        with np.errstate(invalid="ignore", divide="ignore"):  # inf / inf comes only from values that no plan holds
            lost = self._lost / (self._energy[0] or 1.0)
            is_near = (on_sample > 0) & (average <= MOST_RATIO * on_sample)
            estimated = np.where(is_near, self._base * (average / on_sample), self._base + (average - on_sample))
        ratio = dict(zip(RESIDUAL_BITS, map(float, lost))) if self._energy[0] > 0 else NORMAL_RATIOS
        return CodingError(
            base=dict(zip(WEIGHT_BITS, map(float, self._base))),
            average=dict(zip(WEIGHT_BITS, map(float, average if self._all else estimated))),
            ratio=ratio,
        )


def _add(totals: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Add to each total its row of terms, one by one, in order: numpy's own sum would group the terms by how many come
    at a time."""
    return np.cumsum(np.concatenate([totals[:, None], terms], axis=1), axis=1)[:, -1]


def _keyed(numbers: Mapping[int, float]) -> dict[str, float]:
    return {str(bits): value for bits, value in numbers.items()}


def _numbers(data: Mapping[str, Any], wanted: tuple[int, ...]) -> dict[int, float]:
    numbers = {bits: float(data[str(bits)]) for bits in wanted}
    if not all(math.isfinite(value) and value >= 0 for value in numbers.values()):
        raise ValueError(f"not finite and non-negative: {numbers}")
    return numbers
