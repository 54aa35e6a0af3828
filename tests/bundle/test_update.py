"""`flexmerge update`: the bundle that a merge of the new plan makes; what does not change is taken from the old one."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from flexmerge_cli import api, change_plan, diff, load_plan, update, updating
from flexmerge_cli.bundle import write
from flexmerge_cli.bundle.manifest_file import read_manifest
from flexmerge_cli.engine import product
from flexmerge_cli.errors import UsageError

from ..adapters import LORA
from ..adapters import make as make_adapters
from ..families import ODD, plain, write_checkpoint, write_family
from ..program import fails, succeeds, tree
from ..test_golden_bundles import METHODS
from .bundles import changed
from .test_format_1 import KEPT
from .test_resume import counted


def plans(root: Path, arguments, last: str) -> Path:
    """`all.json`, and `few.json` without the last task."""
    succeeds("plan", *arguments, "-o", root / "all.json", "-q")
    succeeds("plan", root / "all.json", "--remove", last, "-o", root / "few.json", "-q")
    return root


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Four tasks and, without the fourth, three, and their bundles of exact copies."""
    root = tmp_path_factory.mktemp("grown")
    folders = write_family(root, plain())
    plans(root, folders.arguments, "task3")
    for name in ("few", "all"):
        succeeds("merge", root / f"{name}.json", "-o", root / name, "-q")
    return root


def check_update(root: Path, options, out: Path, old: str, new: str) -> dict:
    """Update a bundle of plan `old` to plan `new`, and hold it against a merge; the command's `update`."""
    for name in {old, new}:
        succeeds("merge", root / f"{name}.json", *options, "-o", out / f"merged-{name}", "-q", "--force")
    result = succeeds("update", out / f"merged-{old}", "--plan", root / f"{new}.json", "-o", out / "new", "--json")
    assert tree(out / "new") == tree(out / f"merged-{new}")
    shutil.rmtree(out / "new")
    return result.json["update"]


@pytest.mark.parametrize("method", ["average-half", "auto", "bf16", "clusters", "emr", "ties-dare"])
def test_it_is_the_bundle_of_a_merge(method, grown, tmp_path):
    more = check_update(grown, METHODS[method], tmp_path, "few", "all")
    fewer = check_update(grown, METHODS[method], tmp_path, "all", "few")
    same = check_update(grown, METHODS[method], tmp_path, "all", "all")
    assert same["written_bytes"] == same["copied_bytes"] == 0 < same["kept_bytes"]
    has_kept = method != "ties-dare"  # which measures all tasks of the model
    assert all((found["kept_bytes"] + found["copied_bytes"] > 0) == has_kept for found in (more, fewer))


ODDITIES = {
    "heads": "bf16",
    "duplicates": "bf16",
    "resized_vocabulary": "low_bit-8",
    "tied": "auto",
    "reshaped": "average-half",
}


@pytest.mark.parametrize(("name", "method"), ODDITIES.items())
def test_so_it_is_of_families_with_heads_vocabularies_and_ties(name, method, tmp_path):
    folders = write_family(tmp_path, ODD[name]())
    plans(tmp_path, folders.arguments, list(folders.tasks)[-1])
    for old, new in (("few", "all"), ("all", "few")):
        assert check_update(tmp_path, METHODS[method], tmp_path, old, new)["kept_files"] >= 0


def test_so_it_is_where_groups_of_one_tensor_sum_their_errors_in_other_runs(tmp_path):
    folders = write_family(tmp_path, plain(width=24))  # rows of low_bit beside cast copies
    plans(tmp_path, folders.arguments, "task3")
    options = ("--method", "low_bit:bits=2", "--dtype", "bf16", "--merges", "14")
    for old, new in (("few", "all"), ("all", "few"), ("all", "all")):
        check_update(tmp_path, options, tmp_path, old, new)


def test_so_it_is_where_adapters_are_kept(tmp_path):
    adapters = {name: LORA(r=2, target_modules=["q_proj"]) for name in ("a", "b")}
    made = make_adapters(tmp_path / "made", "llama", adapters)
    plans(tmp_path, ("--base", made.base, "--tasks", made.tasks), "b")
    assert check_update(tmp_path, (), tmp_path, "few", "all")["written_bytes"] == 0  # the base lies there, under `all`
    assert check_update(tmp_path, (), tmp_path, "all", "few")["kept_files"] == 1


def test_only_what_is_new_is_read_and_files_that_stay_are_links(grown, tmp_path):
    of_new = (grown / "tasks/task3/model.safetensors").stat().st_size
    words = ("update", grown / "few", "--plan", grown / "all.json")
    result, count = counted(*words, "-o", tmp_path / "new")
    assert 0 < count <= of_new
    assert "weight files: kept 3 (" in result.out
    manifest = read_manifest(tmp_path / "new")
    kept = [path for path, file in manifest.files.items() if path.startswith("weights/") and "task3" not in file.tasks]
    assert kept and all((tmp_path / "new" / path).samefile(grown / "few" / path) for path in kept)
    side = "tasks/task0/vocab.txt"
    assert (tmp_path / "new" / side).samefile(grown / "few" / side)
    assert counted(*words[:-1], grown / "few.json", "-o", tmp_path / "same")[1] == 0


def test_a_group_that_stays_is_not_read_and_one_that_changes_is(grown, tmp_path):
    options = METHODS["average-half"]
    all_bytes = counted("merge", grown / "all.json", *options, "-o", tmp_path / "fresh")[1]
    succeeds("merge", grown / "few.json", *options, "-o", tmp_path / "old")
    count = counted("update", tmp_path / "old", "--plan", grown / "all.json", "-o", tmp_path / "new")[1]
    assert 0 < count < 0.8 * all_bytes
    assert tree(tmp_path / "new") == tree(tmp_path / "fresh")


def test_a_task_whose_weights_are_others_is_written_anew(grown, tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3))
    changed = {name: value + 0.01 for name, value in plain(num_tasks=3).tasks["task1"].items()}
    shutil.rmtree(tmp_path / "tasks/task1")
    write_checkpoint(tmp_path / "tasks/task1", changed)
    for name in ("vocab.txt", "config.json"):
        shutil.copy(grown / "tasks/task1" / name, tmp_path / "tasks/task1" / name)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "all.json")
    for method in ("exact", "average-half", "bf16"):
        out = tmp_path / method
        succeeds("merge", grown / "few.json", *METHODS[method], "-o", out / "old")
        succeeds("merge", tmp_path / "all.json", *METHODS[method], "-o", out / "fresh")
        succeeds("update", out / "old", "--plan", tmp_path / "all.json", "-o", out / "new")
        assert tree(out / "new") == tree(out / "fresh")


@pytest.mark.parametrize("method", ["average-half", "exact"])
def test_of_another_build_only_copies_are_taken_over(method, grown, tmp_path, monkeypatch):
    succeeds("merge", grown / "few.json", *METHODS[method], "-o", tmp_path / "old")
    monkeypatch.setattr(product.torch, "__version__", "9.9")
    found = check_update(grown, METHODS[method], tmp_path, "few", "all")
    again = succeeds("update", tmp_path / "old", "--plan", grown / "all.json", "-o", tmp_path / "new", "--json")
    assert tree(tmp_path / "new") == tree(tmp_path / "merged-all")
    assert (again.json["update"]["written_bytes"] > found["written_bytes"]) == (method != "exact")


def test_it_takes_the_place_of_the_old_one(grown, tmp_path):
    shutil.copytree(grown / "few", tmp_path / "b", symlinks=True)
    words = ("update", tmp_path / "b", "--plan", grown / "all.json", "-o", tmp_path / "b")
    fails(2, *words, says="exists")
    succeeds(*words, "--force")
    assert tree(tmp_path / "b") == tree(grown / "all") and [path.name for path in tmp_path.iterdir()] == ["b"]


def test_where_no_links_can_be_made_files_are_copied(grown, tmp_path, monkeypatch):
    def link(*_arguments, **_options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    succeeds("update", grown / "few", "--plan", grown / "all.json", "-o", tmp_path / "new")
    assert tree(tmp_path / "new") == tree(grown / "all")
    path = next(path for path in (tmp_path / "new/weights").iterdir() if path.name.startswith("task0"))
    assert not path.samefile(grown / "few/weights" / path.name)


def test_a_dry_run_tells_the_same_and_writes_nothing(grown, tmp_path):
    words = ("update", grown / "few", "--plan", grown / "all.json", "-o", tmp_path / "new", "--json")
    dry, count = counted(*words, "--dry-run")
    assert count == 0 and not (tmp_path / "new").exists()
    done = succeeds(*words)
    assert dry.json["update"] == done.json["update"] and dry.json["written"] is False
    told = dry.json["update"]
    assert sum(told[f"{word}_bytes"] for word in ("kept", "copied", "written")) == sum(
        path.stat().st_size for path in (tmp_path / "new/weights").iterdir()
    )


@pytest.mark.parametrize("method", ["exact", "average-half"])
def test_damaged_parts_are_found_and_nothing_is_written(method, grown, tmp_path):
    old = tmp_path / "old"
    succeeds("merge", grown / "few.json", *METHODS[method], "-o", old)
    words = ("update", old, "--plan", grown / "all.json", "-o", tmp_path / "new")
    path = max((old / "weights").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fails(5, *words, says=(path.name, "sha256 differs"))
    path.write_bytes(data[:-1])
    fails(5, *words, says=path.name)
    path.unlink()
    fails(5, *words, says="missing")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old"]


def test_what_does_not_belong_together_is_refused(grown, tmp_path):
    other = write_family(tmp_path / "other", ODD["small_shapes"]())
    succeeds("plan", "-q", *other.arguments, "-o", tmp_path / "other.json")
    out = ("-o", tmp_path / "new")
    fails(
        2, "update", grown / "few", "--plan", tmp_path / "other.json", *out, says=("another base", str(other.base.name))
    )
    tasks = [f"--remove=task{number}" for number in range(3)]
    succeeds("plan", "-q", grown / "all.json", *tasks, "-o", tmp_path / "last.json")
    fails(2, "update", grown / "few", "--plan", tmp_path / "last.json", *out, says=("has no task of", "task0, task1"))
    for folder in grown.glob("tasks/task?"):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / folder.name).symlink_to(folder)
    more = plain()
    write_checkpoint(tmp_path / "base", {name: value + 1 for name, value in more.base.items()})
    succeeds("plan", "-q", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "moved.json")
    fails(2, "update", grown / "few", "--plan", tmp_path / "moved.json", *out, says="another base")
    fails(2, "update", KEPT, "--plan", grown / "all.json", *out, says="does not record what it was made from")
    fails(4, "update", tmp_path, "--plan", grown / "all.json", *out, says="no bundle at")
    fails(4, "update", grown / "few", "--plan", tmp_path / "none.json", *out)
    fails(2, "update", grown / "few", "--plan", grown / "all.json", "-o", grown / "few/new", says="lies in the input")
    assert not (tmp_path / "new").exists()


def test_a_request_that_this_version_reads_otherwise_a_gate_a_calibration_and_a_router_are_refused(
    grown, tmp_path, monkeypatch
):
    words = ("update", grown / "few", "--plan", grown / "all.json", "-o", tmp_path / "new")
    manifest = read_manifest(grown / "few")
    gate = {
        "max_drop": "1pt",
        "spec": "0" * 64,
        "data": dict.fromkeys(manifest.tasks),
        "not_scored": [],
        "versions": {},
    }
    fields = json.loads((grown / "few/manifest.json").read_bytes()) | {"gate": gate}
    calibrated = json.loads((grown / "few/manifest.json").read_bytes()) | {"calibration": "0" * 64}
    routed = json.loads((grown / "few/manifest.json").read_bytes())
    names = list(manifest.tasks)
    routed["router"] = {"kind": "linear", "features": names[0], "tasks": names, "temperature": 1.0, "accuracy": 1.0}
    routed["router"] |= {"examples": dict.fromkeys(names, 5), "data": dict.fromkeys(names, "0" * 32)}
    routed["files"]["router/router.safetensors"] = {"bytes": 8, "sha256": "0" * 64, "tasks": []}
    cases = ((fields, "passed a gate"), (calibrated, "with a calibration"), (routed, "has a router"))
    for other, said in cases:
        with monkeypatch.context() as patch:
            found = type(manifest).model_validate(other)
            patch.setattr("flexmerge_cli.bundle.read.read_manifest", lambda _path, found=found: found)
            fails(2, *words, says=said)
    monkeypatch.setattr(updating, "merge_request", lambda **_words: updating.MergeRequest(dtype="BF16"))
    fails(2, *words, says="understands otherwise")


def test_python_has_the_same_verbs(grown, tmp_path):
    changed = change_plan(grown / "few.json", add={"task3": grown / "tasks/task3"}, output=tmp_path / "all.json")
    assert (tmp_path / "all.json").read_bytes() == plan_bytes(grown, tmp_path) and len(changed.tasks) == 4
    fewer = change_plan(tmp_path / "all.json", remove=["task3"], output=tmp_path / "few.json")
    assert [task.name for task in fewer.tasks] == ["task0", "task1", "task2"]
    opened = update(grown / "few", grown / "all.json", tmp_path / "new")
    assert opened.tasks == ("task0", "task1", "task2", "task3") and tree(tmp_path / "new") == tree(grown / "all")
    with pytest.raises(UsageError, match="exists"):
        update(tmp_path / "new", grown / "few.json", tmp_path / "new")
    update(tmp_path / "new", grown / "few.json", tmp_path / "new", force=True)
    assert diff(tmp_path / "new", grown / "few")["equal"]
    assert diff(grown / "few.json", grown / "all.json")["tasks"]["only_b"] == ["task3"]


def plan_bytes(root: Path, out: Path) -> bytes:
    """A plan of all tasks that is made anew beside `out`'s, whose sources are relative to it."""
    succeeds("plan", "--base", root / "base", "--tasks", root / "tasks", "-o", out / "fresh.json", "-q")
    return (out / "fresh.json").read_bytes()


def test_a_plan_with_a_rules_file_is_given_it_again(grown, tmp_path):
    settings = load_plan(grown / "few.json").settings.model_copy(update={"blocks": "rules"})
    with pytest.MonkeyPatch.context() as patch:
        found = load_plan(grown / "few.json").model_copy(update={"settings": settings})
        patch.setattr(api, "load_plan", lambda _path: found)
        with pytest.raises(UsageError, match="rules file"):
            change_plan(grown / "few.json", remove=["task0"], output=tmp_path / "other.json")


def without_fast_digests(fields):
    for entry in fields["files"].values():
        del entry["xxh3"]


def test_an_update_adds_the_fast_digests_that_an_old_bundle_lacks(grown, tmp_path):
    old = changed(grown / "few", tmp_path / "old", without_fast_digests)
    succeeds("update", old, "--plan", grown / "all.json", "-o", tmp_path / "new")
    assert tree(tmp_path / "new") == tree(grown / "all")


def test_damage_of_a_file_without_a_fast_digest_after_it_was_taken_over_is_found(grown, tmp_path, monkeypatch):
    old = changed(grown / "few", tmp_path / "old", without_fast_digests)
    link = write._link_old

    def damaged(unchanged, folder):
        link(unchanged, folder)
        path = old / next(iter(unchanged.files.values()))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(write, "_link_old", damaged)
    fails(5, "update", old, "--plan", grown / "all.json", "-o", tmp_path / "new", says="sha256 differs")
