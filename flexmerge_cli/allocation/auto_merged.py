"""Predicts whether merging by `average` does more damage than coding, so that `auto` never takes what is predicted to
be worse.

Of all values that a group could share, its mean has the least squared error. So no other merge of the same groups is
predicted to be better.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.auto import Search, Solution
from flexmerge_cli.allocation.auto_centres import AutoCentre
from flexmerge_cli.allocation.auto_statistics import TensorStatistics
from flexmerge_cli.allocation.auto_table import TensorChoice
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.errors import GateError
from flexmerge_cli.request.size import Target

# A task vector that is lost does more damage than noise of the same energy: this many times more. Anything from 48 on
# orders merged and coded bundles of three families as their scores do. See docs/benchmarks.md.
LOST = 64.0


def damage(search: Search, solution: Solution) -> float:
    """Return Σ w·P over tensors and tasks, which compares merged with coded bundles of one family.

    P of a residual whose code loses the part l of its energy is l/(1 - l) times that energy, at most LOST times; P of a
    coded copy is its squared error.
    """
    return sum(
        float(np.dot(table.weight_M, _damages(table.tensor, choice)))
        for table, choice in zip(search.tables, solution.choices)
    )


def _damages(tensor: TensorStatistics, choice: TensorChoice) -> np.ndarray:
    damages = np.array(choice.errors)
    alone = {task for group in choice.centre.groups if tensor.num_classes(group) == 1 for task in group}
    for task, bits in enumerate(choice.bits):
        if choice.centre.kind != "none" and task not in alone and bits != "exact":
            loss = tensor.residual_losses[bits] if bits else 1.0
            times = min(loss / (1 - loss), LOST) if loss < 1 else LOST
            damages[task] *= times / (tensor.decoded_loss(bits) if bits else 1.0)
    return damages


def merged(cutter: Cutter, search: Search, size: Target) -> tuple[Solution, BundleLayout] | None:
    """Return what `--method average`, for which `cutter` cuts, stores in a size, and its predicted damage.

    None if it does not fit, or rounds a tensor that no fine-tune changed, as it may where tasks have several dtypes.
    """
    try:
        layout = cutter.pricer.layout(cutter.cut(replace(size, all_merges=False)))
    except GateError:
        return None
    units = {name: unit for unit in layout.allocation.units for name in unit.tensors}
    choices = tuple(
        _choice(table.tensor, [group.tasks for group in units[table.tensor.name].groups], layout)
        for table in search.tables
    )
    if any(table.tensor.is_unchanged and 0 in choice.bits for table, choice in zip(search.tables, choices)):
        return None
    solution = Solution(
        choices=choices,
        num_bytes=sum(choice.num_bytes for choice in choices),
        cost=sum(table.cost_of(choice) for table, choice in zip(search.tables, choices)),
    )
    return solution, layout


def _choice(tensor: TensorStatistics, groups: Sequence[Tasks], layout: BundleLayout) -> TensorChoice:
    """Return the choice that stores a dense average of each group, and exact copies of tasks that are alone."""
    errors = np.zeros(len(tensor.same))
    for group in groups:
        gram = tensor.gram[np.ix_(group, group)]
        errors[list(group)] = np.maximum(np.diag(gram) - 2 * gram.mean(axis=1) + gram.mean(), 0.0)
    shared = {task for group in groups if tensor.num_classes(group) > 1 for task in group}
    return TensorChoice(
        tensor=tensor.name,
        centre=AutoCentre(kind="average", groups=tuple(groups)) if shared else AutoCentre(kind="none"),
        bits=tuple(0 if task in shared else "exact" for task in range(len(errors))),
        num_bytes=layout.storages[tensor.name].num_bytes,
        errors=tuple(float(error) if task in shared else 0.0 for task, error in enumerate(errors)),
    )
