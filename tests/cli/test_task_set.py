"""The set of tasks never changes in silence: what lies in --tasks is a task, refused, or left out with a reason."""

import shutil

import pytest

from flexmerge_cli.request import recipe
from flexmerge_cli.request.tasks import found_tasks

from ..families import plain, write_family
from ..program import fails, succeeds


@pytest.fixture
def family(tmp_path):
    return write_family(tmp_path / "family", plain(num_tasks=2, layers=1))


def planned(*arguments):
    return succeeds("plan", *arguments, "--dry-run", "--json")


def names(result):
    return [task["name"] for task in result.json["tasks"]]


LEFTOVERS = [
    "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt",
    "preprocessor_config.json", "model.safetensors.index.json.bak/config.json", "checkpoint-100/trainer_state.json",
    "checkpoint-7/model.safetensors", "last/pytorch_model.bin", "model_index.json", "optimizer.bin/config.json",
]  # fmt: skip
LOOKS_LIKE_A_MODEL = [name for name in LEFTOVERS if ".bak/" not in name and "optimizer" not in name]


@pytest.mark.parametrize("inside", LOOKS_LIKE_A_MODEL)
def test_what_looks_like_a_model_and_has_no_weights_is_exit_4_unless_it_is_ignored(inside, family):
    broken = family.root / "tasks/broken" / inside
    broken.parent.mkdir(parents=True)
    broken.write_text("{}")
    error = fails(4, "plan", *family.arguments, "--dry-run", says=("`broken`", "--ignore broken"))
    assert inside.partition("/")[0] in error.err
    result = planned(*family.arguments, "--ignore", "broken")
    assert names(result) == ["task0", "task1"] and result.json["warnings"] == []


@pytest.mark.parametrize("inside", sorted(set(LEFTOVERS) - set(LOOKS_LIKE_A_MODEL)))
def test_what_does_not_is_left_out_with_a_warning_in_text_and_json(inside, family):
    other = family.root / "tasks/other" / inside
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (family.root / "tasks/notes.md").write_text("")
    result = planned(*family.arguments)
    said = f"skipped in {family.root / 'tasks'}: notes.md (a file), other (no model)"
    assert names(result) == ["task0", "task1"]
    assert result.json["warnings"] == [said] and f"warning: {said}\n" in result.err


def test_a_model_can_be_ignored_and_a_name_that_is_not_there_cannot(family):
    assert names(planned(*family.arguments, "--ignore", "task0")) == ["task1"]
    fails(2, "plan", *family.arguments, "--ignore", "tsak0", "--dry-run", says="no such subfolder")
    tasks = ["--task", f"a={family.tasks['task0']}"]
    fails(2, "plan", "--base", family.base, *tasks, "--ignore", "a", "--dry-run", says="no source has such a file")


@pytest.mark.parametrize("name", ["task0", "TASK0"])
def test_a_name_given_twice_is_exit_2(name, family):
    twice = ["--task", f"{name}={family.tasks['task1']}"]
    fails(2, "plan", *family.arguments, *twice, "--dry-run", says=("`task0`", f"`{name}`", "--ignore task0"))
    alone = ["--base", family.base, "--task", f"task0={family.tasks['task0']}", *twice]
    fails(2, "plan", *alone, "--dry-run", says="two tasks have the same name")
    assert names(planned(*family.arguments, "--ignore", "task0", *twice)) == sorted([name, "task1"])


@pytest.mark.parametrize("written", ["tasks/start", "tasks/../tasks/start/", "tasks/start/model.safetensors", "link"])
def test_the_base_in_the_folder_of_tasks_is_no_task(written, family, monkeypatch):
    shutil.move(family.base, family.root / "tasks/start")
    (family.root / "link").symlink_to(family.root / "tasks/start")
    monkeypatch.chdir(family.root)
    result = planned("--base", written, "--tasks", "tasks")
    assert names(result) == ["task0", "task1"]
    assert result.json["warnings"] == ["skipped in tasks: start (the base)"]
    explicitly = planned("--base", written, "--tasks", "tasks", "--task", "start=tasks/start")
    assert names(explicitly) == ["start", "task0", "task1"], "whoever says so gets it"


def test_one_model_under_two_names_is_told(family):
    (family.root / "tasks/again").symlink_to(family.tasks["task1"])
    (told,) = planned(*family.arguments).json["warnings"]
    assert told == f"tasks `again`, `task1` are the same model: {family.tasks['task1'].resolve()}"


def test_a_folder_with_nothing_but_unfinished_models_says_so(family):
    for task in family.tasks.values():
        (task / "model.safetensors").unlink()
        (task / "config.json").write_text("{}")
    fails(4, "plan", *family.arguments, "--dry-run", says=("`task0` holds config.json and no weights", "`task1`"))
    given = [word for name in family.tasks for word in ("--ignore", name)]
    fails(4, "plan", *family.arguments, *given, "--dry-run", says="no checkpoint in any subfolder")


@pytest.mark.parametrize("name", ["nowhere", "recipe.yaml"])
def test_a_folder_of_tasks_that_is_none_is_exit_4(name, family):
    (family.root / "recipe.yaml").write_text(f"version: 1\nbase: base\ntasks: {name}\n")
    where = family.root / name
    fails(4, "plan", "--base", family.base, "--tasks", where, "--dry-run", says=f"no folder {where}")
    fails(4, "merge", family.root / "recipe.yaml", "-o", family.root / "bundle", says=f"no folder {where}")


def test_the_folder_of_a_recipes_tasks_is_listed_once(family, monkeypatch):
    """It may be a repository of the Hub, and may change."""
    listed = []
    monkeypatch.setattr(recipe, "found_tasks", lambda *a, **more: listed.append(a) or found_tasks(*a, **more))
    (family.root / "recipe.yaml").write_text("version: 1\nbase: base\ntasks: tasks\n")
    succeeds("merge", family.root / "recipe.yaml", "-o", family.root / "bundle", "--dry-run")
    assert len(listed) == 1


def test_a_recipe_with_one_model_under_two_names_is_told_by_merge_too(family):
    path = family.root / "recipe.yaml"
    path.write_text("version: 1\nbase: base\ntasks: {a: tasks/task0, b: tasks/task0/, c: tasks/task1}\n")
    warnings = succeeds("merge", path, "-o", family.root / "bundle", "--dry-run", "--json").json["warnings"]
    assert f"tasks `a`, `b` are the same model: {family.tasks['task0'].resolve()}" in warnings
