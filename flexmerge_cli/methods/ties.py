"""TIES: trims to the largest, elects a sign, merges what agrees. The worked example of a method with statistics."""

from typing import Literal

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Fraction, Positive, Statistic, StatisticScope, Where, method, per_element
from flexmerge_cli.methods.reductions import Agreeing, merge_agreeing
from flexmerge_cli.methods.selection import Kept, keep_largest
from flexmerge_cli.methods.step import step


def trim_statistics(*, K: float, scope: StatisticScope, **_: object) -> Statistic | None:
    """Keep c = min(n, int(K·n) + 1) of n elements: the authors keep |x| >= the (n - int(K·n))-th smallest, one more."""
    return None if K == 1 else keep_largest(scope=scope, counts=lambda n, _: (min(n, int(K * n) + 1),))


def trimmed(deltas: Tensor, where: Where, kept: Kept | None) -> Tensor:
    """Zero all but the largest of each task. [k, n] float32 -> [k, n]."""
    return deltas if kept is None else kept.largest(deltas, where)


@method(
    paper="Yadav et al. 2023",
    scope="element",
    statistics=trim_statistics,
    when="many tasks whose changes conflict in sign",
    workspace=per_element(16, 24),
)
def ties(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    *,
    K: Fraction = 0.1,
    scale: Positive = 1.0,
    scope: Literal["model", "block", "tensor"] = "model",
    merge: Agreeing = "mean",
) -> Tensor:
    """Trim each task to its largest elements, elect a sign, merge the deltas that agree with it. [k, n] float32 -> [n].

    K: fraction kept per task within `scope`, int(K·n) + 1 elements; 0.1 as in FlexMerge; TIES uses 0.2. Groups of one
    keep the untrimmed model. Trimmed zeros are not counted in the mean.
    Source: prateeky2806/ties-merging, which keeps all ties at the threshold and decides exact cancellations by one sum
    of signs over the whole model. Here exactly c elements are kept, chosen by a hash among ties, and cancellation
    elects +.
    """
    return scale * merge_agreeing(trimmed(deltas, where, stats), merge)


@step(paper="Yadav et al. 2023", scope="element", statistics=trim_statistics, workspace=per_element(18, 12))
def trim(
    deltas: Tensor,
    where: Where,
    stats: Kept | None,
    *,
    K: Fraction = 0.1,
    scope: Literal["model", "block", "tensor"] = "model",
) -> Tensor:
    """Zero all but the largest elements of each task, the first half of TIES, before any method. [M, n] -> [M, n].

    K: fraction kept within `scope`, int(K·n) + 1 elements, as in `ties`.
    """
    return trimmed(deltas, where, stats)
