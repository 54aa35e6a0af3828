"""Names that are not UTF-8, as disks and command lines can hold them: outputs may have them, what is kept may not."""

import json
import os
import shutil

import pytest

from ..families import plain, write_family
from ..program import fails, flexmerge, succeeds

BYTES = os.fsdecode(b"b\xff\xfed")


@pytest.fixture
def made(tmp_path):
    if not _can_be_named(tmp_path / BYTES):
        pytest.skip("this file system has no such names")
    folders = write_family(tmp_path, plain(num_tasks=2))
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    return folders


def _can_be_named(path):
    try:
        path.touch()
        path.unlink()
    except OSError:
        return False
    return True


def test_outputs_have_any_name(made, tmp_path):
    plan, bundle, out = tmp_path / f"{BYTES}.json", tmp_path / BYTES, tmp_path / f"{BYTES}-out"
    succeeds("plan", *made.arguments, "-o", plan)
    succeeds("merge", plan, "-o", bundle)
    succeeds("inspect", bundle, "--verify")
    assert succeeds("inspect", bundle, "--json").json["tasks"]
    succeeds("inspect", plan, "--html", tmp_path / f"{BYTES}.html")
    succeeds("export", bundle, "--task", "task0", "-o", out)
    succeeds("eval", "--init", bundle, "-o", tmp_path / f"{BYTES}.yaml")
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["in --tasks", "--task", "--base", "file"])
def test_a_source_whose_name_a_plan_cannot_hold_is_refused(place, made, tmp_path):
    source = tmp_path / ("tasks" if place == "in --tasks" else "") / BYTES
    shutil.copytree(made.tasks["task0"], source)
    arguments = {
        "in --tasks": made.arguments,
        "--task": [*made.arguments[:2], "--task", f"a={source}"],
        "--base": ["--base", source, *made.arguments[2:]],
        "file": [*made.arguments[:2], "--task", f"a={source / 'model.safetensors'}"],
    }[place]
    done = fails(4, "plan", *arguments, "-o", tmp_path / "out.json", says="not Unicode text")
    assert "hint: rename it" in done.err and not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("options", [
    ("plan", "--private", BYTES), ("plan", "--variant", BYTES), ("plan", "--blocks", BYTES),
    ("merge", "--method", "average", "--size", "2x", "--method-for", f"{BYTES}=keep"), ("merge", "--method", BYTES),
    ("merge", "--size", BYTES), ("merge", "--relocate", f"{BYTES}=x"),
])  # fmt: skip
def test_a_text_that_no_file_of_ours_can_hold_is_refused(options, made, tmp_path):
    source = made.arguments if options[0] == "plan" else [tmp_path / "plan.json"]
    fails(2, options[0], *source, *options[1:], "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_beside_weights_is_not_carried_and_named(made, tmp_path):
    (made.tasks["task0"] / f"{BYTES}.txt").write_text("x")
    done = succeeds("plan", *made.arguments, "-o", tmp_path / "out.json")
    assert r"b\udcff\udcfed.txt" in done.err and BYTES not in (tmp_path / "out.json").read_text()


def test_tensors_of_such_names_are_unsound(tmp_path):
    header = b'{"\xff\xfe": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    fails(3, "inspect", tmp_path / "m", says="not valid JSON")
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    fails(3, "inspect", tmp_path / "m", says="not text")
    assert flexmerge(BYTES).code == 2
