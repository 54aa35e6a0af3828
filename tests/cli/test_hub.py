"""`hf://` on the command line: what inspect, a dry run, plan and merge transfer, say and refuse."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..adapters import LORA, make
from ..families import Models, normal, plain, write_checkpoint, write_family
from ..program import Child, fails, flexmerge, succeeds, tree


@pytest.fixture
def published(hub, tmp_path):
    """Four tasks and their base as repositories; the same on this disk."""
    folders = write_family(tmp_path / "made", plain(), layout="shards")
    for name, folder in {"base": folders.base, **folders.tasks}.items():
        hub.add(f"org/{name}", folder)
    return folders


def remote(folders) -> list[str]:
    """The arguments of `plan`."""
    tasks = [argument for name in folders.tasks for argument in ("--task", f"{name}=hf://org/{name}")]
    return ["--base", "hf://org/base", *tasks]


@pytest.fixture
def recipe(published, tmp_path):
    path = tmp_path / "recipe.yaml"
    tasks = {name: f"hf://org/{name}" for name in published.tasks}
    path.write_text(json.dumps({"version": 1, "base": "hf://org/base", "tasks": tasks, "merge": {"method": "average"}}))
    return path


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def headers(folders) -> int:
    return sum(map(header_bytes, folders.root.rglob("*.safetensors")))


def weights(folders) -> int:
    return sum(path.stat().st_size for path in folders.root.rglob("*.safetensors"))


def test_inspect_and_a_dry_run_read_headers_and_no_weight(hub, published):
    shown = succeeds("inspect", "hf://org/task0", "--json").json
    local = succeeds("inspect", published.tasks["task0"], "--json").json
    assert {key: shown[key] for key in ("parameters", "bytes", "dtypes", "blocks", "side_files")} == {
        key: local[key] for key in ("parameters", "bytes", "dtypes", "blocks", "side_files")
    }
    assert shown["source"].startswith("hf://org/task0@")
    of_task = list(published.tasks["task0"].glob("*.safetensors"))
    assert hub.weights_sent() == sum(map(header_bytes, of_task))
    hub.forget()
    priced = succeeds("plan", *remote(published), "--dry-run", "--json").json
    assert hub.weights_sent() == headers(published)
    assert priced["fetch_bytes"] == weights(published)
    assert f"to download: {weights(published):,} bytes" in succeeds("plan", *remote(published), "--dry-run").out
    here = succeeds("plan", *published.arguments, "--dry-run", "--json").json
    # Not the bytes on disk: a manifest holds the names of its sources.
    for key in ("name", "served_bytes", "factor"):
        assert [way[key] for way in priced["options"]] == [way[key] for way in here["options"]]


def test_plan_and_merge_fetch_each_file_once_and_give_the_bytes_of_local_ones(hub, published, tmp_path):
    done = succeeds("plan", *remote(published), "-o", tmp_path / "plan.json")
    assert f"fetching {weights(published):,} bytes in 15 files from the Hub into {tmp_path / 'hub-cache'}" in done.err
    assert hub.weights_sent() == weights(published) + headers(published)
    plan = json.loads((tmp_path / "plan.json").read_text())
    commit = hub.repositories["org/task1"].branches["main"]
    assert plan["tasks"][1]["source"] == f"hf://org/task1@{commit}"
    hub.forget()
    merge = ["merge", tmp_path / "plan.json", "--method", "average", "--size", "2x"]
    succeeds(*merge, "-o", tmp_path / "bundle")
    assert hub.requests == [], "the plan names commits, and all of their files are here"
    succeeds("plan", *published.arguments, "-o", tmp_path / "local.json")
    succeeds("merge", tmp_path / "local.json", *merge[2:], "-o", tmp_path / "local")
    ours, local = tree(tmp_path / "bundle"), tree(tmp_path / "local")
    side_files = [name for name in ours if name.startswith("tasks/") and not (tmp_path / "bundle" / name).is_symlink()]
    assert side_files and all(ours[name] == local[name] for name in side_files)
    assert set(ours) == set(local)
    assert succeeds("inspect", tmp_path / "bundle", "--verify").code == 0


def test_merge_takes_the_commits_of_the_plan(hub, published, tmp_path):
    succeeds("plan", *remote(published), "-o", tmp_path / "plan.json", "-q")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "before", "-q")
    hub.add("org/task0", published.tasks["task1"])
    for path in (tmp_path / "hub-cache").rglob("*.safetensors"):
        path.unlink()
    for path in (tmp_path / "hub-cache").glob("*/blobs/*"):
        path.unlink()
    hub.forget()
    said = succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "after").err
    assert "fetching" in said
    assert tree(tmp_path / "before") == tree(tmp_path / "after")


def test_a_kept_plan_holds_until_a_branch_moves(hub, recipe, published, tmp_path):
    merge = ["merge", recipe, "--plan", tmp_path / "kept.json", "-q", "--force", "-o"]
    succeeds(*merge, tmp_path / "bundle")
    before = (tmp_path / "kept.json").read_bytes()
    succeeds(*merge, tmp_path / "bundle")
    assert (tmp_path / "kept.json").read_bytes() == before
    hub.add("org/task0", published.tasks["task1"])
    succeeds(*merge, tmp_path / "bundle")
    assert (tmp_path / "kept.json").read_bytes() != before


def test_offline_works_from_the_cache_and_says_what_it_needs(hub, published, recipe, tmp_path):
    for options in (["--offline"], ["--offline", "--dry-run"]):
        fails(4, "plan", recipe, *options, "-o", tmp_path / "plan.json", says="hf download")
    fails(4, "inspect", "hf://org/task0", "--offline", says="hf download org/task0")
    assert hub.requests == []
    succeeds("plan", recipe, "-o", tmp_path / "plan.json", "-q")
    hub.forget()
    succeeds("plan", recipe, "--offline", "-o", tmp_path / "again.json")
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    succeeds("merge", tmp_path / "plan.json", "--offline", "-o", tmp_path / "bundle")
    succeeds("merge", recipe, "--offline", "-o", tmp_path / "other")
    succeeds("inspect", "hf://org/task0", "--offline")
    assert hub.requests == []


def test_a_repository_with_a_folder_per_task(hub, published, tmp_path):
    (published.root / "tasks/notes").mkdir()
    (published.root / "tasks/notes/README.md").write_text("no checkpoint")
    commit = hub.add("org/all", published.root)
    given = ["--base", "hf://org/all:base", "--tasks", "hf://org/all:tasks"]
    said = succeeds("plan", *given, "-o", tmp_path / "plan.json").err
    assert "skipped in hf://org/all:tasks: notes (no model)" in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [task["source"] for task in plan["tasks"]] == [f"hf://org/all@{commit}:tasks/task{n}" for n in range(4)]
    hub.forget()
    succeeds("plan", *given, "--offline", "-o", tmp_path / "again.json")
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    assert hub.requests == []
    fails(4, "plan", "--base", "hf://org/base", "--tasks", "hf://org/task0", "--dry-run", says="no checkpoint in any")
    fails(2, "plan", "--base", "hf://org/base", "--tasks", "s3://x/y", "--dry-run", says="--task NAME=SOURCE")


def test_adapters_of_the_hub_are_those_of_the_disk(hub, tmp_path):
    made = make(tmp_path / "made", "llama", {"a": LORA(r=2), "b": LORA(r=4, target_modules=["q_proj"])})
    for name, folder in {"base": made.base, "a": made.tasks / "a", "b": made.tasks / "b"}.items():
        hub.add(f"org/{name}", folder)
    given = ["--base", "hf://org/base", "--task", "a=hf://org/a", "--task", "b=hf://org/b", "--assume-base"]
    local = ["--base", made.base, "--tasks", made.tasks]
    succeeds("plan", *given, "--dry-run")
    weights = [*made.base.glob("*.safetensors"), *made.tasks.rglob("*.safetensors")]
    assert hub.weights_sent() == sum(map(header_bytes, weights))
    for adapters in ("keep", "merge"):
        place = tmp_path / adapters
        succeeds("plan", *given, "--adapters", adapters, "-o", f"{place}.json")
        hub.forget()
        succeeds("merge", f"{place}.json", "-o", place)
        assert hub.requests == []
        succeeds("plan", *local, "--adapters", adapters, "-o", f"{place}-local.json")
        succeeds("merge", f"{place}-local.json", "-o", f"{place}-local")
        for bundle in (place, f"{place}-local"):
            succeeds("export", bundle, "--task", "a", "-o", f"{bundle}-a")
        ours, theirs = tree(tmp_path / f"{adapters}-a"), tree(tmp_path / f"{adapters}-local-a")
        assert set(ours) == set(theirs)
        assert [name for name in ours if name.endswith(".json") and ours[name] != theirs[name]] == []


def test_a_kept_adapter_of_a_bundle_on_the_hub_is_fetched_alone(hub, tmp_path):
    made = make(tmp_path / "made", "llama", {"a": LORA(r=2), "b": LORA(r=4, target_modules=["q_proj"])})
    succeeds("plan", "--base", made.base, "--tasks", made.tasks, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    hub.add("org/packed", tmp_path / "bundle")
    succeeds("export", "hf://org/packed", "--task", "a", "-o", tmp_path / "a")
    assert tree(tmp_path / "a") == tree(made.tasks / "a")
    assert not any("/b/" in path or path.endswith("/b.safetensors") for path in hub.sent)
    succeeds("export", "hf://org/packed", "--task", "a", "--merged", "-o", tmp_path / "merged")
    succeeds("export", tmp_path / "bundle", "--task", "a", "--merged", "-o", tmp_path / "local")
    assert tree(tmp_path / "merged") == tree(tmp_path / "local")
    assert succeeds("inspect", "hf://org/packed", "--json").json["kind"] == "bundle"


def test_every_source_that_cannot_be_had_is_named_at_once(hub, published, tmp_path):
    hub.repositories["org/task1"].gated = True
    hub.repositories["org/task2"].private = True
    arguments = [*remote(published), "--task", "task4=hf://org/task0@nowhere"]
    done = fails(4, "plan", *arguments, "-o", tmp_path / "plan.json")
    for word in ("org/task1", "is gated", "hf://org/task2: no such repository", "no revision `nowhere`"):
        assert word in done.err
    assert not any(path.endswith("safetensors") for path in hub.sent if "task1" in path or "task2" in path)


def test_a_family_that_does_not_fit_is_told_before_a_weight_is_fetched(hub, published, tmp_path):
    hub.add("org/odd", published.tasks["task0"].parent.parent / "odd") if False else None
    write_family(tmp_path / "odd", plain(num_tasks=1))
    small = {"other.weight": plain().base["pooler.dense.weight"]}

    write_checkpoint(tmp_path / "small", small)
    hub.add("org/small", tmp_path / "small")
    hub.forget()
    fails(3, "plan", *remote(published), "--task", "small=hf://org/small", "-o", tmp_path / "plan.json")
    assert hub.weights_sent() < weights(published) / 2


def test_errors_of_the_hub_are_one_document_with_json(hub):
    done = flexmerge("inspect", "hf://org/missing", "--json")
    assert done.code == 4
    assert done.json["error"]["exit_code"] == 4
    assert "hf auth login" in done.json["error"]["hint"]


def test_quiet_is_silent(hub, published, tmp_path):
    assert succeeds("plan", *remote(published), "-o", tmp_path / "plan.json", "-q").err == ""


@pytest.mark.slow
def test_a_process_of_its_own_is_driven_by_the_environment(hub, published, tmp_path):
    """Set what a user has: the endpoint, home and token of the environment."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_friend",
    }  # fmt: skip
    hub.tokens = {"hf_friend": {"org/task1"}}
    hub.repositories["org/task1"].gated = True
    program = [sys.executable, "-m", "flexmerge_cli"]
    arguments = ["plan", *remote(published), "-o", str(tmp_path / "plan.json")]
    done = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"into {tmp_path / 'home/hub'}" in done.stderr
    hub.forget()
    merge = ["merge", str(tmp_path / "plan.json"), "-o", str(tmp_path / "bundle")]
    done = subprocess.run(
        [*program, *merge], env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert hub.requests == []


def test_a_killed_run_is_gone_on_with(hub, tmp_path):
    made = Models(base={"a.weight": normal(0, 400, 500)}, tasks={"x": {"a.weight": normal(1, 400, 500)}})
    folders = write_family(tmp_path / "made", made)
    for name, folder in {"base": folders.base, **folders.tasks}.items():
        hub.add(f"org/{name}", folder)
    key = "org/x/model.safetensors"
    data = (folders.tasks["x"] / "model.safetensors").read_bytes()
    size, digest = len(data), hashlib.sha256(data).hexdigest()
    header = size - 400 * 500 * 4
    hub.pauses[key] = [0, 0, 60.0]  # of the header's two parts, and then in the middle of the weights
    child = Child("plan", *remote(folders), "-o", tmp_path / "plan.json")
    partial = tmp_path / "hub-cache/models--org--x/blobs" / f"{digest}.incomplete"
    base = tmp_path / "hub-cache/models--org--base/snapshots"
    while not (partial.exists() and partial.stat().st_size >= size // 3 and list(base.glob("*/*.safetensors"))):
        assert child.is_running()
    child.send(signal.SIGKILL)
    child.wait()
    there = partial.stat().st_size
    hub.forget()
    said = succeeds("plan", *remote(folders), "-o", tmp_path / "plan.json").err
    assert hub.sent[key] == header + size - there, "what was there was not fetched twice"
    assert f"({there:,} bytes of them are there already)" in said


def test_an_interrupted_run_ends_soon_and_keeps_what_it_has(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    made = Models(base={"a.weight": normal(0, 400, 500)}, tasks={"x": {"a.weight": normal(1, 400, 500)}})
    folders = write_family(tmp_path / "made", made)
    for name, folder in {"base": folders.base, **folders.tasks}.items():
        hub.add(f"org/{name}", folder)
    data = (folders.tasks["x"] / "model.safetensors").read_bytes()
    partial = tmp_path / "hub-cache/models--org--x/blobs" / f"{hashlib.sha256(data).hexdigest()}.incomplete"
    hub.pauses["org/x/model.safetensors"] = [0, 0, *[60.0] * 9]
    child = Child("plan", *remote(folders), "-o", tmp_path / "plan.json")
    while not (partial.exists() and partial.stat().st_size >= len(data) // 3):
        assert child.is_running()
    child.send(signal.SIGINT)
    code, printed = child.wait()
    assert code == 130 and "error" not in printed
    assert partial.stat().st_size >= len(data) // 3
    assert not (tmp_path / "plan.json").exists()


def test_sources_of_an_evaluation_are_fetched(hub, published):
    from ..evaluation.tiny import source_model

    ours = source_model("task0", "hf://org/task0")
    assert ours.digest == source_model("task0", str(published.tasks["task0"])).digest


def test_help_needs_neither_torch_nor_the_hubs_client():
    code = (
        "import sys; from flexmerge_cli.cli.app import run; run(['plan', '--help']); run(['--help'])\n"
        "sys.exit(bool({'torch', 'huggingface_hub', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_set_of_tasks_of_a_repository_does_not_change_in_silence(hub, published):
    """The base beside its fine-tunes, a folder without weights, and one that only holds a step of training."""
    hub.add("org/all", published.root)
    given = ["plan", "--base", "hf://org/all:base", "--tasks", "hf://org/all", "--dry-run", "--json"]
    fails(4, *given, says=("`tasks`", "look in task0/"))
    shutil.copytree(published.root / "tasks", published.root / "flat")
    shutil.copytree(published.root / "base", published.root / "flat/base")
    (published.root / "flat/broken").mkdir()
    (published.root / "flat/broken/config.json").write_text("{}")
    hub.add("org/flat", published.root / "flat")
    given = ["plan", "--base", "hf://org/flat:base", "--tasks", "hf://org/flat", "--dry-run", "--json"]
    fails(4, *given, says="`broken` holds config.json and no weights")
    found = succeeds(*given, "--ignore", "broken").json
    assert [task["name"] for task in found["tasks"]] == [f"task{n}" for n in range(4)]
    assert found["warnings"] == ["skipped in hf://org/flat: base (the base)"]
