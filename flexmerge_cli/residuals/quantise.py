"""Maps float32 rows to codes and scales, in float64. Knows nothing of packing and parts. Torch, on any device.

All numbers of a row follow from that row, in one fixed order of summation, so chunks of rows may have any size.
Codes are the same everywhere, except where an element lies within rounding of a threshold.
"""

import math

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.residuals.low_bit import GAUSS_LEVELS, GAUSS_LOSSES, GAUSS_THRESHOLDS, LowBit, half_range
from flexmerge_cli.residuals.scales import lengthening, rounded

# Fractions of the largest magnitude at which a row is clipped; on a tie the larger one, which comes first.
CLIP_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)

LLOYD_STEPS = 20

# Elements coded at a time on the CPU: the float64 intermediates then stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 16


def quantise(matrix: Tensor, coder: LowBit, levels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Encode float32 [m, n] into codes, uint8 [m, n], and scales as they are stored, float32 [m].

    levels: float32 [2^bits]; used up to 3 bits, and for gain=norm.
    """
    m, n = matrix.shape
    codes = torch.empty(m, n, dtype=torch.uint8, device=matrix.device)
    scale = torch.empty(m, dtype=torch.float32, device=matrix.device)
    step = max(1, BLOCK_ELEMENTS // max(1, n)) if matrix.device.type == "cpu" else m
    for first in range(0, m, max(1, step)):
        rows = slice(first, first + step)
        codes[rows], scale[rows] = _quantise_rows(matrix[rows].contiguous(), coder, levels)
    return codes, scale


def squared_errors(matrix: Tensor, coder: LowBit) -> Tensor:
    """Return Σ (x - decoded x)² of each row, float64 [m]: what coding loses, without packing it."""
    levels = torch.from_numpy(coder.table()).to(matrix.device)
    m, n = matrix.shape
    errors = torch.empty(m, dtype=torch.float64, device=matrix.device)
    step = max(1, BLOCK_ELEMENTS // max(1, n)) if matrix.device.type == "cpu" else m
    for first in range(0, m, max(1, step)):
        rows = matrix[first : first + step].contiguous()
        codes, scale = _quantise_rows(rows, coder, coder.table())
        lost = rows.double() - (levels[codes.int()] * scale[:, None]).double()
        errors[first : first + step] = row_sums(lost.square_())
    return errors


def row_sums(x: Tensor) -> Tensor:
    """Sum rows, float64 [m, n] -> [m], by halving the columns: only elementwise additions, so the bits are the same on
    every device.

    torch's own sum adds in an order that depends on the processor, and so would the last bit of a scale.
    """
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        rest = x[:, 2 * half :]
        x = x[:, :half] + x[:, half : 2 * half]
        if rest.shape[1]:
            x[:, :1] += rest
    return x[:, 0] if x.shape[1] else x.new_zeros(len(x))


def fit_levels(matrix: Tensor, bits: int) -> np.ndarray:
    """Fit levels to all elements of a tensor by Lloyd's algorithm, from those of a normal distribution.

    Returns float32 [2^bits], ascending. Rows of zeros do not count; a level that is nearest to no element stays put.
    """
    x = matrix.double()
    x = (x / _root_mean_square(x)[:, None])[(matrix != 0).any(1)].reshape(-1).cpu()  # On the CPU, sums have one order.
    levels = np.concatenate([-np.array(GAUSS_LEVELS[bits])[::-1], GAUSS_LEVELS[bits]])
    for _ in range(LLOYD_STEPS):
        codes = _codes(x, levels).int()
        count = torch.bincount(codes, minlength=len(levels))
        total = torch.bincount(codes, weights=x, minlength=len(levels))
        levels = np.where(count > 0, total / count.clamp(min=1), levels)
    return levels.astype(np.float32)


def _quantise_rows(rows: Tensor, coder: LowBit, levels: np.ndarray) -> tuple[Tensor, Tensor]:
    x = rows.double()
    if x.shape[1] == 0:
        return rows.byte(), torch.zeros(len(x), device=x.device)
    if coder.bits > 3:
        codes, scale = _spaced(x, coder)
    else:
        root = _root_mean_square(x)
        thresholds = levels if coder.has_levels else None
        codes = _codes(_divide(x, root), thresholds, coder.bits)
        scale = rounded(root, coder.scales)
    if coder.gain != "none":
        decoded = torch.from_numpy(levels).to(x.device)[codes.int()].double()
        lengths = row_sums(x.square())[:, None].sqrt(), row_sums(decoded.square()).sqrt()
        scale = _divide(*lengths)[:, 0]
        if coder.gain == "long":
            scale *= lengthening(row_sums(x * decoded), lengths[0][:, 0], lengths[1], GAUSS_LOSSES[coder.bits])
        scale = rounded(scale, coder.scales)
    return codes.byte(), scale


def _spaced(x: Tensor, coder: LowBit) -> tuple[Tensor, Tensor]:
    """Return codes and stored scales of evenly spaced levels."""
    h = half_range(coder.bits)
    largest = x.abs().amax(1)
    if coder.bits != 4 or coder.clip == "none":
        scale = rounded(largest / h, coder.scales)
        return _nearest(x, scale, h).add_(h), scale
    least, best_q, best_scale = torch.full_like(largest, math.inf), torch.zeros_like(x), torch.zeros_like(largest)
    for factor in CLIP_FACTORS:
        scale = rounded(factor * largest / h, coder.scales)
        q = _nearest(x, scale, h)
        error = row_sums((q * scale.double()[:, None]).sub_(x).square_())
        better = error < least
        best_q = torch.where(better[:, None], q, best_q)
        best_scale = torch.where(better, scale, best_scale)
        least = torch.minimum(error, least)
    return best_q.add_(h), best_scale.float()


def _nearest(x: Tensor, scale: Tensor, h: int) -> Tensor:
    """Round half to even, to -h … h; 0 in rows whose scale is 0."""
    return _divide(x, scale.double()).round_().clamp_(-h, h)


def _codes(x: Tensor, levels: np.ndarray | None, bits: int = 0) -> Tensor:
    """Count the thresholds that are at most x: those of the table, or midway between levels. Returns uint8.

    It compares with each: at 7 thresholds three times as fast as torch.bucketize, which searches and returns int64.
    """
    if levels is None:
        positive = GAUSS_THRESHOLDS[bits]
        thresholds = [*(-t for t in reversed(positive)), 0.0, *positive]
    else:
        wide = levels.astype(np.float64)
        thresholds = ((wide[1:] + wide[:-1]) / 2).tolist()
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in thresholds:
        codes += x >= threshold
    return codes


def _root_mean_square(x: Tensor) -> Tensor:
    """Return the root mean square of each row, [m]."""
    return (row_sums(x.square()) / max(1, x.shape[1])).sqrt()


def _divide(x: Tensor, by: Tensor) -> Tensor:
    """Divide x by `by`, row by row; keep x where `by` is 0: such rows are zero, or so small that they round to it."""
    return x / torch.where(by > 0, by, 1.0)[:, None]
