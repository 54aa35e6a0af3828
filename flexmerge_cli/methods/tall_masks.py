"""TALL masks: the sum of the tasks, and per task a mask of where the sum is nearer to the task than lam allows."""

from typing import Annotated, Any

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Centre, Positive, Range, method, per_element
from flexmerge_cli.methods.reductions import sum_tasks

Lam = Annotated[float, Range(above=0)]


def near(deltas: Tensor, unified: Tensor, lam: float) -> Tensor:
    """Return |τ| > lam·|u - τ|, strict, in float64. [k, n], [n] -> bool [k, n]."""
    deltas, unified = deltas.double(), unified.double()
    return deltas.abs() > lam * (unified - deltas).abs()


@method(
    paper="Wang et al. 2024",
    scope="element",
    form="masked",
    when="tasks that differ; use consensus for near-duplicates",
    workspace=per_element(33, 32),
)
def tall_masks(deltas: Tensor, *, lam: Lam = 0.4, scale: Positive = 1.0) -> Any:
    """Sum the task vectors, scaled and masked per task where |τ| > lam·|u - τ|. [k, n] float32 -> Centre.

    The mask compares task vectors before any step. lam: the authors choose it per task on validation data, from 0.2 to
    0.6; a larger lam takes fewer elements. The masks of k equal tasks are empty if lam (k - 1) >= 1.
    Source: nik-dim/tall_masks. The paper has >= for >; they differ where both sides are equal.
    """
    return Centre(scale * sum_tasks(deltas), lambda deltas, unified: near(deltas, unified, lam))
