"""DELLA: drop small elements more often than large ones, rescale the rest, elect a sign, merge what agrees."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.dare import Seed, draws
from flexmerge_cli.methods.method import Positive, Range, Scope, Where, method, per_element
from flexmerge_cli.methods.places import magnitude_keys
from flexmerge_cli.methods.reductions import flat
from flexmerge_cli.methods.selection import places_of
from flexmerge_cli.methods.step import step
from flexmerge_cli.methods.ties import merge_agreeing

MeanRate = Annotated[float, Range(above=0, below=1)]
Window = Annotated[float, Range(least=0, below=1)]


def _scope(*, scope: Literal["row", "tensor"], **_: object) -> Scope:
    return scope


def _check_window(*, p: float, window: float, **_: object) -> None:
    if window >= 2 * min(p, 1 - p):
        raise UsageError(
            f"window={window:g} does not fit p={p:g}: drop rates must stay inside (0, 1)",
            hint=f"a window under {2 * min(p, 1 - p):g}",
        )


def pruned(
    deltas: Tensor, where: Where, *, p: float, window: float, seed: int, scope: str, rescale: bool = True
) -> Tensor:
    """Drop each element with a probability that falls with its rank in the row (or tensor). Same shape, float64.

    The element of place j of n (0 is the largest) has q = p - window/2 + window·j/(n - 1), or p where n = 1.
    """
    keys = magnitude_keys(deltas)
    places = places_of(keys if scope == "row" else flat(keys), where).view(deltas.shape)
    size = deltas.shape[-1] if scope == "row" else deltas[0].numel()
    q = p - window / 2 + window * places.double() / (size - 1) if size > 1 else torch.full_like(deltas, p).double()
    return torch.where(draws(deltas, where, seed) < q, 0.0, deltas.double() / (1 - q) if rescale else deltas.double())


@step(paper="Deep et al. 2024", scope=_scope, check=_check_window, workspace=per_element(95, 90))
def magprune(
    deltas: Tensor,
    where: Where,
    *,
    p: MeanRate = 0.3,
    window: Window = 0.14,
    seed: Seed = 0,
    scope: Literal["row", "tensor"] = "row",
    rescale: bool = True,
) -> Tensor:
    """Drop small elements more often than large ones; divide the others by 1 - their drop rate. [M, r, n] -> [M, r, n].

    p: mean drop rate. window: from the rate of the largest element to that of the smallest, under 2·min(p, 1 - p).
    scope: where elements are ranked. rescale=false keeps the values that stay. With scope=tensor: [M, *shape].
    Source: declare-lab/della, which divides 0 by 0 on rows of one and ranks equal magnitudes arbitrarily; here ties go
    by a hash. Random numbers as in dare.
    """
    return pruned(deltas, where, p=p, window=window, seed=seed, scope=scope, rescale=rescale)


@method(
    paper="Deep et al. 2024",
    scope=_scope,
    check=_check_window,
    when="as ties, where random drops thin out the conflicts",
    workspace=per_element(95, 90),
)
def della(
    deltas: Tensor,
    where: Where,
    *,
    p: MeanRate = 0.3,
    window: Window = 0.14,
    scale: Positive = 1.0,
    seed: Seed = 0,
    scope: Literal["row", "tensor"] = "row",
    merge: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The step magprune, then elect a sign and merge what agrees, as ties. [k, r, n] float32 -> [r, n].

    Dropped elements are not counted in the mean. scale: the authors' example has 1.1. With scope=tensor: [k, *shape].
    """
    kept = pruned(deltas, where, p=p, window=window, seed=seed, scope=scope).to(torch.float32)
    return scale * merge_agreeing(kept, merge)
