"""FlexMerge's Consensus: TALL masks of each task on a mean."""

from typing import Any, Literal

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Centre, Fraction, Positive, Statistic, Where, method, per_element
from flexmerge_cli.methods.reductions import mean_tasks, merge_agreeing
from flexmerge_cli.methods.selection import Kept
from flexmerge_cli.methods.tall_masks import Lam, near
from flexmerge_cli.methods.ties import trim_statistics, trimmed


def _statistics(*, on: str, K: float, scope: Literal["model", "block", "tensor"], **_: object) -> Statistic | None:
    return trim_statistics(K=K, scope=scope) if on == "ties" else None


@method(
    paper="Wang et al. 2024, as FlexMerge uses it",
    scope="element",
    statistics=_statistics,
    form="masked",
    when="like emr, without its factor; robust if a group holds near-duplicates",
    workspace=per_element(34, 56),
)
def consensus(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    *,
    on: Literal["ties", "task_arithmetic"] = "ties",
    lam: Lam = 0.6,
    K: Fraction = 1.0,
    scale: Positive | None = None,
    scope: Literal["model", "block", "tensor"] = "model",
) -> Any:
    """Take TIES or the scaled mean, and per task a mask of the elements that lam admits. [k, n] float32 -> Centre.

    The mask is |τ| > lam·|u - τ|, with the untrimmed τ. lam: 0.6, FlexMerge's value for all tasks. K: 1.0 (untrimmed)
    as in the code released with the paper, whose text says 0.1. scale: 1.0 on ties, 1.5 on task_arithmetic. Despite the
    name there is no vote; Consensus of the TALL masks paper is `consensus_original`.
    """
    if on == "ties":
        unified = (1.0 if scale is None else scale) * merge_agreeing(trimmed(deltas, where, stats), "mean")
    else:
        unified = (1.5 if scale is None else scale) * mean_tasks(deltas)
    return Centre(unified, lambda deltas, unified: near(deltas, unified, lam))
