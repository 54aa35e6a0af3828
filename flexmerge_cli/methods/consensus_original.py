"""Consensus: the sum of the tasks where at least kappa of them would keep it."""

from typing import Annotated, Literal

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Fraction, Positive, Range, Statistic, Where, method, per_element
from flexmerge_cli.methods.reductions import merge_agreeing, sum_tasks
from flexmerge_cli.methods.selection import Kept
from flexmerge_cli.methods.tall_masks import Lam, near
from flexmerge_cli.methods.ties import trim_statistics, trimmed


def _statistics(*, on: str, K: float, scope: Literal["model", "block", "tensor"], **_: object) -> Statistic | None:
    return trim_statistics(K=K, scope=scope) if on == "ties" else None


@method(
    paper="Wang et al. 2024",
    scope="element",
    statistics=_statistics,
    when="one model; what a single task changed is noise",
    workspace=per_element(34, 40),
)
def consensus_original(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    unstepped: Tensor,
    *,
    on: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    lam: Lam = 0.4,
    kappa: Annotated[int, Range(least=0)] = 2,
    scale: Positive = 0.3,
    K: Fraction = 0.2,
    scope: Literal["model", "block", "tensor"] = "model",
) -> Tensor:
    """Sum the task vectors (or what TIES leaves), scaled, where kappa masks of tall_masks agree. [k, n] -> [n].

    Masks compare the unscaled sum with the task vectors before any trimming or step; a group smaller than kappa needs
    the votes of all its tasks. K, scope: for the trimming, with on=ties. scale: tuned by the authors.
    k equal tasks, or near-duplicates, lose everything if lam (k - 1) >= 1.
    Source: nik-dim/tall_masks, where lam is tuned per task and masks are read from disk.
    """
    total = merge_agreeing(trimmed(deltas, where, stats), "sum") if on == "ties" else sum_tasks(deltas)
    votes = near(unstepped, total.to(torch.float32), lam).sum(0)
    return scale * torch.where(votes >= min(kappa, len(deltas)), total, 0.0)
