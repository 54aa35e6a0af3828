import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.coding_error import (
    NORMAL_RATIOS,
    WEIGHT_BITS,
    CodingError,
    CodingErrorSum,
    residual_tasks,
    sample_rows,
)
from flexmerge_cli.residuals.low_bit import weight_code
from flexmerge_cli.residuals.row_errors import row_errors

from ..families import normal

GOLDEN = Path(__file__).parents[1] / "golden"
AUTO = json.loads((GOLDEN / "auto.json").read_text())


@pytest.fixture(scope="module")
def family():
    base = load_file(GOLDEN / "family/base/model.safetensors")
    return base, [load_file(GOLDEN / f"family/tasks/{task}/model.safetensors") for task in AUTO["tasks"]]


def measure(name, base, tasks, chunk_rows):
    matrix = MatrixView.SQUEEZED.matrix(base.shape)
    deltas = np.stack([task - base for task in tasks])
    average = base + deltas.mean(axis=0, dtype=np.float64).astype(np.float32)
    base, average, *tasks = [torch.from_numpy(x.reshape(matrix)) for x in (base, average, *tasks)]
    total = CodingErrorSum(name, matrix)
    for first in range(0, matrix[0], chunk_rows):
        here = total.sampled_in(first, min(chunk_rows, matrix[0] - first))
        residuals = [
            tasks[task][row] - average[row]
            for row, turn in zip(total.sampled[here], residual_tasks(here, len(tasks)))
            for task in turn
        ]
        residuals = torch.stack(residuals) if residuals else torch.empty(0, matrix[1])
        total.add(total.measure(first, base[first : first + chunk_rows], average[total.sampled[here]], residuals))
    return total.finish()


@pytest.mark.parametrize("name", AUTO["statistics"])
def test_errors_and_ratios_are_golden(family, name):
    base, tasks = family
    found = measure(name, base[name], [task[name] for task in tasks], 7)
    golden = CodingError.from_dict(AUTO["statistics"][name])
    assert found.base == pytest.approx(golden.base, rel=1e-4)
    assert found.average == pytest.approx(golden.average, rel=1e-4)
    assert found.ratio == pytest.approx(golden.ratio, rel=1e-4)


def test_the_size_of_chunks_does_not_show(family):
    base, tasks = family
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    found = [measure(name, base[name], [task[name] for task in tasks], rows) for rows in (1, 5, 63, 64)]
    assert all(other == found[0] for other in found)


def test_what_is_measured_is_what_decoding_loses():
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    found = measure("x", matrix.numpy(), [matrix.numpy()], 30)
    for bits, error in found.base.items():
        coder = weight_code(bits)
        decoded = coder.decode(coder.encode(matrix, "F32"), (30, 50), "F32")
        assert error == pytest.approx(np.square(decoded.astype(np.float64) - matrix.numpy()).sum(), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (3, 0)])
def test_tasks_that_have_not_moved_get_the_ratios_of_a_normal_distribution(shape):
    base = np.ones(shape, np.float32)
    assert measure("x", base, [base, base], 2).ratio == NORMAL_RATIOS


@pytest.mark.parametrize("case", AUTO["vectors"]["rows"], ids=lambda case: str(case["shape"]))
def test_sampled_rows_are_golden(case):
    rows = sample_rows(case["name"], tuple(case["shape"]))
    assert len(rows) == case["count"]
    assert rows[:8].tolist() == case["first"]
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < case["shape"][0]


def exact(matrix):
    return {bits: sum(row_errors(matrix, (bits,))[0]) for bits in WEIGHT_BITS}


@pytest.mark.parametrize(
    "kind", ["all rows move", "few rows move", "outlying row", "outlying column", "far", "zeros", "tiny"]
)
def test_the_error_of_the_average_is_close_to_the_exact_one(kind):
    """What 64 of 2000 rows say: within one percent where fine-tunes stay near, and within the rows' own spread."""
    base, *changes = normal(0, 2000, 300), 0.05 * normal(1, 2000, 300), 0.05 * normal(2, 2000, 300)
    if kind == "few rows move":
        changes = [change * (torch.arange(2000) < 40)[:, None] for change in changes]
    elif kind == "outlying row":
        base[1234] *= 1000
    elif kind == "outlying column":
        base[:, 7] *= 100
    elif kind == "far":
        changes = [40 * change for change in changes]
    elif kind == "zeros":
        base[:] = 0
    elif kind == "tiny":  # but for three rows, which no sample need have
        base[(torch.arange(2000) + 1) % 667 > 0] *= 1e-6
    tasks = [(base + change).numpy() for change in changes]
    found = measure("w", base.numpy(), tasks, 500)
    average = base + (sum(torch.from_numpy(task) - base for task in tasks).double() / 2).float()
    assert found.base == pytest.approx(exact(base), rel=1e-6)
    tolerance = {"far": 0.05, "zeros": 0.05, "tiny": 0.05}.get(kind, 0.01)
    assert found.average == pytest.approx(exact(average), rel=tolerance)


@pytest.mark.parametrize("num_tasks", [1, 3, 8, 9, 30])
def test_tasks_take_turns_in_the_sampled_rows(num_tasks):
    turns = residual_tasks(slice(0, 64), num_tasks)
    assert turns.shape == (64, min(8, num_tasks)) and all(len(set(row)) == len(row) for row in turns.tolist())
    counts = np.bincount(turns.ravel(), minlength=num_tasks)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(residual_tasks(slice(10, 20), num_tasks), turns[10:20])


def test_statistics_survive_json():
    found = CodingError.from_dict(next(iter(AUTO["statistics"].values())))
    assert CodingError.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_statistics_are_refused(value):
    data = json.loads(json.dumps(next(iter(AUTO["statistics"].values()))))
    data["residuals"]["4"] = value
    with pytest.raises(ValueError, match="not finite"):
        CodingError.from_dict(data)
