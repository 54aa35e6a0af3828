"""What people write for what is meant: it is taken as meant, or the hint says how it is written."""

import shutil

import pytest
import yaml

from ..families import plain, write_family
from ..program import fails, flexmerge, succeeds


@pytest.fixture
def family(tmp_path):
    return write_family(tmp_path / "family", plain(num_tasks=3, layers=1))


def tasks_of(*arguments):
    return [task["name"] for task in succeeds("plan", *arguments, "--dry-run", "--json").json["tasks"]]


def test_tasks_takes_all_words_that_follow(family):
    folders = list(family.tasks.values())
    assert tasks_of("--base", family.base, "--tasks", *folders) == ["task0", "task1", "task2"]
    assert tasks_of("--tasks", *folders[1:], "--base", family.base) == ["task1", "task2"]
    assert tasks_of("--base", family.base, "--tasks", folders[0], "--tasks", folders[2]) == ["task0", "task2"]


def test_several_folders_of_tasks_are_one_set_and_names_are_told_apart(family, tmp_path):
    shutil.copytree(family.tasks["task0"], tmp_path / "more" / "other")
    both = ("--base", family.base, "--tasks", family.root / "tasks", tmp_path / "more")
    assert tasks_of(*both) == ["other", "task0", "task1", "task2"]
    shutil.copytree(family.tasks["task1"], tmp_path / "more" / "Task1")
    error = fails(2, "plan", *both, "--dry-run", says=("two tasks have the same name", "--task NAME="))
    assert str(tmp_path / "more") in error.err
    assert tasks_of(*both, "--ignore", "Task1") == ["other", "task0", "task1", "task2"]


def test_a_task_without_a_name_is_called_as_its_folder(family):
    given = ("--task", family.tasks["task1"], "--task", f"{family.tasks['task2']}/")
    assert tasks_of("--base", family.base, *given) == ["task1", "task2"]
    file = family.tasks["task0"] / "model.safetensors"
    assert tasks_of("--base", family.base, *given, "--task", file) == ["task0", "task1", "task2"]


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/vit-base-patch16-224"])
def test_a_name_of_the_hub_is_no_path_and_the_hint_says_so(family, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ("--tasks", family.root / "tasks", "--dry-run")
    fails(4, "plan", "--base", name, *given, says=f"--base hf://{name}")
    error = fails(4, "plan", "--base", family.base, "--task", f"a={name}", "--dry-run", says=f"hf://{name}")
    assert f"--task a=hf://{name}" in error.err
    (tmp_path / name).mkdir(parents=True)
    assert "hf://" not in flexmerge("plan", "--base", name, *given).err, "there is such a folder"


def recipe(family, path, **more):
    path.write_text(yaml.safe_dump({"version": 1, "base": str(family.base), "tasks": "family/tasks", **more}))
    return path


def test_a_recipe_takes_a_folder_of_tasks_and_a_bare_number_as_size(family, tmp_path):
    made = recipe(family, tmp_path / "recipe.yaml", merge={"method": "average", "size": 1.5}, ignore=["task2"])
    assert tasks_of(made) == ["task0", "task1"]
    (tmp_path / "family/tasks/notes.txt").write_text("")
    value = succeeds("merge", made, "-o", tmp_path / "bundle", "--json").json
    assert value["request"]["size"] == "1.5x" and list(value["tasks"]) == ["task0", "task1"]
    assert any("notes.txt" in warning for warning in value["warnings"])
    whole = recipe(family, tmp_path / "whole.yaml", merge={"method": "average", "size": 2})
    assert succeeds("merge", whole, "-o", tmp_path / "two", "--json").json["request"]["size"] == "2x"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"merge": {"fit": "loose"}}, "`loose` is not one of 'tight' or 'prefix'"),
        ({"merge": {"merges": "many"}}, "merge.merges: `many` is not a whole number"),
        ({"merge": {"max_distance": -1}}, "`-1` is less than 0"),
        ({"merge": {"steps": "dare"}}, "merge.steps: `dare` is not a list"),
        ({"merge": []}, "merge: is not a mapping of keys to values"),
        ({"merge_heads": "maybe"}, "`maybe` is not true or false"),
        ({"tasks": {}}, "tasks: names no task"),
        ({"tasks": {"a": 3}}, "tasks.a"),
        ({"base": 5}, "base: `5` is not a text"),
    ],
)
def test_errors_of_a_recipe_are_in_our_words(family, tmp_path, more, says):
    error = fails(2, "plan", recipe(family, tmp_path / "recipe.yaml", **more), "--dry-run", says=says).err
    assert "Input should" not in error and "pydantic" not in error and ", line " in error


def test_a_quiet_plan_computes_nothing_to_show_and_still_refuses_a_size_out_of_reach(family, tmp_path, monkeypatch):
    fails(6, "plan", *family.arguments, "-o", tmp_path / "a.json", "--size", "0.1x", "-q", says="smallest")
    monkeypatch.setattr("flexmerge_cli.report.plan.plan_summary", None)
    succeeds("plan", *family.arguments, "-o", tmp_path / "b.json", "-q")


def test_quiet_prints_nothing_but_errors(family, tmp_path):
    plan = tmp_path / "plan.json"
    for arguments in (
        ("plan", *family.arguments, "-o", plan),
        ("merge", plan, "--method", "auto", "--size", "2x", "-o", tmp_path / "b"),
        ("inspect", plan),
        ("inspect", tmp_path / "b", "--verify"),
        ("export", tmp_path / "b", "--task", "task0", "-o", tmp_path / "task0"),
    ):
        done = succeeds(*arguments, "-q")
        assert (done.out, done.err) == ("", ""), arguments
    assert fails(2, "inspect", plan, "--verify", "-q").out == ""
    assert succeeds("inspect", plan, "-q", "--json").json["kind"] == "plan"


def test_plan_and_merge_write_the_page_of_what_they_made(family, tmp_path):
    plan, bundle = tmp_path / "plan.json", tmp_path / "b"
    succeeds("plan", *family.arguments, "-o", plan, "--html", tmp_path / "plan.html")
    succeeds("merge", plan, "-o", bundle, "--html", tmp_path / "bundle.html")
    for kind, source in (("plan", plan), ("bundle", bundle)):
        succeeds("inspect", source, "--html", tmp_path / "again.html", "--force")
        assert (tmp_path / f"{kind}.html").read_text() == (tmp_path / "again.html").read_text()
    fails(2, "plan", *family.arguments, "--dry-run", "--html", tmp_path / "x.html", says="--dry-run")
    fails(2, "merge", plan, "-o", tmp_path / "c", "--html", tmp_path / "plan.html", says="exists")
    assert not (tmp_path / "c").exists()
