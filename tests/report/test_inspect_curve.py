"""Sizes and distances of a plan without torch, against the plain versions that need it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.order.distance import weighted_errors
from flexmerge_cli.order.order import groups_after
from flexmerge_cli.report.inspect_curve import LINEAR, curve_of, dense_sizes, distances_at
from flexmerge_cli.report.plan import size_rows
from tests.report.plans import synthetic_plan


@settings(max_examples=25, deadline=None)
@given(num_tasks=st.sampled_from([1, 2, 3, 7]), num_blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_sizes_are_those_of_the_layout(num_tasks: int, num_blocks: int, seed: int) -> None:
    plan = synthetic_plan(num_tasks, num_blocks, mixed=True, seed=seed)
    cutter = Cutter(Pricer(plan), parse_use("average"))
    layouts = [cutter.pricer.layout(cutter.prefix(merges)) for merges in range(len(plan.order) + 1)]
    assert dense_sizes(plan) == cutter.sizes() == [layout.tensor_bytes for layout in layouts]


@settings(max_examples=25, deadline=None)
@given(num_tasks=st.sampled_from([1, 2, 3, 7]), num_blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_distances_are_those_of_every_prefix(num_tasks: int, num_blocks: int, seed: int) -> None:
    plan = synthetic_plan(num_tasks, num_blocks, mixed=True, seed=seed)
    cuts = list(range(len(plan.order) + 1))
    found = distances_at(plan, cuts, list(LINEAR.values()))
    for distance_CM, scale in zip(found, LINEAR.values()):
        for cut in cuts:
            groups = groups_after(len(plan.blocks), num_tasks, plan.merges()[:cut])
            wanted = slow_distances(plan, groups, scale)
            # Other orders of summation; a square root makes 1e-8 of a rounding error of 1e-16 near zero.
            np.testing.assert_allclose(distance_CM[cut], wanted, rtol=1e-9, atol=1e-7)


def slow_distances(plan: Plan, groups: list[list[tuple[int, ...]]], scale: float) -> list[float]:
    """Tensor by tensor and group by group."""
    errors = np.zeros(len(plan.tasks))
    for block, of_block in zip(plan.blocks, groups):
        for name in block.tensors:
            tensor = plan.tensor(name)
            same = np.array(tensor.same)
            for group in of_block:
                if len(set(same[list(group)])) > 1:  # equal tasks are copied
                    gram = plan.gram(tensor)[np.ix_(group, group)]
                    errors[list(group)] += weighted_errors(gram, np.full(len(group), scale / len(group)))
    pairs = zip(errors, plan.task_energy())
    return [0.0 if error == 0 else float("nan") if energy == 0 else (error / energy) ** 0.5 for error, energy in pairs]


def test_rows_are_those_of_plan() -> None:
    plan = synthetic_plan(8, 6, seed=3)
    curve, rows = curve_of(plan), size_rows(plan)
    assert [(row["size"], row["merges"]) for row in rows] == list(curve.named)
    assert [row["tensor_bytes"] for row in rows] == [curve.tensor_bytes[merges] for _, merges in curve.named]


def test_a_zero_task_vector_that_is_not_exact_has_no_distance() -> None:
    plan = _with_zero_task(synthetic_plan(2, 1))
    (found,) = distances_at(plan, [0, 1], [1.0])
    assert found[0].tolist() == [0.0, 0.0]
    assert np.isnan(found[1, 0]) and found[1, 1] == pytest.approx(0.5)


def _with_zero_task(plan: Plan) -> Plan:
    """Its first task does not differ from the base."""
    tensors = []
    for tensor in plan.tensors:
        assert tensor.gram is not None
        tensors.append(tensor.model_copy(update={"gram": ((0.0, 0.0), (0.0, tensor.gram[1][1]))}))
    return plan.model_copy(update={"tensors": tuple(tensors)})
