"""A bundle on the Hub: its manifest is looked at, one task's files are fetched, and nothing else."""

import json
import shutil

import pytest

from ..program import ROOT, fails, flexmerge, succeeds, tree

SOURCE = "hf://org/bundle"


@pytest.fixture(scope="module")
def made(plan, tmp_path_factory):
    """Masks, merged blocks and copies: files of one, of several and of all tasks."""
    path = tmp_path_factory.mktemp("made") / "bundle"
    succeeds("merge", plan, "--method", "emr", "--size", "3.5x", "-o", path)
    return path


@pytest.fixture
def bundle(hub, made):
    hub.add("org/bundle", made)
    return made


def files_of(bundle, *tasks: str) -> dict[str, int]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    return {path: file["bytes"] for path, file in manifest["files"].items() if set(tasks) & set(file["tasks"])}


def sent(hub) -> dict[str, int]:
    return {path.removeprefix("org/bundle/"): count for path, count in hub.sent.items()}


def test_one_task_is_fetched_and_nothing_else(hub, bundle, tmp_path):
    needed = files_of(bundle, "task2") | {"manifest.json": (bundle / "manifest.json").stat().st_size}
    said = succeeds("export", SOURCE, "--task", "task2", "-o", tmp_path / "out").err
    assert sent(hub) == needed
    assert len(needed) < len(tree(bundle))
    assert f"into {tmp_path / 'hub-cache'}" in said
    succeeds("export", bundle, "--task", "task2", "-o", tmp_path / "local")
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    hub.forget()
    succeeds("export", SOURCE, "--task", "task2", "-o", tmp_path / "again")
    assert sent(hub) == {}
    succeeds("export", SOURCE, "--task", "task2", "-o", tmp_path / "offline", "--offline")
    assert tree(tmp_path / "again") == tree(tmp_path / "offline") == tree(tmp_path / "local")


def test_a_second_task_costs_what_the_first_had_not(hub, bundle, tmp_path):
    succeeds("export", SOURCE, "--task", "task2", "-o", tmp_path / "out")
    hub.forget()
    succeeds("export", SOURCE, "--task", "task0", "-o", tmp_path / "other")
    # Files that are equal, as all the configs are, are one blob.
    here = {(bundle / path).read_bytes() for path in files_of(bundle, "task2")}
    new = {path: size for path, size in files_of(bundle, "task0").items() if (bundle / path).read_bytes() not in here}
    assert sent(hub) == new and len(new) > 1
    fails(4, "export", SOURCE, "--task", "task1", "-o", tmp_path / "third", "--offline", says="is missing")


def test_inspect_reads_manifest_and_headers(hub, bundle):
    shown, local = succeeds("inspect", SOURCE, "--json").json, succeeds("inspect", bundle, "--json").json
    assert {key: value for key, value in shown.items() if key != "bundle"} == {
        key: value for key, value in local.items() if key != "bundle"
    }
    header = {
        str(path.relative_to(bundle)): 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in bundle.glob("weights/*")
    }
    assert sent(hub) == header | {"manifest.json": (bundle / "manifest.json").stat().st_size}


def test_verify_and_all_tasks_take_every_file(hub, bundle, tmp_path):
    succeeds("inspect", SOURCE, "--verify")
    stored = {data for name, data in tree(bundle).items() if name != "README.md"}
    assert sum(sent(hub).values()) == sum(map(len, stored))
    hub.forget()
    succeeds("export", SOURCE, "--all", "-o", tmp_path / "all")
    assert sent(hub) == {}
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["task0", "task1", "task2", "task3"]


@pytest.mark.slow
def test_a_bundle_of_the_hub_is_scored_like_that_on_the_disk(hub, tmp_path):
    digits = ROOT / "samples/digits"
    tasks = [argument for name in ("digit", "parity") for argument in ("--task", f"{name}={digits}/tasks/{name}")]
    succeeds("plan", "--base", digits / "base", *tasks, "--statistics", "gram", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "-o", tmp_path / "bundle")
    hub.add("org/digits", tmp_path / "bundle")
    scored = {
        name: {"kind": "image-classification", "data": f"{digits}/test/{name}.npz"} for name in ("digit", "parity")
    }
    (tmp_path / "eval.yaml").write_text(json.dumps({"version": 1, "dtype": "float32", "tasks": scored}))
    given = ["--spec", tmp_path / "eval.yaml", "--json"]
    ours, theirs = (succeeds("eval", bundle, *given).json for bundle in ("hf://org/digits", tmp_path / "bundle"))
    assert ours["tasks"] == theirs["tasks"]


def test_a_linked_export_of_the_cache(hub, plan, tmp_path):
    succeeds("merge", plan, "-o", tmp_path / "exact")
    hub.add("org/exact", tmp_path / "exact")
    succeeds("export", "hf://org/exact", "--task", "task0", "--link", "-o", tmp_path / "out")
    assert succeeds("inspect", tmp_path / "out", "--json").json["parameters"] > 0


def test_python_opens_it_too(hub, bundle):
    from flexmerge_cli import open_bundle

    assert set(open_bundle(SOURCE).view("task1")) == set(open_bundle(bundle).view("task1"))


def test_a_bundle_in_a_folder_of_a_repository(hub, made, tmp_path):
    shutil.copytree(made, tmp_path / "repository/packed")
    hub.add("org/more", tmp_path / "repository")
    succeeds("export", "hf://org/more:packed", "--task", "task1", "-o", tmp_path / "out")
    assert succeeds("inspect", "hf://org/more:packed", "--json").json["kind"] == "bundle"


# What goes wrong.


def test_a_task_that_it_has_not_is_told_before_a_weight_is_fetched(hub, bundle, tmp_path):
    fails(4, "export", SOURCE, "--task", "task9", "-o", tmp_path / "out", says="it has: task0, task1")
    assert set(sent(hub)) == {"manifest.json"}


def test_a_repository_that_is_no_bundle_is_told(hub, family, tmp_path):
    hub.add("org/model", family.tasks["task0"])
    fails(4, "export", "hf://org/model", "--task", "task0", "-o", tmp_path / "out", says="no bundle at")


@pytest.mark.parametrize("change", ["missing", "cut", "manifest"])
def test_a_repository_that_is_not_whole_is_damage(change, hub, made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    name = max(files_of(made, "task2"), key=files_of(made, "task2").__getitem__)
    if change == "missing":
        (broken / name).unlink()
    elif change == "cut":
        (broken / name).write_bytes((broken / name).read_bytes()[:-1])
    else:
        text = (broken / "manifest.json").read_text()
        (broken / "manifest.json").write_text(text.replace("task2", "task8", 1))
    hub.add("org/broken", broken)
    fails(5, "export", "hf://org/broken", "--task", "task2", "-o", tmp_path / "out")
    assert set(hub.sent) == {"org/broken/manifest.json"}


def test_a_damaged_file_is_found_by_verify(hub, made, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    path = next(iter(sorted(broken.glob("weights/*"))))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    hub.add("org/broken", broken)
    done = flexmerge("inspect", "hf://org/broken", "--verify")
    assert done.code == 5
    assert path.name in done.out + done.err
