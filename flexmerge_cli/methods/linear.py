"""Methods that are linear in the task vectors: the mean, the scaled mean or sum, and weighted ones."""

import math
from typing import Literal

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import Positive, Where, method, per_element
from flexmerge_cli.methods.reductions import mean_tasks, sum_tasks, weigh_tasks


@method(
    paper="Wortsman et al. 2022",
    scope="element",
    when="the plain baseline; near-identical fine-tunes",
    workspace=per_element(0, 8),
)
def average(deltas: Tensor) -> Tensor:
    """Average the task vectors, which averages the models. [k, n] float32 -> [n]."""
    return mean_tasks(deltas)


@method(
    paper="Ilharco et al. 2023",
    scope="element",
    when="the paper's default for block merging",
    workspace=per_element(0, 16),
)
def task_arithmetic(deltas: Tensor, *, form: Literal["mean", "sum"] = "mean", scale: Positive | None = None) -> Tensor:
    """Take the scaled mean (or sum) of the task vectors. [k, n] float32 -> [n].

    scale: 1.5 for form=mean, as in FlexMerge, 0.3 for form=sum, the usual value for eight tasks. FlexMerge takes the
    mean because k differs between blocks: sum with scale x at k tasks is mean with scale x·k.
    """
    if form == "sum":
        return (0.3 if scale is None else scale) * sum_tasks(deltas)
    return (1.5 if scale is None else scale) * mean_tasks(deltas)


def _check_weights(*, weights: dict[str, float] | None, **_: object) -> None:
    for task, weight in (weights or {}).items():
        if type(weight) not in (int, float) or not math.isfinite(weight) or weight < 0:
            raise UsageError(
                f"`weighted_average`: the weight of `{task}` is {weight!r}, not a number of 0 or more",
                hint="weights={task: number, …}",
            )


@method(
    paper="Wortsman et al. 2022",
    scope="element",
    check=_check_weights,
    when="some tasks matter more than others",
    workspace=per_element(0, 32),
)
def weighted_average(
    deltas: Tensor, where: Where, *, weights: dict[str, float] | None = None, normalize: bool = True
) -> Tensor:
    """Take the weighted mean of the task vectors, with normalize=false their weighted sum. [k, n] float32 -> [n].

    weights: {task: number >= 0}; a task that is not named has weight 1. They are normalised in each group, so equal
    weights have no effect. Raises UsageError for a group whose weights are all 0.
    """
    weight_k = [float((weights or {}).get(task, 1.0)) for task in where.tasks]
    if not normalize:
        return weigh_tasks(deltas, weight_k)
    if sum(weight_k) == 0:
        raise UsageError(
            f"`weighted_average`: all weights of the group {', '.join(where.tasks)} are 0",
            hint="give at least one of these tasks a positive weight, or set normalize=false",
        )
    return weigh_tasks(deltas, weight_k) / sum(weight_k)


def scaled_sum(call: Call, num_tasks: int) -> tuple[float, float] | None:
    """Return (divisor, scale) of a method that is scale · (Σ τ / divisor), in float64; None for all others.

    native.c needs only these; its loop gives the same bits as the functions above.
    """
    if call.method is average:
        return float(num_tasks), 1.0
    if call.method is task_arithmetic:
        scale = call.args.get("scale")
        if call.args.get("form", "mean") == "sum":
            return 1.0, 0.3 if scale is None else float(scale)
        return float(num_tasks), 1.5 if scale is None else float(scale)
    return None
