"""A bundle of `flexmerge.bundle/1`, kept as it was written: it is read, exported and replaced like one of today."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flexmerge_cli import open_bundle, verify

from ..families import assert_same_state
from ..program import ROOT, succeeds, tree

KEPT = Path(__file__).parents[1] / "golden/bundle-1"
"""`alone` loads by its index, `left`, `middle` and `right` have masks, and `kept` is a LoRA over the base."""


@pytest.fixture
def bundle(tmp_path):
    return Path(shutil.copytree(KEPT, tmp_path / "bundle"))


def test_it_is_of_the_first_format():
    assert json.loads((KEPT / "manifest.json").read_bytes())["format"] == "flexmerge.bundle/1"


def test_every_tensor_of_it_is_sound():
    found = verify(KEPT, decode=True)
    assert (found.bad, found.unknown, found.num_files, found.num_tensors) == ({}, (), 18, 18)
    reader = runpy.run_path(str(ROOT / "samples/read_bundle.py"))
    assert [reader["check"](KEPT, task) for task in open_bundle(KEPT).tasks] == [3, 3, 4, 4, 4]


@pytest.mark.parametrize("task", ["alone", "left", "middle", "right"])
def test_it_is_exported_with_its_side_files(task, bundle, tmp_path):
    succeeds("export", bundle, "--task", task, "-o", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == f"# {task}\n"
    assert sorted(tree(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]
    assert_same_state(load_file(tmp_path / "out/model.safetensors"), open_bundle(KEPT).view(task))


def test_its_adapter_comes_back_and_its_whole_task_is_linked(bundle, tmp_path):
    succeeds("export", bundle, "--task", "kept", "-o", tmp_path / "kept")
    assert tree(tmp_path / "kept") == tree(KEPT / "tasks/kept")
    succeeds("export", bundle, "--task", "alone", "--link", "-o", tmp_path / "alone")
    weights = next((tmp_path / "alone").glob("*.safetensors"))
    assert weights.samefile(bundle / "weights/alone.safetensors")


def test_inspect_says_which_task_lies_in_place(bundle):
    tasks = succeeds("inspect", bundle, "--json").json["tasks"]
    assert {task for task, found in tasks.items() if found["in_place"]} == {"alone"}
    assert all(found["config"] for task, found in tasks.items() if task != "kept")


def test_force_replaces_it(bundle, plan, tmp_path):
    succeeds("merge", plan, "-o", bundle, "--force")
    assert set(open_bundle(bundle).tasks) == {"task0", "task1", "task2", "task3"}
