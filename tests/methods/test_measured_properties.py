"""What each method does to permuted, scaled, flipped, duplicated, copied and zero tasks, as measured by the reference.

Bypasses are off. First table: block layers.1.mlp, all eight tasks, cases of methods-1. Second: the six matrices of
layer 0, tasks cars, gtsrb and svhn, cases of methods-2. Deviations are relative to the largest absolute value.
"""

import functools
from dataclasses import dataclass

import pytest
import torch

from .driver import Family, family_of, merge
from .golden import FIRST, SECOND, TASKS, first_case, golden_family, is_merging, second_case

# Float32 results of permuted or scaled input may differ by a rounding.
SAME = 2e-6


@dataclass(frozen=True)
class First:
    duplicated: str
    """Deviation when gtsrb is there twice, one digit."""
    copies: tuple[str, int]
    """What of itself a task gets back from eight copies of it, where it gets anything; and on how many percent."""
    single: str
    """The merge of 0.01, 0.02, 0.04, and of masked methods what each task gets."""
    times_three: str = ""
    """Deviation of F(3 Y) from 3 F(Y), where it is not 0."""


FIRST_TABLE = {
    "average": First("0.2", ("1", 100), "0.02333"),
    "weighted_average": First("0.2", ("1", 100), "0.02333"),
    "weighted_average_raw": First("0.3", ("8.25", 100), "0.07"),
    "task_arithmetic_mean": First("0.2", ("1.5", 100), "0.035"),
    "task_arithmetic_sum": First("0.3", ("2.4", 100), "0.021"),
    "model_stock_tensor": First("0.3", ("1", 100), "0.02333"),
    "model_stock_block": First("0.3", ("1", 100), "0.02333"),
    "model_stock_row": First("0.2", ("1", 100), "0.02333"),
    "magmax": First("0", ("1", 100), "0.04"),
    "ties_model": First("0.8", ("1", 17), "0.02333"),
    "ties_model_k30": First("0.8", ("1", 41), "0.02333"),
    "ties_model_sum": First("0.5", ("2.4", 30), "0.021"),
    "ties_model_max": First("0.7", ("1", 30), "0.04"),
    "ties_block": First("0.8", ("1", 20), "0.02333"),
    "ties_tensor": First("0.8", ("1", 20), "0.02333"),
    "ties_k100": First("0.7", ("1", 100), "0.02333"),
    "pcb_block": First("0.6", ("0.999", 10), "0.02333", times_three="9e-05"),
    "pcb_model": First("0.9", ("1", 16), "0.02333", times_three="0.0001"),
    "breadcrumbs_tensor": First("0.4", ("2.4", 15), "0.021"),
    "breadcrumbs_row": First("0.4", ("2.4", 13), "0.021"),
    "sce": First("0.8", ("1", 100), "0.03476"),
    "sce_full": First("0.9", ("1", 100), "0.03476"),
    "della": First("1", ("1.47", 100), "0.02357"),
    "dare_average": First("0.5", ("1.75", 56), "0"),
    "dare_ties": First("2", ("2", 52), "0.03"),
    "magprune_average": First("0.3", ("0.999", 100), "0.01429"),
    "emr_weighted": First("0.7", ("1", 100), "0.04 / 0.01, 0.02, 0.04"),
    "emr_tensor_mean": First("0.7", ("1", 100), "0.04 / 0.01, 0.02, 0.04"),
    "tall_masks": First("1", ("8", 100), "0.07 / 0, 0, 0.07"),
    "consensus_ties": First("0.8", ("1", 17), "0.02333 / 0.02333, 0.02333, 0.02333"),
    "consensus_ties_released": First("0.7", ("1", 100), "0.02333 / 0.02333, 0.02333, 0.02333"),
    "consensus_task_arithmetic": First("0.9", ("1.5", 100), "0.035 / 0, 0.035, 0.035"),
    "consensus_original": First("1", ("0", 0), "0"),
    "consensus_original_ties": First("0.9", ("0", 0), "0"),
}


@dataclass(frozen=True)
class Second:
    duplicated: str
    """Deviation when svhn is there twice, two digits; of the matrix where it is largest, as all below."""
    copies: str
    """What of itself cars gets back from three copies, and the deviation from that multiple; `exact` under 1e-6."""
    zero: str
    """Deviation when a zero task is added; `none` under 1e-6."""
    permuted: str = ""
    scaled: tuple[str, str] = ("", "")
    """Deviations of f(c τ) from c f(τ), c = 3 and 0.01."""


SECOND_TABLE = {
    "tsv_m": Second("0.64", "0.75 (0.68)", "0.65"),
    "tsv_m.all": Second("0.64", "0.75 (0.68)", "0.65"),
    "tsv_m.fr": Second("1.1", "0.74 (0.63)", "1.1"),
    "iso_c": Second("1.1", "2.1 (0.66)", "none"),
    "iso_c.s1.5": Second("1.1", "3.2 (0.66)", "none"),
    "iso_cts.f0.8": Second("1.3", "2 (0.49)", "1.2"),
    "iso_cts.f0.5": Second("1", "1.5 (0.6)", "0.86"),
    "wudi": Second("0.47", "2.5 (0.16)", "none", scaled=("0.10", "0.58")),
    "wudi.s20": Second("0.42", "3 (0.01)", "none", scaled=("0.01", "0.56")),
    "swudi": Second("0.32", "1.1 (0.55)", "none"),
    "swudi.t300r0.85": Second("0.24", "1 (0.36)", "none"),
    "swudi.mean": Second("0.27", "1 (exact)", "0.064"),
    "aswudi": Second("0.45", "1 (0.5)", "none"),
    "aswudi.mean": Second("0.48", "1 (exact)", "0.031"),
    "aswudi.participation": Second("0.32", "1.3 (0.53)", "none"),
    "aswudi.gavish_donoho": Second("0.63", "1.3 (0.45)", "none"),
    "svc.average": Second("0.57", "1 (exact)", "0.26"),
    "svc.tsv_m": Second("0.63", "0.75 (0.68)", "0.64"),
    "opcm": Second("0.3", "1 (exact)", "0.25", permuted="0.3"),
    "fr": Second("0.24", "1 (0.035)", "none"),
    "fr.c0.25": Second("0.23", "0.98 (0.12)", "none"),
    "fr.c0.25.tensor": Second("0.24", "0.98 (0.12)", "none"),
    "fr.c0.25.model": Second("0.23", "0.98 (0.12)", "none"),
    "fr.c0.25.uniform": Second("0.27", "0.98 (0.12)", "0.25"),
    "fr.code": Second("0.61", "1.7 (1.4)", "none"),
}


def deviation(actual, expected):
    return max((a - e).abs().max().item() / max(e.abs().max().item(), 1e-300) for a, e in zip(actual, expected))


def test_every_case_is_in_a_table():
    assert set(FIRST_TABLE) == set(FIRST["cases"])
    merging = {name for name, case in SECOND["cases"].items() if is_merging(case["method"])}
    assert set(SECOND_TABLE) == {name for name in merging if not name.startswith("edge.")}


# First table


@functools.cache
def first_results(name, change, c=1.0):
    """Unified delta of the block, and what the eight tasks get, in float64."""
    family, rows, tasks = golden_family(), list(range(8)), TASKS
    if change == "permuted":
        rows = [3, 7, 0, 1, 6, 5, 2, 4]
        tasks = tuple(TASKS[row] for row in rows)
    elif change == "duplicated":
        rows, tasks = [*rows, 3], (*TASKS, "zz")
    elif change == "copies":
        rows = [3] * 8
    deltas = {tensor: value[rows] * c for tensor, value in family.deltas.items()}
    call, steps = first_case(name)
    changed = Family(tasks=tasks, deltas=deltas, blocks=family.blocks)
    merged = merge(changed, call, blocks=["vision_model.encoder.layers.1.mlp"], steps=steps, bypass=False)
    unified = torch.cat([value.unified.flatten() for value in merged.values()])
    of_tasks = torch.stack([torch.cat([value.tasks[task].flatten() for value in merged.values()]) for task in TASKS])
    return unified.double(), of_tasks.double()


@pytest.mark.parametrize("name", FIRST_TABLE)
def test_order_of_tasks_does_not_show(name):
    assert deviation(first_results(name, "permuted"), first_results(name, "")) < SAME


@pytest.mark.parametrize("c", [3.0, 0.001, -1.0])
@pytest.mark.parametrize("name", FIRST_TABLE)
def test_result_scales_with_the_deltas(name, c):
    expected = [c * value for value in first_results(name, "")]
    found = deviation(first_results(name, "", c), expected)
    if c == 3.0 and FIRST_TABLE[name].times_three:
        assert f"{found:.1g}" == FIRST_TABLE[name].times_three
    else:
        assert found < SAME


@pytest.mark.parametrize("name", FIRST_TABLE)
def test_a_duplicated_task_weighs_as_measured(name):
    found = deviation(first_results(name, "duplicated"), first_results(name, ""))
    assert f"{found:.1g}" == FIRST_TABLE[name].duplicated


@pytest.mark.parametrize("name", FIRST_TABLE)
def test_copies_of_one_task_give_what_was_measured(name):
    unified, _ = first_results(name, "copies")
    family = golden_family()
    tensors = sorted(family.blocks["vision_model.encoder.layers.1.mlp"])
    task = torch.cat([family.deltas[tensor][3].flatten() for tensor in tensors]).double()
    on = unified != 0
    factor = (unified[on] @ task[on] / task[on].square().sum()).item() if on.any() else 0.0
    assert (f"{factor:.3g}", round(100 * on.double().mean().item())) == FIRST_TABLE[name].copies


@pytest.mark.parametrize("name", FIRST_TABLE)
def test_one_element_merges_as_measured(name):
    call, steps = first_case(name)
    merged = merge(family_of({"w.weight": [[0.01], [0.02], [0.04]]}), call, steps=steps, bypass=False)["w.weight"]
    found = f"{merged.unified.item():.4g}"
    if call.method.form == "masked":
        found += " / " + ", ".join(f"{value.item():.4g}" for value in merged.tasks.values())
    assert found == FIRST_TABLE[name].single


# Second table


@functools.cache
def matrices():
    """The six of layer 0, all tasks."""
    deltas = golden_family().deltas
    return {name: value for name, value in deltas.items() if ".layers.0." in name and value.ndim == 3}


@functools.cache
def second_results(name, change="", c=1.0):
    """The merged matrices, float64."""
    rows, tasks = [TASKS.index(task) for task in ("cars", "gtsrb", "svhn")], ("cars", "gtsrb", "svhn")
    if change == "permuted":
        rows = [rows[2], rows[0], rows[1]]
    elif change == "duplicated":
        rows, tasks = [*rows, rows[2]], (*tasks, "svhn2")
    elif change == "copies":
        rows = [rows[0]] * 3
    deltas = {tensor: value[rows] * c for tensor, value in matrices().items()}
    if change == "zero":
        deltas = {tensor: torch.cat([value, torch.zeros_like(value[:1])]) for tensor, value in deltas.items()}
        tasks = (*tasks, "zz")
    blocks = golden_family().blocks
    blocks = {block: kept for block, of in blocks.items() if (kept := tuple(name for name in of if name in deltas))}
    call, steps, calibrate = second_case(SECOND["cases"][name])
    family = Family(tasks=tasks, deltas=deltas, blocks=blocks)
    merged = merge(family, call, steps=steps, calibrate=calibrate, bypass=False)
    return [merged[tensor].unified.double() for tensor in deltas]


@pytest.mark.parametrize("name", SECOND_TABLE)
def test_order_of_tasks_does_not_show_in_matrices(name):
    found = deviation(second_results(name, "permuted"), second_results(name))
    assert f"{found:.1g}" == SECOND_TABLE[name].permuted if SECOND_TABLE[name].permuted else found < 1e-6


@pytest.mark.parametrize("c", [3.0, 0.01, -1.0])
@pytest.mark.parametrize("name", SECOND_TABLE)
def test_merged_matrices_scale_with_the_deltas(name, c):
    found = deviation(second_results(name, c=c), [c * value for value in second_results(name)])
    measured = dict(zip((3.0, 0.01), SECOND_TABLE[name].scaled)).get(c)
    assert f"{found:.2f}" == measured if measured else found < 1e-6


@pytest.mark.parametrize("name", SECOND_TABLE)
def test_a_duplicated_task_weighs_as_measured_in_matrices(name):
    found = deviation(second_results(name, "duplicated"), second_results(name))
    assert f"{found:.2g}" == SECOND_TABLE[name].duplicated


@pytest.mark.parametrize("name", SECOND_TABLE)
def test_copies_of_one_task_give_what_was_measured_of_matrices(name):
    task = [value[TASKS.index("cars")].double() for value in matrices().values()]
    found = second_results(name, "copies")
    factors = [((f * t).sum() / t.square().sum()).item() for f, t in zip(found, task)]
    rest = deviation(found, [factor * t for factor, t in zip(factors, task)])
    rest = "exact" if rest < 1e-6 else f"{rest:.2g}"
    assert f"{sum(factors) / len(factors):.2g} ({rest})" == SECOND_TABLE[name].copies


@pytest.mark.parametrize("name", SECOND_TABLE)
def test_a_zero_task_changes_what_was_measured(name):
    found = deviation(second_results(name, "zero"), second_results(name))
    assert ("none" if found < 1e-6 else f"{found:.2g}") == SECOND_TABLE[name].zero
