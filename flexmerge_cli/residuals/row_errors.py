"""Measures the loss of coding rows at several bit widths in one pass: a fast form of quantise.squared_errors. Torch.

Only for `auto`'s statistics, which code every weight eight times: magnitudes only, since levels are symmetric; float32
in blocks that stay in the cache; no codes. Its test compares with the plain way: sums over tensors agree within 1e-6.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.residuals.low_bit import GAUSS_LEVELS, GAUSS_THRESHOLDS, half_range, weight_code
from flexmerge_cli.residuals.quantise import CLIP_FACTORS, squared_errors

# m rows, n columns, k rows of a block, w columns of a piece, P pieces, T trials

# Elements at a time on the CPU: with fewer, calls cost more than the arithmetic; more do not stay in the cache.
# Repeat: python -m tests.residuals.benchmark_row_errors
BLOCK_ELEMENTS = 1 << 18
GPU_BLOCK_ELEMENTS = 1 << 24

# Rows of fewer elements are coded the plain way: in them the error itself may be a matter of rounding.
FEWEST_COLUMNS = 8
# The same goes for rows whose largest magnitude lies outside these: their squares might leave float32.
SMALLEST, LARGEST = 2.0**-40, 2.0**40


@dataclass(frozen=True, slots=True, eq=False)
class _Trials:
    """Codes every row with several scales, one after another. Magnitudes are in units of the stored scale."""

    bits: tuple[int, ...]
    """The bit width of each trial, ascending; 4 bits have several trials."""
    clips: tuple[bool, ...]
    """Whether magnitudes may lie above the last level, per trial."""
    unit_Tm: Tensor
    """float64: the scale as it is stored."""
    exact_m: Tensor
    """float64: the exact scale of up to 3 bits, at which thresholds are taken, in units of the stored one."""


def row_errors(matrix: Tensor, bits: Sequence[int]) -> np.ndarray:
    """Sum (x - decoded x)² of each row under `weight_code`, by bits: float32 [m, n] -> float64 [bits, m].

    bits: ascending.
    """
    m, n = matrix.shape
    if 0 in (m, n):
        return np.zeros((len(bits), m))
    if n < FEWEST_COLUMNS:
        return _plain(matrix, bits)
    native_here = native.lib is not None and matrix.device.type == "cpu"
    errors, largest = (_in_c if native_here else _in_torch)(matrix, tuple(bits))
    usual = (largest > SMALLEST) & (largest < LARGEST)
    if not usual.all():
        errors[:, largest == 0] = 0
        odd = np.flatnonzero(~usual & (largest != 0))
        errors[:, odd] = _plain(matrix[torch.from_numpy(odd).to(matrix.device)], bits)
    return errors


def row_energies(matrix: Tensor) -> np.ndarray:
    """Sum x² of each row in float64: float32 [m, n] -> float64 [m]."""
    energies: np.ndarray = matrix.double().square_().sum(1).cpu().numpy()
    return energies


def _plain(matrix: Tensor, bits: Sequence[int]) -> np.ndarray:
    return np.stack([squared_errors(matrix, weight_code(number)).cpu().numpy() for number in bits])


def _in_torch(matrix: Tensor, bits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors, [bits, m], and the largest magnitude of each row. The rows are of some size."""
    blocks = _Blocks(matrix)
    largest_m, root_m = blocks.measure()
    trials = _trials(bits, largest_m.double(), root_m)
    squares_Tm = (blocks.squares(trials) * trials.unit_Tm.square()).cpu().numpy()
    firsts = [trials.bits.index(number) for number in bits]
    return np.minimum.reduceat(squares_Tm, firsts), largest_m.cpu().numpy()


def _in_c(matrix: Tensor, bits: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Do the same in native.c: a row is loaded once and stays in the cache for all trials."""
    assert native.lib is not None
    m, n = matrix.shape
    matrix = matrix.contiguous()
    errors, largest = np.empty((len(bits), m)), np.empty(m, np.float32)
    ways = _ways(bits)
    native.lib.flexmerge_row_errors(
        matrix.data_ptr(), m, n, len(ways[0]), *(array.ctypes.data for array in (*ways, largest, errors))
    )
    return errors, largest


@cache
def _ways(bits: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Describe the trials to native.c: places of their bits, factors, last levels (0 for those of a table), tables."""
    trials = [(place, number, factor) for place, number in enumerate(bits) for factor in _factors(number)]
    return (
        np.array([place for place, _, _ in trials]),
        np.array([factor for _, _, factor in trials]),
        np.array([0.0 if number <= 3 else half_range(number) for _, number, _ in trials], np.float32),
        np.array([_table(number) for _, number, _ in trials], np.float32),
    )


def _factors(number: int) -> tuple[float, ...]:
    """Return the parts of the largest magnitude that are tried as the last level."""
    return CLIP_FACTORS if number == 4 else (1.0,)


def _trials(bits: Sequence[int], largest_m: Tensor, root_m: Tensor) -> _Trials:
    """Choose the scales of all trials at once: trials are many, and rows few. largest_m, root_m: float64."""
    gauss = [number for number in bits if number <= 3]
    spaced = [(number, factor) for number in bits if number > 3 for factor in _factors(number)]
    scales = [root_m] * len(gauss) + [factor * largest_m / half_range(number) for number, factor in spaced]
    unit_Tm = torch.stack(scales).float().to(torch.bfloat16).double()
    return _Trials(
        bits=(*gauss, *(number for number, _ in spaced)),
        # bfloat16 is within 2^-9 of the scale: too close for the largest magnitude to be rounded to another level.
        clips=(*(False for _ in gauss), *(factor < 1 for _, factor in spaced)),
        unit_Tm=unit_Tm,
        exact_m=root_m / unit_Tm[0],
    )


def _table(bits: int) -> list[float]:
    """Return four levels and three thresholds; missing thresholds are infinite."""
    levels, thresholds = GAUSS_LEVELS.get(bits, (0.0,)), GAUSS_THRESHOLDS.get(bits, ())
    return [*levels, *[levels[-1]] * (4 - len(levels)), *thresholds, *[math.inf] * (3 - len(thresholds))]


class _Blocks:
    """A matrix in blocks of whole rows; wider rows are visited in pieces. Its buffers are reused."""

    def __init__(self, matrix: Tensor) -> None:

        m, n = matrix.shape
        block = BLOCK_ELEMENTS if matrix.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        self.matrix = matrix
        self.step, self.width = max(1, min(m, block // n)), min(n, block)
        self.lows = range(0, n, self.width)
        self.buffers = _buffers(self.step, self.width, matrix.device)

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return the largest magnitude, float32 [m], and the root mean square, float64 [m], of every row."""
        m, n = self.matrix.shape
        largest_Pm = torch.empty(len(self.lows), m, device=self.matrix.device)
        energy_Pm = torch.empty_like(largest_Pm)
        for first in range(0, m, self.step):
            for piece, low in enumerate(self.lows):
                a, square, *_ = self._piece(first, low)
                torch.amax(a, 1, out=largest_Pm[piece, first : first + self.step])
                torch.sum(torch.mul(a, a, out=square), 1, out=energy_Pm[piece, first : first + self.step])
        return largest_Pm.amax(0), (energy_Pm.double().sum(0) / n).sqrt()

    def squares(self, trials: _Trials) -> Tensor:
        """Compute Σ (x/unit - decoded x/unit)² of every trial and row, float64 [T, m]."""
        inverse_Tm1 = (1 / trials.unit_Tm).float()[:, :, None]
        exact_m1 = trials.exact_m.float()[:, None]
        found = []
        for first in range(0, len(self.matrix), self.step):
            rows = slice(first, first + self.step)
            inverse, exact = inverse_Tm1[:, rows].unbind(), exact_m1[rows]
            total = None
            for low in self.lows:
                a, value, level, spare = self._piece(first, low)
                sums = []
                for trial, (bits, inverse_k1) in enumerate(zip(trials.bits, inverse)):
                    if trial == 0 or bits > 3:  # up to 3 bits have one scale
                        torch.mul(a, inverse_k1, out=value)
                    # The square of a difference (0 means no reduction), in one pass instead of two.
                    if bits <= 3:
                        lowest = _above_lowest(bits, value, exact, level, spare)
                        torch.ops.aten.mse_loss.out(level, lowest, 0, out=level)
                    else:
                        torch.round(value, out=level)
                        if trials.clips[trial]:
                            level.clamp_(max=half_range(bits))
                        torch.ops.aten.mse_loss.out(value, level, 0, out=level)
                    # float32 within a piece: torch adds up a row in the same order, however many rows there are.
                    sums.append(level.sum(1))
                of_piece = torch.stack(sums).double()
                total = of_piece if total is None else total + of_piece
            assert total is not None
            found.append(total)
        return torch.cat(found, dim=1)

    def _piece(self, first: int, low: int) -> tuple[Tensor, ...]:
        """Return magnitudes [k, w], and buffers of the same shape."""
        rows = self.matrix[first : first + self.step, low : low + self.width]
        a, *buffers = self.buffers
        if rows.shape != a.shape:
            k, w = rows.shape
            a, *buffers = (buffer[:k, :w] for buffer in self.buffers)
        return torch.abs(rows, out=a), *buffers


def _above_lowest(bits: int, value: Tensor, exact_m1: Tensor, level: Tensor, above: Tensor) -> Tensor:
    """Fill `level` with magnitudes minus the height of their level above the lowest; return the lowest, expanded."""
    levels, thresholds = GAUSS_LEVELS[bits], GAUSS_THRESHOLDS[bits]
    rest = value
    for number, threshold in enumerate(thresholds):
        step = levels[number + 1] - levels[number]
        # A comparison whose input and output have one dtype gives 0 and 1.
        torch.ge(value, threshold * exact_m1, out=above)
        rest = torch.add(rest, above, alpha=-step, out=level)
    if not thresholds:
        level.copy_(value)
    return level.new_tensor(levels[0]).expand_as(level)


_kept = threading.local()


def _buffers(rows: int, columns: int, device: "torch.device") -> list[Tensor]:
    """Return four buffers [rows, columns]. On the CPU a thread reuses its memory: fresh pages cost more than coding."""
    if device.type != "cpu":
        return [torch.empty(rows, columns, device=device) for _ in range(4)]
    flat: list[Tensor] = getattr(_kept, "flat", [])
    if not flat or len(flat[0]) < rows * columns:
        flat = _kept.flat = [torch.empty(max(rows * columns, BLOCK_ELEMENTS)) for _ in range(4)]
    return [buffer[: rows * columns].view(rows, columns) for buffer in flat]
