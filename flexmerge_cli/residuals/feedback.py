"""Codes residuals of up to two bits so that a layer's outputs change least, as GPTQ and LDLQ do. Torch, on any device.

The loss of a row x that decodes to y is (y - x)·H·(y - x)ᵀ, where H are the second moments of the layer's inputs. Runs
of columns are coded one after another, and the columns that follow make up for what a run has lost, as far as inputs
are correlated. With H⁻¹ = UᵀU, U upper triangular, the loss is the sum over the runs of ‖e·V‖², where e is the error
of the run and V the inverse of its block of U; the columns after the run, whose block of U is W, change by -e·V·W.
Codes and scales decode like those that the coder itself makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.residuals.low_bit import LowBit
from flexmerge_cli.residuals.scales import Scales, lengthening, rounded
from flexmerge_cli.residuals.sign_runs import SignRuns

# This part of the mean second moment is added to each: directions without inputs are then determined, too.
DAMPING = 0.01

# What the root mean square of a row is multiplied by while it is coded; feedback makes rows longer. The codes of the
# greatest cosine are taken, and then the scale is set.
FACTORS = (0.8, 1.0, 1.25, 1.5)

# Columns whose errors are passed on together, by one product; a multiple of the longest run.
BLOCK_COLUMNS = 32

# Elements of rows that are coded together, times the number of factors. More take memory, fewer time.
BLOCK_ELEMENTS = 1 << 20


class FeedbackCoder(Protocol):
    """A coder whose rows are one scale and words for runs of columns."""

    @property
    def scales(self) -> Scales: ...

    @property
    def usual_loss(self) -> float:
        """The part of the energy of a row of a normal distribution that is lost, at the best scale."""

    def words(self) -> np.ndarray:
        """Return the values of each code in units of the scale: float32 [codes, columns of a run]."""

    def parts_of(self, codes: Tensor, scale: Tensor) -> dict[str, np.ndarray]:
        """Return the parts of codes, uint8 [m, runs], and scales from `rounded`, float32 [m]."""


class UnsoundMoments(Exception):
    """Second moments that are not finite, or that no inputs have."""


def is_possible(coder: object) -> TypeGuard[FeedbackCoder]:
    """Return whether a coder is one of those whose rows decode longer: runs of signs, or one or two bits."""
    return isinstance(coder, SignRuns) or (isinstance(coder, LowBit) and coder.gain == "long")


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of columns, and what its words are compared by."""

    low: int
    high: int
    inverse: Tensor
    """V, [columns, columns]."""
    offered: Tensor
    """The words times V, [words, columns]."""
    squares: Tensor
    """Their squared lengths, [words]."""


def encode(matrix: Tensor, coder: FeedbackCoder, moments: np.ndarray) -> dict[str, np.ndarray]:
    """Encode float32 [m, n] into every part of the coder.

    moments: the mean, or a sum, of x·xᵀ over the layer's inputs x, [n, n]. Raises UnsoundMoments.
    """
    m, n = matrix.shape
    metric = torch.from_numpy(moments).to(matrix.device, torch.float64, copy=True)
    metric.diagonal().add_(DAMPING * metric.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(metric)
    if int(info) or not bool(torch.isfinite(lower).all()):
        raise UnsoundMoments("the second moments of its inputs are not finite, or not those of any inputs")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    words = torch.from_numpy(coder.words()).to(metric)
    runs = _runs(upper, words)
    codes = torch.empty(m, len(runs), dtype=torch.uint8, device=matrix.device)
    scale = torch.empty(m, dtype=torch.float32, device=matrix.device)
    step = max(1, BLOCK_ELEMENTS // (len(FACTORS) * n))
    for first in range(0, m, step):
        rows = slice(first, first + step)
        x = matrix[rows].double()
        root = x.square().mean(1).sqrt()
        tried = _codes(x.repeat(len(FACTORS), 1), torch.cat([factor * root for factor in FACTORS]), upper, runs)
        codes[rows], scale[rows] = _best(x, tried.view(len(FACTORS), len(x), -1), coder, metric, words)
    return coder.parts_of(codes, scale)


def workspace(shape: tuple[int, int]) -> int:
    """Return the bytes that `encode` takes beside the matrix."""
    m, n = shape
    return 5 * 8 * n * n + 7 * 8 * min(len(FACTORS) * m * n, max(BLOCK_ELEMENTS, len(FACTORS) * n)) + 2 * m * n


def _runs(upper: Tensor, words: Tensor) -> list[_Run]:
    """List the runs of columns. words: [words, columns of a run]; the last run may be shorter."""
    n, run, found = len(upper), words.shape[1], []
    for low in range(0, n, run):
        high = min(n, low + run)
        inverse = torch.linalg.inv(upper[low:high, low:high])
        offered = words[:, : high - low] @ inverse
        found.append(_Run(low, high, inverse, offered, offered.square().sum(1)))
    return found


def _codes(x: Tensor, scale: Tensor, upper: Tensor, runs: Sequence[_Run]) -> Tensor:
    """Choose the word of each run, uint8 [k, runs]. x: float64 [k, n], which is overwritten; scale: float64 [k]."""
    n = x.shape[1]
    codes = torch.empty(len(x), len(runs), dtype=torch.uint8, device=x.device)
    lost = torch.empty_like(x)
    start = 0
    for place, run in enumerate(runs):
        stop = min(n, start + BLOCK_COLUMNS)
        wanted = x[:, run.low : run.high] @ run.inverse
        code = (scale[:, None] * run.squares - 2 * wanted @ run.offered.T).argmin(1)
        codes[:, place] = code
        lost[:, run.low : run.high] = error = wanted - scale[:, None] * run.offered[code]
        x[:, run.high : stop] -= error @ upper[run.low : run.high, run.high : stop]
        if run.high == stop:
            x[:, stop:] -= lost[:, start:stop] @ upper[start:stop, stop:]
            start = stop
    return codes


def _best(x: Tensor, codes_fk: Tensor, coder: FeedbackCoder, metric: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's codes of greatest cosine, uint8 [k, runs], and its scale as it is stored, float32 [k].

    x: float64 [k, n]; codes_fk: uint8 [factors, k, runs].
    """
    k, n = x.shape
    decoded = words[codes_fk.long()].flatten(2)[:, :, :n]
    through = decoded @ metric
    product_fk, energy_fk = (through * x).sum(2), (through * decoded).sum(2)
    best = (product_fk / energy_fk.sqrt()).argmax(0, keepdim=True)
    product, decoded_length = product_fk.gather(0, best)[0], energy_fk.gather(0, best)[0].sqrt()
    length = ((x @ metric) * x).sum(1).sqrt()
    longer = lengthening(product, length, decoded_length, coder.usual_loss)
    return codes_fk[best[0], torch.arange(k, device=x.device)], rounded(longer * length / decoded_length, coder.scales)
