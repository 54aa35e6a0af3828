"""Computes a plan's size and distances at every cut, for methods that store one dense value per merged block.

Numpy only: methods by name would import torch. For other methods use `merge --dry-run`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.options import dense_use
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.order.distance import weighted_errors
from flexmerge_cli.request.size import parse_size

# M tasks, C cuts

# Linear methods, and their scale of the mean.
LINEAR = {"average": 1.0, "task_arithmetic": 1.5}
FACTORS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 30, 40, 50, 64, 80, 100)

MAX_CUTS = 160  # as many as a chart shows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SizeCurve:
    """The size at every cut, and the distances at some."""

    tensor_bytes: tuple[int, ...]
    """Sizes after 0, 1, … all merges."""
    named: tuple[tuple[str, int], ...]
    """The factors `1x`, `1.25x`, … `Mx`, and the number of merges that reaches each."""
    cuts: tuple[int, ...]
    """Numbers of merges at which distances are known, ascending: evenly spread ones, and those of the factors."""
    distance: dict[str, np.ndarray]
    """Maps each method to [C, M] float64; NaN for a task whose task vector is zero and that is not exact."""


def curve_of(plan: Plan) -> SizeCurve:
    """Compute the curve. 8 700 merges of 30 tasks take about 3 s."""
    sizes = dense_sizes(plan)
    named = named_cuts(plan, sizes)
    spread = np.linspace(0, len(sizes) - 1, min(MAX_CUTS, len(sizes))).round().astype(int).tolist()
    cuts = sorted({*spread, *(merges for _, merges in named)})
    distance = distances_at(plan, cuts, list(LINEAR.values()))
    return SizeCurve(
        tensor_bytes=tuple(sizes), named=tuple(named), cuts=tuple(cuts), distance=dict(zip(LINEAR, distance))
    )


def dense_sizes(plan: Plan) -> list[int]:
    """Return the tensor bytes after 0, 1, … all merges."""
    return Cutter(Pricer(plan), dense_use("average")).sizes()


def distances_at(plan: Plan, cuts: Sequence[int], scales: Sequence[float]) -> list[np.ndarray]:
    """Compute ‖θ̂ - θ‖ / ‖τ‖ of scale · mean from the Gram matrices, before rounding.

    Returns [C, M], cuts by tasks, for each scale. cuts: numbers of merges, ascending.
    """
    errors_CM = [np.zeros((len(cuts), len(plan.tasks))) for _ in scales]
    merges = plan.merges()
    places: list[list[int]] = [[] for _ in plan.blocks]
    for place, merge in enumerate(merges):
        places[merge.block].append(place)
    for block, of_block in zip(plan.blocks, places):
        tensors = [plan.tensor(name) for name in block.tensors]
        grams = np.stack([plan.gram(tensor) for tensor in tensors])
        whole = grams.sum(axis=0)
        current_M = [np.zeros(len(plan.tasks)) for _ in scales]
        for place, following in zip(of_block, [*of_block[1:], len(merges)]):
            group = sorted(merges[place].left + merges[place].right)
            differ = [len({tensor.same[task] for task in group}) > 1 for tensor in tensors]  # the others are copied
            gram_kk = (whole if all(differ) else grams[differ].sum(axis=0))[np.ix_(group, group)]
            first, end = np.searchsorted(cuts, [place + 1, following + 1])  # until after the block's next merge
            for errors, current, scale in zip(errors_CM, current_M, scales):
                current[group] = weighted_errors(gram_kk, np.full(len(group), scale / len(group)))
                errors[first:end] += current
    energy_M = plan.task_energy()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = [np.sqrt(errors / energy_M) for errors in errors_CM]
    # Infinite only if a plan's numbers make no sense, or the task vector is zero.
    return [
        np.where(errors == 0, 0.0, np.where(np.isfinite(distance), distance, np.nan))
        for errors, distance in zip(errors_CM, found)
    ]


def named_cuts(plan: Plan, sizes: Sequence[int]) -> list[tuple[str, int]]:
    """Return `1x`, `1.25x`, … `Mx` and the number of merges that reaches each. Unreachable factors are omitted."""
    count = len(plan.reader_names)
    found = []
    for factor in [factor for factor in FACTORS if factor < count] + [count]:
        size = plan.target(parse_size(f"{factor}x"))
        merges = next((n for n, bytes_ in enumerate(sizes) if bytes_ <= size.max_bytes), None)
        if size.all_merges:
            merges = len(sizes) - 1
        if merges is not None:
            found.append((f"{factor}x", merges))
    return found
