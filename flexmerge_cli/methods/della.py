"""DELLA: drops small elements more often than large ones, rescales the rest, elects a sign, merges what agrees."""

import math
from typing import Annotated, Any, Literal

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.dare import Seed, draws, l1_workspace, with_l1_norm
from flexmerge_cli.methods.method import Positive, Range, Scope, Where, method, per_element
from flexmerge_cli.methods.places import magnitude_keys
from flexmerge_cli.methods.reductions import merge_agreeing
from flexmerge_cli.methods.selection import places_of
from flexmerge_cli.methods.step import step

MeanRate = Annotated[float, Range(above=0, below=1)]
Window = Annotated[float, Range(least=0, below=1)]


Rescale = bool | Literal["l1"]


def _scope(*, scope: Literal["row", "tensor"], rescale: Rescale, **_: object) -> Scope:
    return "tensor" if rescale == "l1" else scope


def _workspace(num_tasks: int, shape: tuple[int, ...], **args: Any) -> int:
    extra = l1_workspace(num_tasks, shape) if args["rescale"] == "l1" else 0
    return extra + per_element(95, 90)(num_tasks, shape)


def _check_window(*, p: float, window: float, **_: object) -> None:
    if window >= 2 * min(p, 1 - p):
        raise UsageError(
            f"window={window:g} does not fit p={p:g}: drop rates must stay inside (0, 1)",
            hint=f"use a window below {2 * min(p, 1 - p):g}",
        )


def pruned(deltas: Tensor, where: Where, *, p: float, window: float, seed: int, scope: str, rescale: Rescale) -> Tensor:
    """Drop each element with a probability that grows with its rank in the row (or tensor). Same shape, float64.

    The element at place j of n (0 is the largest) has q = p - window/2 + window·j/(n - 1), or p if n = 1.
    """
    ranked = where.shape[1:] if scope == "row" and len(where.shape) > 1 else where.shape
    size = max(1, math.prod(ranked))
    keys = magnitude_keys(deltas).view(len(deltas), -1, size)
    places = places_of(keys, where).view(deltas.shape)
    q = p - window / 2 + window * places.double() / (size - 1) if size > 1 else torch.full_like(deltas, p).double()
    dropped = draws(deltas, where, seed) < q
    if rescale == "l1":
        return with_l1_norm(torch.where(dropped, 0.0, deltas), deltas)
    return torch.where(dropped, 0.0, deltas.double() / (1 - q) if rescale else deltas.double())


@step(paper="Deep et al. 2024", scope=_scope, check=_check_window, workspace=_workspace)
def magprune(
    deltas: Tensor,
    where: Where,
    *,
    p: MeanRate = 0.3,
    window: Window = 0.14,
    seed: Seed = 0,
    scope: Literal["row", "tensor"] = "row",
    rescale: Rescale = True,
) -> Tensor:
    """Drop small elements more often than large ones; divide the others by 1 - their drop rate. [M, r, n] -> [M, r, n].

    p: the mean drop rate. window: the difference of the rates of the smallest and the largest element, below
    2·min(p, 1 - p).
    scope: where elements are ranked. rescale: false keeps the remaining values as they are, l1 scales each tensor to
    the l1 norm it had, as mergekit does. With scope=tensor or rescale=l1: [M, *shape].
    Source: declare-lab/della, which divides 0 by 0 on rows of one element and ranks equal magnitudes arbitrarily; here
    a hash breaks ties. The random numbers are those of dare.
    """
    return pruned(deltas, where, p=p, window=window, seed=seed, scope=scope, rescale=rescale)


@method(
    paper="Deep et al. 2024",
    scope=_scope,
    check=_check_window,
    when="like ties, where random drops thin out the conflicts",
    workspace=_workspace,
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
    rescale: Rescale = True,
) -> Tensor:
    """Apply the step magprune, then elect a sign and merge what agrees, like ties. [k, r, n] float32 -> [r, n].

    Dropped elements are not counted in the mean. scale: the authors' example uses 1.1. rescale: as in magprune. With
    scope=tensor or rescale=l1: [k, *shape].
    """
    kept = pruned(deltas, where, p=p, window=window, seed=seed, scope=scope, rescale=rescale)
    return scale * merge_agreeing(kept.to(torch.float32), merge)
