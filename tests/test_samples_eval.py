"""samples/eval: a spec of every kind, which runs on models that one script makes."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from flexmerge_cli.evaluation.kinds.registry import KINDS

from .program import ROOT, run_script, succeeds

SAMPLES = ROOT / "samples" / "eval"
SPECS = {path.stem: yaml.safe_load(path.read_text()) for path in SAMPLES.glob("*.yaml")}
MADE = (
    "text-classification", "regression", "causal-lm", "text2text", "zero-shot-image-classification",
    "semantic-segmentation", "depth-estimation",
)  # fmt: skip
OTHER_DATA = {"image-text-retrieval": "zero-shot-image-classification"}
"""A spec with other data of a kind's models."""
ON_DIGITS = ("image-classification", "agreement", "python", "command")


def test_every_kind_has_a_spec():
    kinds = {task["kind"].split(":")[0] for spec in SPECS.values() for task in spec["tasks"].values()}
    assert kinds == set(KINDS)
    assert set(SPECS) == {*MADE, *ON_DIGITS, *OTHER_DATA, "lm-eval"}


def test_the_samples_stay_small():
    listed = subprocess.run(["git", "ls-files", "samples"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("no git here")
    assert sum((ROOT / name).stat().st_size for name in listed.stdout.splitlines()) < 20_000_000


def bundle(base: Path, tasks: Path, folder: Path) -> Path:
    succeeds("plan", "--base", base, "--tasks", tasks, "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "-o", folder / "bundle")
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_spec_scores_what_the_script_makes_and_fine_tunes_are_no_worse_than_the_base(tmp_path, kind, monkeypatch):
    run_script(monkeypatch, SAMPLES / "make_models.py", "--out", tmp_path / "models", kind)
    family = tmp_path / "models" / kind
    made = bundle(family / "base", family / "tasks", tmp_path)
    for spec in (kind, *(name for name, models in OTHER_DATA.items() if models == kind)):
        shutil.copy(SAMPLES / f"{spec}.yaml", tmp_path / "eval.yaml")
        found = succeeds("eval", made, "--spec", tmp_path / "eval.yaml", "--json").json
        for record in found["tasks"].values():
            assert record["normalised"] == 1.0  # nothing is merged in it
            better = record["fine_tuned"] - record["base"]
            assert better >= 0 if record["higher_is_better"] else better <= 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = ROOT / "samples" / "digits"
    return bundle(folder / "base", folder / "tasks", tmp_path_factory.mktemp("digits"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_DIGITS)
def test_a_spec_of_the_digits_runs(digits, name):
    found = succeeds("eval", digits, "--spec", SAMPLES / f"{name}.yaml", "--allow-exec", "--json").json
    assert all(record["merged"] > 0.9 for record in found["tasks"].values())
