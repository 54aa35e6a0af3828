"""Measures how well a tensor codes in few bits: what `auto` needs to know of a tensor besides its Gram matrix.

Takes rows of the base, of the average of all tasks, and of all tasks. Gives `weights`, the squared error of coding
base and average whole, and `residuals`, the part of a residual's energy that coding loses, from a sample of rows.
Errors of whole tensors are exact sums because a sample is not enough: with one, 4 bits were off by a factor of 4 on a
tensor with outliers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.random import key64, uniform
from flexmerge_cli.residuals.coder import Matrix

WEIGHT_BITS = (2, 3, 4, 8)
RESIDUAL_BITS = (1, 2, 3, 4, 8)

# Used if no sampled row has moved: the ratios of a normal distribution, and of evenly spaced levels across it.
NORMAL_RATIOS = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.0115, 8: 0.00005}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodingError:
    """The errors of coding one tensor, with codes without gain, as in `low_bit.weight_code`."""

    base: Mapping[int, float]
    """Maps bits to Σ (x - coded x)² over all elements of the base."""
    average: Mapping[int, float]
    """Like the above, for θ_0 + mean τ of all tasks, in float32."""
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
    """Choose the rows whose residuals are measured: int64, ascending, one drawn from each of equal stretches.

    There are at least 64, with at least 2^14 elements, if the tensor has as many. tensor: its name, which seeds the
    draw.
    """
    m, n = shape
    if 0 in shape:
        return np.zeros(0, np.int64)
    count = min(m, max(64, -(-(2**14) // n)))
    edges = np.arange(count + 1) * m // count
    draws = uniform(key64("flexmerge/rows/1", 0, tensor), 0, count)
    found: np.ndarray = edges[:-1] + np.floor(draws * np.diff(edges)).astype(np.int64)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class RowErrors:
    """The contribution of some rows of a tensor."""

    weights: np.ndarray
    """[2, bits, r] float64: of base and average, for each of WEIGHT_BITS, row by row."""
    lost: np.ndarray
    """[bits, sampled rows · tasks]: of residuals, for each of RESIDUAL_BITS."""
    energy: np.ndarray
    """[sampled rows · tasks]."""


class CodingErrorSum:
    """Adds up the rows of one tensor in order, in chunks of any size, until `finish`. The sums do not show the
    chunks."""

    def __init__(self, tensor: str, shape: Matrix) -> None:
        self.sampled = sample_rows(tensor, shape)
        """The rows of the tasks that `residuals` needs."""
        self._weights = np.zeros((2, len(WEIGHT_BITS)))
        self._lost = np.zeros(len(RESIDUAL_BITS))
        self._energy = 0.0

    def measure(self, first_row: int, base: Tensor, average: Tensor, tasks: Sequence[Tensor]) -> RowErrors:
        """Measure the rows from first_row on, float32 [r, n]; tasks: the models' own rows, of any float dtype, all M of
        them.

        Changes nothing here: it may run in any thread.
        """
        from flexmerge_cli.residuals.row_errors import row_errors

        weights = np.stack([row_errors(base, WEIGHT_BITS), row_errors(average, WEIGHT_BITS)])
        begin, end = np.searchsorted(self.sampled, [first_row, first_row + len(average)])
        if begin == end:
            return RowErrors(weights, np.zeros((len(RESIDUAL_BITS), 0)), np.zeros(0))
        rows = torch.from_numpy(self.sampled[begin:end] - first_row)
        centre = average[rows.to(average.device)]
        own = [task[rows.to(task.device)].to(centre.device, torch.float32) for task in tasks]
        residuals = torch.stack([values - centre for values in own], dim=1)  # row by row, then task by task
        residuals = residuals.reshape(-1, average.shape[1])
        energy = residuals.double().square_().sum(1).cpu().numpy()
        return RowErrors(weights, row_errors(residuals, RESIDUAL_BITS), energy)

    def add(self, found: RowErrors) -> None:
        """Add the rows that follow those that were added before."""
        for place in np.ndindex(*self._weights.shape):
            self._weights[place] = _add(float(self._weights[place]), found.weights[place])
        for index, terms in enumerate(found.lost):
            self._lost[index] = _add(float(self._lost[index]), terms)
        self._energy = _add(self._energy, found.energy)

    def finish(self) -> CodingError:
        base, average = (dict(zip(WEIGHT_BITS, map(float, row))) for row in self._weights)
        with np.errstate(invalid="ignore"):  # inf / inf comes only from values that no plan holds
            lost = self._lost / (self._energy or 1.0)
        ratio = dict(zip(RESIDUAL_BITS, map(float, lost))) if self._energy > 0 else NORMAL_RATIOS
        return CodingError(base=base, average=average, ratio=ratio)


def _add(total: float, terms: np.ndarray) -> float:
    """Add one by one, in order: numpy's own sum would group the terms by how many come at a time."""
    return float(np.cumsum(np.concatenate([[total], terms]))[-1])


def _keyed(numbers: Mapping[int, float]) -> dict[str, float]:
    return {str(bits): value for bits, value in numbers.items()}


def _numbers(data: Mapping[str, Any], wanted: tuple[int, ...]) -> dict[int, float]:
    numbers = {bits: float(data[str(bits)]) for bits in wanted}
    if not all(math.isfinite(value) and value >= 0 for value in numbers.values()):
        raise ValueError(f"not finite and non-negative: {numbers}")
    return numbers
