"""`auto` against an independent reference, golden/auto.json: statistics in; choices, bytes, decoded weights out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexmerge_cli.allocation import auto_statistics
from flexmerge_cli.allocation.auto import search
from flexmerge_cli.allocation.auto_statistics import TensorStatistics, partitions, weights
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.coding_error import CodingError
from flexmerge_cli.residuals.low_bit import weight_code
from flexmerge_cli.residuals.sign_runs import residual_code

GOLDEN = Path(__file__).parents[1] / "golden"
AUTO = json.loads((GOLDEN / "auto.json").read_text())
FAMILIES = {"family": AUTO} | {name: {**AUTO["edges"][name], "edge": True} for name in AUTO["edges"]}
CASES = [
    pytest.param(family, allocation, id=f"{name}-{allocation['budget']}")
    for name, family in FAMILIES.items()
    for allocation in (family["allocations"].values() if name == "family" else family["allocations"])
]
DECODED = AUTO["decoded"]


@pytest.fixture(autouse=True)
def _squared_error_of_whole_bits(monkeypatch):
    """The reference minimises squared error, and knows no codes of less than one bit an element."""
    monkeypatch.setattr(TensorStatistics, "price", lambda _, loss: loss)
    monkeypatch.setattr(auto_statistics, "RUNS", {})


def statistics(name, data, item_bytes):
    dtype = {4: "F32", 2: "BF16"}[item_bytes]
    return TensorStatistics(
        name=name,
        shape=tuple(data["shape"]),
        base_dtype=dtype,
        dtypes=(dtype,) * len(data["same"]),
        gram=np.array(data["gram"]),
        same=tuple(data["same"]),
        is_base=tuple(data["is_base"]),
        errors=CodingError.from_dict(data),
    )


def blocks_of(family):
    blocks = family["partitions"]
    return {
        name: next(block for block in blocks if name == block or name.startswith(f"{block}."))
        for name in family["statistics"]
    }


def levels_of(family):
    return {
        block: {int(level): tuple(map(tuple, groups)) for level, groups in levels.items()}
        for block, levels in family["partitions"].items()
    }


def search_of(family):
    tensors = [statistics(name, data, family["item_bytes"]) for name, data in family["statistics"].items()]
    return search(tensors, blocks_of(family), levels_of(family), Limits(scales="bfloat16"))


def as_golden(choice):
    centre = choice.centre
    if centre.kind == "none":
        return {"centre": "none", "residuals": list(choice.bits)}
    groups = {"groups": len(centre.groups)} if centre.kind == "average" else {}
    bits = 0 if centre.bits == "dense" else centre.bits
    return {"centre": centre.kind, **groups, "bits": bits, "residuals": list(choice.bits)}


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_smallest_sizes_are_golden(name):
    family = FAMILIES[name]
    tensors = [statistics(tensor, data, family["item_bytes"]) for tensor, data in family["statistics"].items()]
    assert weights(tensors, blocks_of(family)) == pytest.approx(family["w"], rel=1e-12)
    assert search_of(family).smallest_bytes == family["smallest"]


@pytest.mark.parametrize(("family", "golden"), CASES)
def test_choices_are_golden(family, golden):
    found = search_of(family).solve(golden["budget"])
    assert {choice.tensor: as_golden(choice) for choice in found.choices} == golden["tensors"]
    assert found.num_bytes == golden["bytes"]
    assert found.cost == pytest.approx(golden["predicted"], rel=1e-9)


def test_noise_in_the_statistics_does_not_change_choices():
    rng = np.random.default_rng(0)
    noisy = json.loads(json.dumps(AUTO))
    for data in noisy["statistics"].values():
        data["gram"] = (np.array(data["gram"]) * (1 + 1e-9 * rng.uniform(-1, 1, np.shape(data["gram"])))).tolist()
        for numbers in (*data["weights"].values(), data["residuals"]):
            numbers |= {bits: value * (1 + 1e-9 * rng.uniform(-1, 1)) for bits, value in numbers.items()}
    found = search_of(noisy)
    for golden in AUTO["allocations"].values():
        choices = found.solve(golden["budget"]).choices
        assert {choice.tensor: as_golden(choice) for choice in choices} == golden["tensors"]


def test_the_hull_of_a_matrix_is_golden():
    ((name, golden),) = AUTO["hull"].items()
    table = next(table for table in search_of(AUTO).tables if table.tensor.name == name)
    num_bytes, cost = table.num_bytes[table.vertices], table.cost[table.vertices]
    golden_bytes, golden_cost = np.array([vertex[:2] for vertex in golden]).T
    for at in (num_bytes, golden_bytes):  # as functions: a vertex on the line of its neighbours is there by rounding
        found, expected = np.interp(at, num_bytes, cost), np.interp(at, golden_bytes, golden_cost)
        assert found == pytest.approx(expected, rel=1e-9)
    assert (num_bytes[0], num_bytes[-1]) == (golden_bytes[0], golden_bytes[-1])


def test_bytes_of_every_tensor_are_golden():
    found = search_of(AUTO).solve(AUTO["allocations"][DECODED["budget"]]["budget"])
    assert {choice.tensor: choice.num_bytes for choice in found.choices} == DECODED["bytes"]


@pytest.mark.parametrize("name", DECODED["tensors"])
@pytest.mark.parametrize("task", DECODED["tasks"])
def test_packed_parts_and_decoded_weights_are_golden(name, task):
    base = load_file(GOLDEN / "family/base/model.safetensors")[name]
    tasks = [load_file(GOLDEN / f"family/tasks/{task}/model.safetensors")[name] for task in AUTO["tasks"]]
    number = AUTO["tasks"].index(task)
    found = search_of(AUTO).solve(AUTO["allocations"][DECODED["budget"]]["budget"])
    choice = next(choice for choice in found.choices if choice.tensor == name)
    group = next(group for group in choice.centre.groups if number in group)
    deltas = np.stack([tasks[k] - base for k in group])
    average = base + deltas.mean(axis=0, dtype=np.float64).astype(np.float32)
    matrix = MatrixView.SQUEEZED.matrix(base.shape)
    coder = weight_code(choice.centre.bits)
    centre = coder.decode(coder.encode(torch.from_numpy(average.reshape(matrix)), "F32"), matrix, "F32")
    bits = choice.bits[number]
    coder = replace(residual_code(bits, "bfloat16", matrix[0]), gain="norm" if bits <= 2 else "none")
    parts = coder.encode(torch.from_numpy(tasks[number].reshape(matrix) - centre), "F32")
    for role, expected in DECODED["parts"][f"{name}/{task}"].items():
        assert parts[role].tobytes().hex().startswith(expected)
    decoded = (centre + coder.decode(parts, matrix, "F32")).reshape(base.shape)
    golden = load_file(GOLDEN / "auto.safetensors")[f"{name}/{task}"]
    assert decoded == pytest.approx(golden, rel=0, abs=1e-6 * float(np.abs(golden).max()))


def test_levels_follow_from_the_merges_of_a_block():
    merges = [((1,), (4,)), ((1, 4), (6,)), ((0,), (7,)), ((2,), (5,)), ((0, 7), (3,)), ((0, 3, 7), (2, 5))]
    merges.append(((0, 2, 3, 5, 7), (1, 4, 6)))
    found = partitions(8, merges)
    assert found == levels_of(AUTO)["vision_model.encoder.layers.1.layer_norm2"]
