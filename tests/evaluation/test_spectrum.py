"""The variance of amplitudes over frequencies, against numpy's whole transform, and `inspect --spectrum` as a user runs
it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flexmerge_cli.evaluation.spectrum import variance

from ..program import fails, succeeds

MATRICES = ("model.layers.0.mlp.up.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up.weight")
TASKS = ("a", "b", "c")


def slow(matrix: np.ndarray) -> float:
    amplitudes = np.abs(np.fft.fft2(matrix.astype(np.float64), norm="ortho"))
    return float((amplitudes / amplitudes.mean()).var())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_it_is_the_variance_over_the_whole_transform(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    found = variance(matrix)
    assert found == pytest.approx(slow(matrix), rel=1e-9, abs=1e-12)
    assert variance(-8 * matrix) == pytest.approx(found, rel=1e-9, abs=1e-12)


def test_known_values() -> None:
    impulse = np.zeros((6, 7), np.float32)
    assert variance(impulse) is None
    impulse[2, 3] = 5
    assert variance(impulse) == pytest.approx(0, abs=1e-20)
    assert variance(np.ones((6, 7), np.float32)) == pytest.approx(41)  # one of 42 frequencies
    noise = np.random.default_rng(0).normal(size=(400, 500)).astype(np.float32)
    assert variance(noise) == pytest.approx(4 / np.pi - 1, rel=0.01)


def family(root: Path, seed: int = 1) -> Path:
    """A plan of three tasks, of which `c` leaves one matrix as it is."""
    random = np.random.default_rng(seed)
    shapes = dict(zip(MATRICES, ((6, 4), (5, 5), (3, 8)))) | {
        "model.embed_tokens.weight": (9, 4),
        "model.norm.weight": (4,),
    }
    base = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    models = {"base": base} | {
        task: {name: values + random.normal(size=values.shape).astype(np.float32) for name, values in base.items()}
        for task in TASKS
    }
    models["c"][MATRICES[0]] = base[MATRICES[0]]
    for name, tensors in models.items():
        (root / name).mkdir(parents=True)
        save_file(tensors, root / name / "model.safetensors")
    tasks = [word for task in TASKS for word in ("--task", f"{task}={root / task}")]
    succeeds("plan", "-q", "--base", root / "base", *tasks, "-o", root / "plan.json")
    return root / "plan.json"


@pytest.mark.parametrize("size", ["1x", "2x", "3x"])
def test_blocks_have_the_means_over_matrices_and_tasks(tmp_path: Path, size: str) -> None:
    plan = family(tmp_path)
    succeeds("merge", "-q", plan, "--method", "ties", "--size", size, "-o", tmp_path / "bundle")
    value = succeeds("inspect", tmp_path / "bundle", "--spectrum", plan, "--json").json
    units = {unit["name"]: unit for unit in value["units"]}
    base = load_file(tmp_path / "base" / "model.safetensors")
    models: dict[str, tuple[Any, Any]] = {}
    for task in TASKS:
        succeeds("export", "-q", tmp_path / "bundle", "--task", task, "-o", tmp_path / "out" / task)
        models[task] = tuple(load_file(tmp_path / folder / task / "model.safetensors") for folder in (".", "out"))
    assert {row["block"] for row in value["spectrum"]} == {
        name for name, unit in units.items() if set(unit["tensors"]) & set(MATRICES)
    }
    for row in value["spectrum"]:
        pairs = [
            [slow(model[name] - base[name]) for model in models[task]]
            for name in set(units[row["block"]]["tensors"]) & set(MATRICES)
            for task in TASKS
            if all((model[name] != base[name]).any() for model in models[task])
        ]
        assert row["pairs"] == len(pairs)
        assert [row["own"], row["stored"]] == pytest.approx(np.mean(pairs, axis=0).tolist(), rel=1e-6)
        assert row["change"] == pytest.approx(row["stored"] / row["own"] - 1)
        if size == "3x":
            assert row["methods"] == ["copy"] and row["change"] == pytest.approx(0)
    assert any("ties" in row["methods"] for row in value["spectrum"]) == (size != "3x")


def test_the_table_fits_a_terminal_and_the_page_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = family(tmp_path)
    succeeds("merge", "-q", plan, "--method", "average", "--size", "1x", "-o", tmp_path / "bundle")
    asked = "inspect", tmp_path / "bundle", "--spectrum", plan
    shown = succeeds(*asked, "--html", tmp_path / "page.html").out
    table = shown[shown.index("variance of amplitudes") :].splitlines()
    assert max(map(len, table)) <= 80 and "mean of all blocks" in shown
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Frequencies</h2>" in page and "mean of all blocks" in page
    succeeds("inspect", tmp_path / "bundle", "--html", tmp_path / "page.html", "--force")
    assert "<h2>Frequencies</h2>" not in (tmp_path / "page.html").read_text()


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    plan, other = family(tmp_path), family(tmp_path / "other", seed=2)
    bundle = tmp_path / "bundle"
    succeeds("merge", "-q", plan, "--method", "average", "--size", "1x", "-o", bundle)
    fails(2, "inspect", plan, "--spectrum", plan, says="is a plan")
    fails(2, "inspect", bundle, "--spectrum", plan, "--verify", says="cannot be combined")
    fails(2, "inspect", bundle, "--relocate", "a=b", says="--spectrum")
    fields = json.loads(other.read_text())
    assert fields["sha256"] != json.loads(plan.read_text())["sha256"]
    fails(2, "inspect", bundle, "--spectrum", other, says=("was made from plan", fields["sha256"][:16]))
    weights = load_file(tmp_path / "b" / "model.safetensors")
    weights[MATRICES[2]] += 1
    save_file(weights, tmp_path / "b" / "model.safetensors")
    fails(3, "inspect", bundle, "--spectrum", plan, says=("task `b` has changed since the plan", MATRICES[2]))
