"""`flexmerge inspect` of checkpoints, plans and bundles, as a user runs it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from flexmerge_cli.bundle.manifest_file import read_manifest
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.cli.app import run
from flexmerge_cli.evaluation.models import StoredWeights
from flexmerge_cli.formats.plan_file import save_plan
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.report.inspect_plan import cosines
from flexmerge_cli.report.plan import size_rows
from tests.program import stored_sizes
from tests.report.examples import GOLDEN, bundle_path, copy_of, plan_path
from tests.report.plans import synthetic_plan

CHECKPOINT = GOLDEN / "base"


def test_everything_but_a_bin_needs_no_torch(tmp_path: Path) -> None:
    """One process in which torch cannot be imported."""
    plan, bundle = str(plan_path()), str(bundle_path("emr", "3x"))
    runs = [
        [str(CHECKPOINT)],
        [plan, "--html", str(tmp_path / "plan.html")],
        [plan, "--block", "visual_projection"],
        [bundle, "--html", str(tmp_path / "bundle.html")],
        [bundle, "--verify", "--decode"],
        [bundle, "--spectrum", plan],
    ]
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from flexmerge_cli.cli.app import run\n"
        "sys.exit(max(run(['inspect', *arguments]) for arguments in json.loads(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(runs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "320 decoded tensors: sound" in done.stdout


def test_it_tells_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [inspect(source, capsys)["kind"] for source in (CHECKPOINT, plan_path(), bundle_path("average", "3x"))]
    assert kinds == ["checkpoint", "plan", "bundle"]


def test_a_checkpoint_tells_blocks_and_what_would_stay_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        "encoder.layers.0.mlp.fc1.weight": np.zeros((4, 3), np.float32),
        "encoder.layers.0.self_attn.q_proj.weight": np.zeros((3, 3), np.float16),
        "encoder.norm.running_mean": np.zeros(3, np.float32),
        "embeddings.position_ids": np.zeros((1, 5), np.int64),
        "classifier.weight": np.zeros((2, 3), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    value = inspect(tmp_path, capsys)
    assert value["parameters"] == 12 + 9 + 3 + 5 + 6
    assert value["dtypes"]["F16"] == {"tensors": 1, "parameters": 9, "bytes": 18}
    assert {found["name"]: found["why"] for found in value["private"]} == {
        "encoder.norm.running_mean": "running statistic",
        "embeddings.position_ids": "not floating point",
        "classifier.weight": "task head",
    }
    assert [block["name"] for block in value["blocks"]] == ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"]


def test_a_plan_tells_the_sizes_that_plan_tells(capsys: pytest.CaptureFixture[str]) -> None:
    value, plan = inspect(plan_path(), capsys), load_plan(plan_path())
    for found, wanted in zip(value["sizes"], size_rows(plan), strict=True):
        for method, distances in wanted["distance"].items():
            assert found["distance"].pop(method) == pytest.approx(distances, abs=1e-7)
        wanted["distance"] = {}
        assert found == wanted
    assert len(value["curve"]["tensor_bytes"]) == len(plan.order) + 1
    assert sorted(place for block in value["blocks"] for place in block["merges"]) == list(
        range(1, len(plan.order) + 1)
    )


def test_a_plan_tells_the_cosines_of_whole_task_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    value, plan = inspect(plan_path(), capsys), load_plan(plan_path())
    models = [open_checkpoint(str(source)) for source in (GOLDEN / "base", *sorted((GOLDEN / "tasks").iterdir()))]
    base, *tasks = (
        [StoredWeights(model.tensors)[tensor.name].double().flatten() for tensor in plan.tensors if tensor.gram]
        for model in models
    )
    vectors = [torch.cat([own - of for own, of in zip(task, base, strict=True)]).numpy() for task in tasks]
    norms = [np.linalg.norm(vector) for vector in vectors]
    assert value["task_vectors"]["norms"] == pytest.approx(norms, rel=1e-6)
    wanted = np.array([[left @ right for right in vectors] for left in vectors]) / np.outer(norms, norms)
    assert np.allclose(value["task_vectors"]["cosine"], wanted, atol=1e-6)


def test_a_task_that_is_the_base_has_no_cosine() -> None:
    found = cosines(np.array([[4.0, 0.0, -2.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 1.0]]))
    assert np.array_equal(found[[0, 0, 2], [0, 2, 2]], [1.0, -1.0, 1.0])
    assert np.isnan(found[1]).all() and np.isnan(found[:, 1]).all()


def test_a_block_is_a_heat_map_that_needs_no_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(["inspect", str(plan_path()), "--block", "visual_projection"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[3" not in text and "\x1b[4" not in text  # no colour of letters or paper
    assert "8 svhn" in text and "█ 1.00" in text


def test_an_unknown_block_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused([str(plan_path()), "--block", "layers.1.mlp"], 2, capsys)
    assert "`vision_model.encoder.layers.1.mlp`" in error["hint"]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("checkpoint", ["--verify"]),
        ("checkpoint", ["--block", "x"]),
        ("checkpoint", ["--html", "x.html"]),
        ("plan", ["--verify"]),
        ("plan", ["--decode"]),
        ("bundle", ["--block", "x"]),
        ("bundle", ["--decode"]),
        ("bundle", ["--verify", "--html", "x.html"]),
        ("bundle", ["--verify", "--nonsense"]),
    ],
)
def test_options_that_do_not_fit_are_refused(
    source: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"checkpoint": CHECKPOINT, "plan": plan_path(), "bundle": bundle_path("average", "3x")}
    refused([str(sources[source]), *options], 2, capsys)


def test_what_is_none_of_the_three_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("hello")
    (tmp_path / "other.json").write_text("{}")
    assert "is not a checkpoint" in refused([str(tmp_path / "notes")], 2, capsys)["message"]
    assert "is not a plan" in refused([str(tmp_path / "other.json")], 2, capsys)["message"]
    assert refused([str(GOLDEN / "tasks")], 2, capsys)["hint"].endswith("tasks/cars")
    assert refused(["org/name"], 4, capsys)["hint"] == "for the Hub write hf://org/name"


def test_a_bundle_tells_where_its_bytes_are(capsys: pytest.CaptureFixture[str]) -> None:
    for method, size in (("average", "3x"), ("emr", "3x"), (None, None)):
        path = bundle_path(method, size)
        value = inspect(path, capsys)
        assert sum(unit["bytes"] for unit in value["units"]) == value["classes"]["mergeable"]["bytes"]
        assert sum(found["bytes"] for found in value["classes"].values()) == value["stored_bytes"]
        assert value["total_bytes"] == sum(stored_sizes(path).values())
        for task in value["tasks"].values():
            assert (task["approximated"] == 0) == task["exact"] == (method is None)
            assert task["own_bytes"] <= task["route_bytes"]


def test_verify_of_a_sound_bundle_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    value = inspect(bundle_path("emr", "3x"), capsys, "--verify", "--decode")
    found = value["verification"]
    assert found["sound"] and not found["bad"] and found["tensors"] == 320 and len(found["sound_tasks"]) == 8
    assert "error" not in value


@pytest.mark.parametrize("method", ["average", "emr"])
def test_verify_names_the_part_of_a_flipped_bit_and_the_tasks_it_breaks(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexmerge_cli.bundle.read import Bundle

    bundle = Bundle.open(copy_of(bundle_path(method, "3x"), tmp_path / "bundle"))
    file = next(name for name in bundle.parts if 1 < len(bundle.manifest.files[name].tasks) < 8)
    part = max(bundle.parts[file].values(), key=lambda part: part.num_bytes)
    flip(part.path, part.offset + 2)
    code = run(["inspect", str(bundle.path), "--verify", "--json"])
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    found = value["verification"]
    assert code == 5 and value["error"]["exit_code"] == 5 and "error:" in captured.err
    assert found["bad"] == {file: "sha256 differs"}
    # What is named no longer decodes: damage of a unified delta shows only in tasks whose mask takes that element.
    assert found["damaged"][file] == [part.name] or (method == "emr" and not found["damaged"][file])
    assert found["broken_tasks"] == list(bundle.manifest.files[file].tasks)
    assert sorted(found["broken_tasks"] + found["sound_tasks"]) == sorted(bundle.tasks)


def test_verify_tells_of_a_missing_and_a_foreign_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy_of(bundle_path("average", "3x"), tmp_path / "bundle")
    (path / "weights" / "cars.safetensors").unlink()
    (path / "notes.txt").write_text("mine")
    assert run(["inspect", str(path), "--verify"]) == 5
    text = capsys.readouterr()
    assert "bad: weights/cars.safetensors: missing" in text.out and "not of this bundle: notes.txt" in text.out
    assert "broken tasks: cars\n" in text.out and "error:" in text.err and "sound still: dtd" in text.err
    assert refused([str(path)], 5, capsys)["message"].endswith("weights/cars.safetensors is missing")


def test_a_bundle_without_its_manifest_is_told_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of(bundle_path("average", "3x"), tmp_path / "bundle")
    (path / "manifest.json").unlink()
    (path / "tasks").mkdir(exist_ok=True)
    assert "has no manifest.json" in refused([str(path), "--verify"], 4, capsys)["message"]


def test_a_page_is_not_written_over_anything_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, page = Path(shutil.copy(plan_path(), tmp_path / "plan.json")), tmp_path / "report.html"
    assert inspect(plan, capsys, "--html", str(page))["html"] == str(page)
    before = page.read_bytes()
    refused([str(plan), "--html", str(page)], 2, capsys)
    assert inspect(plan, capsys, "--html", str(page), "--force") and page.read_bytes() == before
    refused([str(plan), "--html", str(plan), "--force"], 2, capsys)
    (tmp_path / "thesis.txt").write_text("mine")
    refused([str(plan), "--html", str(tmp_path / "thesis.txt"), "--force"], 2, capsys)
    bundle = copy_of(bundle_path("average", "3x"), tmp_path / "bundle")
    refused([str(bundle), "--html", str(bundle / "x.html")], 2, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "plan.json", "report.html", "thesis.txt"]


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor called `\\x1b]0;…` would set the title of the window, or hide the line above."""
    save_plan(synthetic_plan(3, 4, prefix="\x1b]0;pwned\x07\u202e"), tmp_path / "plan.json")
    save_file({"\x1b[2Jw.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    for arguments in ([str(tmp_path / "plan.json"), "-v"], [str(tmp_path / "model.safetensors")]):
        assert run(["inspect", *arguments]) == 0
        text = capsys.readouterr().out
        assert not {"\x1b", "\x07", "\u202e"} & set(text) and "\\x1b" in text


def test_a_plan_of_one_task_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plan(synthetic_plan(1, 3), tmp_path / "plan.json")
    assert run(["inspect", str(tmp_path / "plan.json")]) == 0
    assert "there is one task" in capsys.readouterr().out
    value = inspect(tmp_path / "plan.json", capsys)
    assert value["merges"] == 0 and value["blocks"][0]["similarity"] is None


def test_long_tables_are_cut_short_unless_all_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_plan(synthetic_plan(3, 120), tmp_path / "plan.json")
    lines = []
    for options in ([], ["-v"]):
        assert run(["inspect", str(tmp_path / "plan.json"), *options]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert len(lines[0]) < 110 < 150 < len(lines[1])
    assert any("80 more: -v shows all" in line for line in lines[0])
    assert max(map(len, lines[1])) <= 200


@pytest.mark.parametrize("source", [CHECKPOINT, "plan", "bundle"])
def test_a_short_line_cuts_names_and_never_numbers(
    source: Path | str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`124,160` over two lines was read as `124,16`."""
    for name, value in (("COLUMNS", "60"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    paths = {"plan": plan_path(), "bundle": bundle_path("average", "3x")}
    assert run(["inspect", str(paths.get(str(source), source))]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    tables = [line for line in text.splitlines() if line.startswith(" ")]
    assert tables and max(map(len, tables)) <= 60
    assert not re.search(r"[0-9][,.][0-9]* *$\n *[0-9]{1,2} *$", text, re.MULTILINE)
    assert "…" in text or source == CHECKPOINT


def test_a_plan_whose_numbers_make_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sha256 is right: anyone can compute that."""
    plan = synthetic_plan(3, 1)
    gram = ((1.0, 0.5, 0.5), (0.1, 1.0, 0.5), (0.5, 0.5, 1.0))
    tensors = tuple(tensor.model_copy(update={"gram": gram}) for tensor in plan.tensors)
    save_plan(plan.model_copy(update={"tensors": tensors}), tmp_path / "plan.json")
    assert "not a sound plan" in refused([str(tmp_path / "plan.json")], 2, capsys)["message"]


def test_ids_are_those_of_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_path("average", "3x")
    assert inspect(path, capsys)["id"] == read_manifest(path).id


def inspect(source: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """The JSON document of a run that ends well; stdout is that and nothing else."""
    assert run(["inspect", str(source), "--json", *options]) == 0
    value = json.loads(capsys.readouterr().out)
    assert isinstance(value, dict)
    return value


def refused(arguments: list[str], exit_code: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The error of a run that does not."""
    assert run(["inspect", *arguments, "--json"]) == exit_code
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == exit_code and error["message"] and error["hint"]
    return dict(error)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
