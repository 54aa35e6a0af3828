"""Methods that are linear in the task vectors: the mean, the scaled mean or sum, and weighted ones."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coefficients import TunedWeights
from flexmerge_cli.methods.method import MAX_SHOWN, Positive, Where, is_number, method, per_element
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


Weights = Mapping[str, Any] | None
"""Numbers by task, or by block and task; None: all are 1."""


def _by_task(weights: Weights) -> list[Mapping[str, Any]]:
    """Return the maps {task: weight}: one for all blocks, or one for each."""
    by_block = [of for of in (weights or {}).values() if isinstance(of, Mapping)]
    return by_block or [weights or {}]


def _check_weights(*, weights: Weights, **_: object) -> None:
    for of in _by_task(weights):
        for task, weight in of.items():
            if not is_number(weight) or weight < 0:
                shown = repr(weight)[:MAX_SHOWN]
                raise UsageError(
                    f"`weighted_average`: the weight of `{task}` is {shown}, not a number of 0 or more",
                    hint="weights={task: number, …}",
                )
    mixed = [name for name, of in (weights or {}).items() if not isinstance(of, Mapping)]
    if mixed and len(mixed) < len(weights or {}):
        raise UsageError(
            f"`weighted_average`: the weight of `{mixed[0]}` is a number, and others are maps",
            hint="weights={task: number, …} or weights={block: {task: number, …}, …}",
        )


def require_known(call: Call, *, base: str, tasks: Mapping[str, str], blocks: Collection[str]) -> None:
    """Raise UsageError if weights name a task or block that the plan lacks, or lack a block of the plan, and DataError
    if they were found with other models. base, tasks: the fingerprints of the plan's models."""
    weights = call.args.get("weights") if call.method is weighted_average else None
    if not weights:
        return
    of = _by_task(weights)
    unknown = [f"task `{name}`" for one in of for name in one if name not in tasks]
    if of[0] is not weights:  # They are by block.
        unknown = [f"block `{name}`" for name in weights if name not in blocks] or unknown
        if lacking := [name for name in blocks if name not in weights]:
            raise UsageError(
                f"`weighted_average`: no weights of block `{lacking[0]}`", hint="run `flexmerge tune` with this plan"
            )
    if unknown:
        raise UsageError(
            f"`weighted_average`: weights of {unknown[0]}, which the plan does not have",
            hint="flexmerge inspect plan.json lists tasks and blocks",
        )
    if isinstance(weights, TunedWeights):
        weights.require_same(base, tasks)


def require_weight(call: Call, block: str, tasks: Sequence[str]) -> None:
    """Raise UsageError if the weights of a group of a block are normalised, and their sum is 0 or overflows."""
    if call.method is weighted_average and call.args["normalize"] is True:
        _total(_weights_of(call.args["weights"], block, tasks), tasks)


def _weights_of(weights: Weights, block: str, tasks: Sequence[str]) -> list[float]:
    """Return the weight of each task in a block."""
    of_block = (weights or {}).get(block)
    found = of_block if isinstance(of_block, Mapping) else weights or {}
    return [float(found.get(task, 1.0)) for task in tasks]


def _total(weight_k: Sequence[float], tasks: Sequence[str]) -> float:
    total = sum(weight_k)
    if not 0 < total < math.inf:
        said = "all weights" if total == 0 else "the sum of the weights"
        raise UsageError(
            f"`weighted_average`: {said} of the group {', '.join(tasks)} {'are 0' if total == 0 else 'is infinite'}",
            hint="give at least one of these tasks a positive weight, or set normalize=false"
            if total == 0
            else "give smaller weights: only their ratios matter",
        )
    return total


def mean_weight(weights: Weights, task: str) -> float:
    """Return the weight of a task, averaged over blocks."""
    of = _by_task(weights)
    return sum(float(one.get(task, 1.0)) for one in of) / len(of)


@method(
    paper="Wortsman et al. 2022",
    scope="element",
    check=_check_weights,
    when="some tasks matter more than others",
    workspace=per_element(0, 32),
)
def weighted_average(
    deltas: Tensor,
    where: Where,
    *,
    weights: dict[str, Any] | None = None,
    normalize: bool | Literal["count"] = True,
) -> Tensor:
    """Take the weighted mean of the task vectors, with normalize=false their weighted sum. [k, n] float32 -> [n].

    weights: {task: weight} or {block: {task: weight}}, or @FILE with what `flexmerge tune` wrote; a task that is not
    named has weight 1. They are normalised in each group, so equal weights have no effect; normalize=count divides by
    the number of tasks instead. Raises UsageError for a group whose weights are all 0, or overflow, and normalised.
    """
    weight_k = _weights_of(weights, where.block, where.tasks)
    if not normalize:
        return weigh_tasks(deltas, weight_k)
    divisor = len(weight_k) if normalize == "count" else _total(weight_k, where.tasks)
    return weigh_tasks(deltas, weight_k) / divisor
