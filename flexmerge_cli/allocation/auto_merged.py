"""Predicts the damage of merging by `average`, so that `auto` never takes what is predicted to be worse than a merge.

Of all values that a group could share, its mean has the least squared error. So no other merge of the same groups is
predicted to be better.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.auto import Search, Solution
from flexmerge_cli.allocation.auto_centres import AutoCentre
from flexmerge_cli.allocation.auto_table import AutoTable, TensorChoice
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.errors import GateError
from flexmerge_cli.request.size import Target


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
        _choice(table, [group.tasks for group in units[table.tensor.name].groups], layout) for table in search.tables
    )
    if any(table.tensor.is_unchanged and 0 in choice.bits for table, choice in zip(search.tables, choices)):
        return None
    solution = Solution(
        choices=choices,
        num_bytes=sum(choice.num_bytes for choice in choices),
        cost=sum(choice.cost for choice in choices),
    )
    return solution, layout


def _choice(table: AutoTable, groups: Sequence[Tasks], layout: BundleLayout) -> TensorChoice:
    """Return the choice that stores a dense average of each group, and exact copies of tasks that are alone."""
    tensor = table.tensor
    means = [group for group in groups if tensor.num_classes(group) > 1]
    shared = set(itertools.chain(*means))
    errors = np.zeros(len(tensor.same))
    for group in means:
        gram = tensor.gram[np.ix_(group, group)]
        errors[list(group)] = np.maximum(np.diag(gram) - 2 * gram.mean(axis=1) + gram.mean(), 0.0)
    return TensorChoice(
        tensor=tensor.name,
        centre=AutoCentre(kind="average", groups=tuple(groups)) if shared else AutoCentre(kind="none"),
        bits=tuple(0 if task in shared else "exact" for task in range(len(errors))),
        num_bytes=layout.storages[tensor.name].num_bytes,
        cost=tensor.price(1.0) * float(np.dot(table.weight_M, errors)),
        errors=tuple(errors.tolist()),
    )
