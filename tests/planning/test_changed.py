"""`plan plan.json --add … --remove …`: the same bytes as a plan made anew, and only what is not known is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmerge_cli.checkpoint.reader import Reader

from ..adapters import LORA
from ..adapters import make as make_adapters
from ..families import ODD, normal, plain, write_family
from ..program import fails, flexmerge, succeeds
from ..test_vocabulary import WORDS
from ..test_vocabulary import family as write_vocabularies


def plan(base: Path, tasks: dict[str, Path], out: Path, *options: object) -> Path:
    words = [f"--task={name}={path}" for name, path in tasks.items()]
    succeeds("plan", "--base", base, *words, *options, "-o", out, "-q", "--force")
    return out


def change(source: Path, out: Path, *options: object) -> bytes:
    succeeds("plan", source, *options, "-o", out, "-q", "--force")
    return out.read_bytes()


def assert_equal_to_fresh(base: Path, tasks: dict[str, Path], root: Path, *options: object, of: str = "") -> None:
    """One task, else each, added to the others, and removed from all."""
    whole = plan(base, tasks, root / "all.json", *options)
    for name in [of] if of else tasks:
        fewer = plan(base, {n: p for n, p in tasks.items() if n != name}, root / "fewer.json", *options)
        assert change(fewer, root / "new.json", f"--add={name}={tasks[name]}") == whole.read_bytes(), name
        assert change(whole, root / "new.json", f"--remove={name}") == fewer.read_bytes(), name


FAMILIES = (
    "bf16_of_fp32", "mixed_dtypes", "buffers", "resized_vocabulary", "reshaped", "constants", "base_only",
    "duplicates", "zero_task", "small_shapes", "two_tasks", "private_only", "wrapped_tasks", "tied",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_added_and_removed_give_the_plan_of_a_fresh_start(name, tmp_path):
    folders = write_family(tmp_path, ODD[name]())
    chosen = dict(list(folders.tasks.items())[:3])
    assert_equal_to_fresh(folders.base, chosen, tmp_path, of=list(chosen)[len(name) % len(chosen)])


@pytest.mark.parametrize(
    "options", [("--statistics", "gram", "--similarity", "sign"), ("--merge-heads", "--private", "*query*")], ids=str
)
def test_settings_of_the_plan_hold_for_the_new_one(options, tmp_path):
    folders = write_family(tmp_path, ODD["heads"]())
    assert_equal_to_fresh(folders.base, folders.tasks, tmp_path, *options, of="task2")


@pytest.mark.parametrize("mode", ["keep", "merge", "pool"])
def test_adapters_are_added_and_removed(mode, tmp_path):
    configs = {name: LORA(r=2, target_modules=["q_proj", "v_proj"]) for name in ("a", "b", "c")}
    if mode != "pool":
        configs["c"] = LORA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    made = make_adapters(tmp_path, "llama", configs)
    tasks = {name: made.tasks / name for name in configs}
    if mode != "pool":
        tasks["full"] = made.full("full", 1)
    for name in ("a", "c"):
        assert_equal_to_fresh(made.base, tasks, tmp_path, "--adapters", mode, of=name)


def test_vocabularies_that_begin_or_cease_to_differ_are_read_again(tmp_path):
    words = {"base": WORDS, "a": WORDS, "b": [*WORDS, "more"], "c": [*WORDS[::-1], "other"]}
    write_vocabularies(tmp_path, words)
    assert_equal_to_fresh(tmp_path / "base", {name: tmp_path / "tasks" / name for name in "abc"}, tmp_path)


def test_from_another_folder_with_order_and_statistics_changed_at_once(tmp_path, monkeypatch):
    folders = write_family(tmp_path / "models", plain())
    three = dict(list(folders.tasks.items())[:3])
    (tmp_path / "plans").mkdir()
    old = plan(folders.base, three, tmp_path / "plans" / "old.json", "--statistics", "gram")
    order = ("--linkage", "average", "--blocks", "layer")
    fresh = plan(folders.base, folders.tasks, tmp_path / "fresh.json", *order)
    monkeypatch.chdir(tmp_path / "models" / "tasks")
    found = change(old, tmp_path / "new.json", "--add", "task3", *order, "--statistics", "all")
    assert found == fresh.read_bytes()
    del three["task0"]
    fresh = plan(folders.base, three | {"task0": folders.tasks["task3"]}, tmp_path / "fresh.json")
    found = change(old, tmp_path / "new.json", "--remove", "task0", "--add", "task0=task3", "--statistics", "all")
    assert found == fresh.read_bytes()


@pytest.mark.parametrize("then", ["", "split: [{match: output.dense, parts: 4}]"])
def test_rules_that_split_other_tensors_are_those_of_a_fresh_plan(then, tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3, width=16))
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(then)
    new.write_text("split: [{match: output.dense, parts: 4, dim: 1}]")
    two = {name: folders.tasks[name] for name in ("task0", "task2")}
    fewer = plan(folders.base, two, tmp_path / "old.json", *(("--blocks", old) if then else ()))
    fresh = plan(folders.base, folders.tasks, tmp_path / "fresh.json", "--blocks", new)
    added = f"--add=task1={folders.tasks['task1']}"
    assert change(fewer, tmp_path / "new.json", added, "--blocks", new) == fresh.read_bytes()


@pytest.fixture
def reads(monkeypatch):
    """File -> (offset -> bytes) of everything that is read of weights."""
    found: dict[Path, list[tuple[int, int]]] = {}
    read = Reader._pread

    def counted(self, path, descriptor, view, position):
        count = read(self, path, descriptor, view, position)
        found.setdefault(path, []).append((position, count))
        return count

    monkeypatch.setattr(Reader, "_pread", counted)
    return found


def num_read(reads, folder: Path) -> int:
    return sum(count for path, parts in reads.items() if folder in path.parents for _, count in parts)


def partly_frozen(root: Path):
    """Four tasks: a frozen embedding of most of the bytes, heads of their own, and layers that are trained."""
    models = plain()
    models.base["embeddings.word_embeddings.weight"] = normal(1, 400, 8)
    for number, task in enumerate(models.tasks.values()):
        task["embeddings.word_embeddings.weight"] = models.base["embeddings.word_embeddings.weight"].clone()
        task["classifier.weight"] = normal(number + 50, 300, 8)
    return write_family(root, models)


def test_of_old_tasks_what_is_compared_is_read_once_and_the_rest_not_at_all(tmp_path, reads):
    folders = partly_frozen(tmp_path)
    three = dict(list(folders.tasks.items())[:3])
    old = plan(folders.base, three, tmp_path / "old.json")
    reads.clear()
    change(old, tmp_path / "new.json", f"--add=task3={folders.tasks['task3']}")
    compared = sum(v.numel() * 4 for n, v in folders.models.base.items() if "word_embeddings" not in n)
    whole = sum(v.numel() * 4 for v in folders.models.tasks["task3"].values())
    for name in three:
        assert num_read(reads, folders.tasks[name]) == compared
    # The new task and the base once more for a look whether the change is of low rank.
    assert compared < num_read(reads, folders.base) < 1.1 * compared < whole / 5
    assert whole < num_read(reads, folders.tasks["task3"]) < 1.1 * whole
    reads.clear()
    change(tmp_path / "new.json", tmp_path / "fewer.json", "--remove=task3")
    assert [num_read(reads, folders.tasks[name]) for name in three] == [compared] * 3
    assert num_read(reads, folders.tasks["task3"]) == 0


def test_of_adapters_that_are_kept_only_the_new_one_is_read(tmp_path, reads):
    made = make_adapters(tmp_path, "llama", {name: LORA(r=2, target_modules=["q_proj"]) for name in ("a", "b")})
    old = plan(made.base, {"a": made.tasks / "a"}, tmp_path / "old.json")
    reads.clear()
    change(old, tmp_path / "new.json", f"--add=b={made.tasks / 'b'}")
    assert num_read(reads, made.tasks / "a") == 0
    assert 0 < num_read(reads, made.base) < (made.base / "model.safetensors").stat().st_size / 4
    reads.clear()
    change(tmp_path / "new.json", tmp_path / "fewer.json", "--remove=b")
    assert reads == {}


def test_what_is_asked_wrongly_is_refused(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=2))
    old = plan(folders.base, folders.tasks, tmp_path / "old.json")
    path, out = folders.tasks["task0"], tmp_path / "new.json"
    fails(2, "plan", old, "--remove", "task9", "-o", out, says=("no such task", "task0, task1"))
    fails(2, "plan", old, f"--add=task0={path}", "-o", out, says=("already", "--remove task0 --add task0="))
    fails(2, "plan", old, f"--add=Task0={path}", "-o", out, says=("already", "case is ignored"))
    fails(2, "plan", old, f"--add=a={path}", f"--add=A={path}", "-o", out, says="two tasks the name")
    fails(2, "plan", old, "--remove", "task0", "--remove", "task1", "-o", out, says="no task is left")
    fails(2, "plan", old, "--add", "=x", "-o", out, says="not of the form NAME=SOURCE")
    fails(2, "plan", old, "--remove", "task0", "--base", folders.base, "-o", out, says="already fixes its sources")
    fails(2, "plan", "--base", folders.base, "--add", f"a={path}", "-o", out, says="change a plan")
    fails(4, "plan", old, f"--add=a={tmp_path / 'none'}", "-o", out)
    fails(2, "plan", old, f"--add=a={path}", "-o", old, "--force", says="is the input")
    assert not out.exists()
    assert "same model" in flexmerge("plan", old, f"--add=a={path}", "--dry-run").err
    shown = succeeds("plan", old, f"--add=a={path}", "--remove=task1", "--dry-run", "--json").json
    assert [task["name"] for task in shown["tasks"]] == ["a", "task0"] and not out.exists()


@pytest.mark.parametrize("what", ["values", "header", "file", "base"])
def test_sources_that_have_changed_are_told(what, tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3))
    two = {name: folders.tasks[name] for name in ("task0", "task1")}
    old = plan(folders.base, two, tmp_path / "old.json")
    weights = (folders.base if what == "base" else folders.tasks["task1"]) / "model.safetensors"
    if what == "file":
        (folders.tasks["task1"] / "vocab.txt").write_text("other\n")
    elif what == "header":
        save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
    else:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    who = "the base" if what == "base" else "task `task1`"
    added = f"--add=task2={folders.tasks['task2']}"
    fails(3, "plan", old, added, "-o", tmp_path / "new.json", says=(who, "changed since the plan"))
    assert not (tmp_path / "new.json").exists()


def test_a_source_that_is_gone_need_not_be_there_to_be_removed(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3))
    old = plan(folders.base, folders.tasks, tmp_path / "old.json")
    shutil.rmtree(folders.tasks["task1"])
    fails(4, "plan", old, "--remove", "task0", "-o", tmp_path / "new.json", says="task1")
    change(old, tmp_path / "new.json", "--remove", "task1")
    assert [task["name"] for task in json.loads((tmp_path / "new.json").read_bytes())["tasks"]] == ["task0", "task2"]


def test_patterns_that_fitted_a_removed_task_are_no_error(tmp_path):
    folders = write_family(tmp_path, plain(num_tasks=3))
    torch.save({"x": torch.zeros(2)}, folders.tasks["task1"] / "strange.bin")
    old = plan(folders.base, folders.tasks, tmp_path / "old.json", "--ignore", "strange.bin")
    change(old, tmp_path / "new.json", "--remove", "task1")
