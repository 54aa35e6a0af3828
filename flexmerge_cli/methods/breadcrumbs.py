"""Breadcrumbs: drops the largest changes as outliers and the small ones as noise."""

from typing import Annotated, Literal

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Fraction, Positive, Range, Scope, Statistic, Where, method, per_element
from flexmerge_cli.methods.places import magnitude_keys
from flexmerge_cli.methods.reductions import mean_tasks, only, sum_tasks
from flexmerge_cli.methods.selection import Kept, keep_largest, places_of
from flexmerge_cli.methods.step import step

Removed = Annotated[float, Range(least=0, below=1)]
Within = Literal["row", "tensor", "block", "model"]


def _scope(*, scope: str, **_: object) -> Scope:
    return "row" if scope == "row" else "element"


def _cuts(num_elements: int, *, beta: float, gamma: float) -> tuple[int, int]:
    """Return the places of the last element that is dropped at the top, and of the last one that is kept."""
    removed = max(0, min(int(gamma * num_elements), num_elements - 1))
    return removed, removed + min(num_elements - removed, max(1, int(beta * num_elements)))


def _statistics(*, beta: float, gamma: float, scope: Within, **_: object) -> Statistic | None:
    if scope == "row":
        return None
    return keep_largest(scope=scope, counts=lambda n, _: _cuts(n, beta=beta, gamma=gamma))


def masked(deltas: Tensor, where: Where, kept: Kept | None, *, beta: float, gamma: float) -> Tensor:
    """Zero the largest and the small elements, of each row [k, r, n] if there is no statistic. Returns the same
    shape."""
    if kept is None:
        removed, end = _cuts(deltas.shape[-1], beta=beta, gamma=gamma)
        places = places_of(magnitude_keys(deltas), where)
        return only((places >= removed) & (places < end), deltas)
    return kept.largest(kept.largest(deltas, where, 1), where, 0, drop=True)


@method(
    paper="Davari & Belilovsky 2023",
    scope=_scope,
    statistics=_statistics,
    when="sums of many tasks, where a few huge changes would dominate",
    workspace=per_element(18, 32),
)
def breadcrumbs(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    *,
    beta: Fraction = 0.15,
    gamma: Removed = 0.006,
    scale: Positive | None = None,
    scope: Within = "tensor",
    merge: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Sum (or average) the task vectors without their largest and their small elements, scaled. [k, n] float32 -> [n].

    gamma: the fraction dropped at the top within `scope`, which leaves at least one element; beta: the fraction kept
    below that, at least one. scale: 0.3 for sum, within the authors' search from 0.1 to 1; 1.0 for mean.
    scope: `tensor` is the paper's layer; scope=row takes [k, r, n] and returns [r, n].
    Source: rezazzr/breadcrumbs, which works along the last axis: rows shorter than 1/gamma lose no outlier, and those
    shorter than 1/beta lose everything. scope=row equals it for one and two axes. mergekit zeroes whole small tensors.
    """
    kept = masked(deltas, where, stats, beta=beta, gamma=gamma)
    if merge == "sum":
        return (0.3 if scale is None else scale) * sum_tasks(kept)
    return (1.0 if scale is None else scale) * mean_tasks(kept)


@step(
    name="breadcrumbs",
    paper="Davari & Belilovsky 2023",
    scope=_scope,
    statistics=_statistics,
    workspace=per_element(18, 32),
)
def breadcrumbs_step(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    *,
    beta: Fraction = 0.15,
    gamma: Removed = 0.006,
    scope: Within = "tensor",
) -> Tensor:
    """Zero the largest and the small elements of each task, before any method. [M, n] float32 -> [M, n].

    The arguments are those of the method.
    """
    return masked(deltas, where, stats, beta=beta, gamma=gamma)
