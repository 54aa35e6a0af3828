"""FR-Merging: the weighted sum of the tasks' matrices without their lowest frequencies."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_matrix, is_other, of_matrices
from flexmerge_cli.methods.method import Range, StatisticScope, Where, method
from flexmerge_cli.methods.reductions import flat, mean_tasks, weigh_tasks
from flexmerge_cli.methods.step import step
from flexmerge_cli.methods.sums import Sums

Variant = Literal["paper", "code"]
Coef = Literal["eq3", "align", "uniform"]
Cutoff = Annotated[float, Range(least=0, below=1.5)]
Band = Literal["low", "high"] | str
BAND = re.compile(r"(\d+\.\d+|\.\d+|\d+):(\d+\.\d+|\.\d+|\d+)")
HALF = 0.5  # the cutoff of the bands low and high


# The filter leaves only rounding noise of a constant matrix, about 1e-16 of it, which counts as nothing.
NOISE = 1e-12


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """Σ|τ| of each task over a scope, [M] float64: proportional to the means of |τ|, with a common factor."""

    sums: np.ndarray

    def take(self, tasks: list[int]) -> "Magnitudes":
        return Magnitudes(self.sums[tasks])


def magnitude_sums(scope: StatisticScope) -> Sums:
    """Return the statistic that measures Magnitudes."""

    def terms(deltas: Tensor, _where: Where) -> Iterable[Tensor]:
        yield deltas.abs().double()

    return Sums(scope=scope, terms=terms, then=Magnitudes)


def edges(band: str, cutoff: float | None) -> tuple[float, float]:
    """Return the band [low, high) of frequencies that pass; 1 is the highest along the shorter side.

    Raises UsageError.
    """
    if band in ("low", "high"):
        edge = HALF if cutoff is None else cutoff
        return (0.0, edge) if band == "low" else (edge, math.inf)
    match = BAND.fullmatch(band)
    low, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if not low < high:
        raise UsageError(f"band={band} is not a band", hint="low, high or LOW:HIGH, such as 0.25:0.5")
    if cutoff is not None:
        raise UsageError(f"band={band} has both its ends, and cutoff={cutoff} is another", hint="leave out cutoff")
    return low, high


def check_band(*, band: str | None, cutoff: float | None, **_: object) -> None:
    """Raise UsageError unless the band is valid."""
    if band is not None:
        edges(band, cutoff)


def pass_mask(
    height: int, width: int, variant: Variant, cutoff: float | None = None, band: str | None = None
) -> Tensor:
    """Return the factor of each bin of an unshifted two-dimensional DFT: 0 or 1, with variant=code also 2. [H, W].

    With a band, only its frequencies pass, whatever the variant: those at distance r·min(H, W)/2 from frequency 0.

    paper: bins at cutoff·min(H, W)/2 and more from frequency 0 pass (cutoff 0.016). code: those within min(H, W)//10 of
    the Nyquist bin, plus those from there to cutoff·min(H, W) (cutoff 0.7). On squares both remove about the same
    corner; on 3072 × 768 the code's rule removes two thirds of the spectrum.
    """
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    if variant == "paper" or band is not None:
        rows = torch.where(2 * rows < height, rows, rows - height)
        columns = torch.where(2 * columns < width, columns, columns - width)
        distance = (rows.square()[:, None] + columns.square()).sqrt()
        low, high = (0.016 if cutoff is None else cutoff, math.inf) if band is None else edges(band, cutoff)
        unit = min(height, width) / 2
        return ((distance >= low * unit) & (distance < high * unit)).double()
    distance = ((rows - height // 2).square()[:, None] + (columns - width // 2).square()).sqrt()
    near, far = min(height, width) // 10, (0.7 if cutoff is None else cutoff) * min(height, width)
    return (distance <= near).double() + ((distance >= near) & (distance <= far)).double()


def filtered(matrices: Tensor, variant: Variant, cutoff: float | None = None, band: str | None = None) -> Tensor:
    """Multiply the spectrum of each matrix by the mask and take the real part, G. [k, m, n] -> the same, float64.

    It filters one matrix at a time: a spectrum takes sixteen bytes per element, several times.
    """
    out = torch.empty(matrices.shape, dtype=torch.float64, device=matrices.device)
    if matrices.numel() == 0:
        return out
    mask = pass_mask(matrices.shape[-2], matrices.shape[-1], variant, cutoff, band).to(matrices.device)
    for matrix, into in zip(matrices, out):
        into.copy_(torch.fft.ifft2(torch.fft.fft2(matrix.double()).mul_(mask)).real)
    return out


@step(
    name="fr",
    paper="Zheng & Wang 2025",
    scope="tensor",
    elementwise=is_other,
    check=check_band,
    workspace=of_matrices(1.5, 6),
)
def fr_step(
    deltas: Tensor,
    where: Where,
    *,
    variant: Variant = "code",
    cutoff: Cutoff | None = None,
    band: Band | None = None,
    matrices: Matrices = "linear",
) -> Tensor:
    """Remove frequencies from every task's matrices, before any method. [M, *shape] -> [M, *shape].

    The arguments are those of the method. Other tensors are unchanged. Measured on eight small vision models
    (docs/methods.md): variant=code lifts tsv_m from 71.9 to 76.2 % accuracy and lowers ties from 66.7 to 63.0;
    variant=paper does nothing.
    """
    if not is_matrix(where.tensor, where.shape, matrices):
        return deltas
    return filtered(deltas.flatten(2), variant, cutoff, band).view(deltas.shape)


def _coef(variant: Variant, coef: Coef | None) -> Coef:
    return coef or ("eq3" if variant == "paper" else "align")


def _statistics(
    *, variant: Variant, coef: Coef | None, scope: Literal["block", "tensor", "model"], **_: object
) -> Sums | None:
    return magnitude_sums(scope) if _coef(variant, coef) == "eq3" else None


def _elementwise(
    tensor: str, shape: tuple[int, ...], *, variant: Variant, coef: Coef | None, matrices: Matrices, **_: object
) -> bool:
    return is_other(tensor, shape, matrices=matrices) and _coef(variant, coef) != "align"


def _aligned(vectors: Tensor, unfiltered: Tensor) -> list[float]:
    """Return max E / E, with E the mean magnitude; 0 where the filter leaves nothing. [k, *]."""
    sizes, before = (flat(x.double().abs()).sum(1) for x in (vectors, unfiltered))
    sizes = torch.where(sizes > NOISE * before, sizes, 0.0)
    return torch.where(sizes > 0, sizes.max() / sizes, 0.0).tolist()


@method(
    paper="Zheng & Wang 2025",
    scope="tensor",
    elementwise=_elementwise,
    statistics=_statistics,
    check=check_band,
    when="the backbone of free; as a step before another method it is often better",
    workspace=of_matrices(1.5, 4.5, others=16),
)
def fr(
    deltas: Tensor,
    where: Where,
    stats: Magnitudes | None,
    *,
    variant: Variant = "code",
    cutoff: Cutoff | None = None,
    band: Band | None = None,
    coef: Coef | None = None,
    scope: Literal["block", "tensor", "model"] = "block",
    others: Literal["coef", "mean", "base"] | None = None,
    scale: Scale | None = None,
    matrices: Matrices = "linear",
) -> Tensor:
    """Compute scale · Σ λ_i G(τ_i), where G removes the lowest frequencies of a matrix. [k, *shape] -> [*shape].

    variant: code is the authors' release, paper their text, whose filter removes next to nothing. cutoff: 0.016 for
    paper, 0.7 for code; see pass_mask for its effect.
    band: the frequencies that pass instead, for experiments: low or high, below cutoff (0.5) or from there on, or
    LOW:HIGH; 1 is the highest along the shorter side.
    coef: eq3 (default of paper), λ_i the share of task i in the mean magnitudes over `scope`, which sums to 1; align
    (default of code), λ_i = max E/E_i of the filtered tensor, so that small tasks grow; uniform, 1/k.
    scale: 0.7 with align, else 1. others: for tensors that are not matrices, coef (default of paper) applies everything
    but the filter, mean (default of code) ignores scale, base keeps the base's values.
    Measured on eight small vision models (docs/methods.md): 41.5 %; with coef=eq3 68.9, with variant=paper 68.7.
    The filter depends on the order of rows and columns, unlike every other method here.
    Source: Zhengsh123/FREE-Merging. Its code does not use its equation 3, measures distance from the middle without
    moving frequency 0 there, and gives most other tensors the first task's delta.
    """
    coef = _coef(variant, coef)
    others = others or ("coef" if variant == "paper" else "mean")
    if scale is None:
        scale = 0.7 if coef == "align" else 1.0
    vectors = deltas
    if is_matrix(where.tensor, where.shape, matrices):
        vectors = filtered(deltas.flatten(2), variant, cutoff, band).view(deltas.shape)
    elif others != "coef":
        mean = mean_tasks(deltas)
        return mean if others == "mean" else torch.zeros_like(mean)
    if coef == "align":
        weight_k = _aligned(vectors, deltas)
    elif stats is not None and stats.sums.sum() > 0:
        weight_k = (stats.sums / stats.sums.sum()).tolist()
    else:
        weight_k = [1 / len(deltas)] * len(deltas)
    return scale * weigh_tasks(vectors, weight_k)
