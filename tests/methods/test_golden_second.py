"""Spectral and frequency methods, the filter step and the calibration against golden/methods-2.

The file's methods with residuals are tested elsewhere: those that the registry calls with task vectors are here.
"""

import functools

import numpy as np
import pytest
import torch

from flexmerge_cli.methods.matrices import is_matrix
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.reductions import mean_tasks, sum_tasks
from flexmerge_cli.methods.registry import all_calibrations, all_methods, make_calibration

from .driver import family_of, merge
from .golden import SECOND, TASKS, golden_family, is_merging, second_case, values

MERGING = {
    name: case for name, case in SECOND["cases"].items() if case["method"] == "sum" or is_merging(case["method"])
}
EDGES = [name for name in MERGING if name.startswith("edge.")]
FAMILY = [name for name in MERGING if name not in EDGES]


def assert_near(actual, expected, relative_to_max):
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative_to_max * expected.abs().max()


@pytest.mark.parametrize("group", ["all", "three"])
@pytest.mark.parametrize("name", FAMILY)
def test_family_is_golden(name, group):
    case, family = MERGING[name], golden_family()
    tasks, prefix = case["groups"][group]["tasks"], f"{name}/{group}/"
    expected = {key.removeprefix(prefix): value for key, value in values(2).items() if key.startswith(prefix)}
    assert len(expected) == 5
    if case["method"] == "sum":
        merged = {name: sum_of_matrices(name, case["arguments"], tasks) for name in expected}
    else:
        call, steps, calibrate = second_case(case)
        blocks = [family.block_of(tensor) for tensor in expected]
        results = merge(family, call, blocks=blocks, group=tasks, steps=steps, calibrate=calibrate)
        merged = {tensor: results[tensor].unified for tensor in expected}
    for tensor, value in expected.items():
        assert_near(merged[tensor], value, **case["tolerance"])


def sum_of_matrices(tensor, arguments, tasks):
    """The file's `sum`: Σ τ of matrices, the mean of others, and svc after it."""
    family = golden_family()
    deltas = family.deltas[tensor][[family.tasks.index(task) for task in tasks]]
    where = Where(tasks=tuple(tasks), tensor=tensor, start=0, shape=tuple(deltas.shape[1:]))
    merged = (sum_tasks if is_matrix(tensor, where.shape, "linear") else mean_tasks)(deltas) * arguments["scale"]
    svc = make_calibration(all_calibrations()["svc"], arguments["calibrate"])
    return svc(merged, deltas, where).to(torch.float32)


@functools.cache
def edge_deltas(group, tensor):
    """A made-up group of one tensor, as the file tells: [k, *shape]."""
    deltas = golden_family().deltas[tensor].numpy()
    cars, gtsrb, svhn = (deltas[TASKS.index(task)] for task in ("cars", "gtsrb", "svhn"))
    if group == "dup":
        return [cars, gtsrb, svhn, svhn]
    if group == "zero":
        return [cars, gtsrb, svhn, np.zeros_like(cars)]
    if group == "many":
        return [np.roll(deltas[number % 8], number // 8, axis=-1) for number in range(20)]
    assert group == "lowrank"
    return [truncated(delta, 2) for delta in (cars, gtsrb, svhn)]


def truncated(delta, rank):
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).astype(np.float32)


@pytest.mark.parametrize("group", ["dup", "zero", "many", "lowrank"])
@pytest.mark.parametrize("name", EDGES)
def test_duplicates_zeros_many_tasks_and_low_rank_are_golden(name, group):
    case, prefix = MERGING[name], f"{name}/{group}/"
    expected = {key.removeprefix(prefix): value for key, value in values(2).items() if key.startswith(prefix)}
    assert expected
    for tensor, value in expected.items():
        deltas = edge_deltas(group, tensor)
        call, steps, calibrate = second_case(case)
        family = family_of({tensor: np.stack(deltas)}, tasks=[f"task{number:02}" for number in range(len(deltas))])
        merged = merge(family, call, steps=steps, calibrate=calibrate)[tensor].unified
        assert_near(merged, value, **case["tolerance"])


def test_every_case_with_a_merging_method_is_compared():
    left_out = {case["method"] for name, case in SECOND["cases"].items() if name not in MERGING}
    assert not left_out & {name for name in all_methods() if is_merging(name)}
