"""Sources, plans and bundles that are elsewhere than they were, or are taken for one another."""

import shutil

import pytest

from .evaluation.curves import DIGITS, write_spec
from .families import ODD, write_family
from .program import fails, succeeds, tree


@pytest.fixture
def moved(tmp_path):
    """A folder with plan.json, whose sources have moved from `family` to `elsewhere/family`."""
    family = write_family(tmp_path / "family", ODD["two_tasks"]())
    succeeds("plan", *family.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "before")
    (tmp_path / "elsewhere").mkdir()
    family.root.rename(tmp_path / "elsewhere/family")
    return tmp_path


def test_the_hint_of_sources_that_moved_is_relocate_and_it_does(moved):
    merge = ("merge", moved / "plan.json", "-o", moved / "b")
    says = (
        "the plan's source family/base is missing",
        "source family/tasks/task1 is missing",
        "--relocate family/base=NEW",
    )
    fails(4, *merge, says=says)  # every source that is missing, at once
    succeeds(*merge, "--relocate", f"family={moved / 'elsewhere/family'}")
    assert tree(moved / "b") == tree(moved / "before")


def test_a_plan_that_moved_alone_is_told_where_it_looks(moved):
    (moved / "elsewhere/plan").mkdir()
    shutil.copy(moved / "plan.json", moved / "elsewhere/plan/plan.json")
    says = f"{moved / 'elsewhere/plan/family/base'} does not exist"
    fails(4, "merge", moved / "elsewhere/plan/plan.json", "-o", moved / "b", says=says)


def test_a_place_that_no_source_has_is_not_relocated_in_silence(moved):
    fails(2, "merge", moved / "plan.json", "-o", moved / "b", "--relocate", "famly=x", says="no source of the plan")


def test_a_curve_and_scores_of_sources_that_moved(tmp_path):
    """It is scored as those that did not move: --relocate is that of merge."""
    family = tmp_path / "family"
    for name in ("base", "tasks/digit", "tasks/rotation"):
        shutil.copytree(DIGITS / name, family / name)
    arguments = ("--base", family / "base", "--tasks", family / "tasks")
    succeeds("plan", *arguments, "-o", tmp_path / "plan.json")
    spec = write_spec(tmp_path / "eval.yaml", of=("digit", "rotation"))
    given = (tmp_path / "plan.json", "--spec", spec, "--no-reuse", "--json")
    drawn, scored = ("curve", *given, "--sizes", "1x"), ("eval", "--sources", "--plan", *given)
    wanted = [succeeds(*asked).json for asked in (drawn, scored)]
    family.rename(tmp_path / "elsewhere")
    fails(4, *drawn, says="--relocate")
    moved = ("--relocate", f"family={tmp_path / 'elsewhere'}")
    found = [succeeds(*asked, *moved).json for asked in (drawn, scored)]
    assert found == wanted
    fails(2, "eval", tmp_path / "b", "--spec", spec, *moved, says="--relocate is for the sources of --plan")
    fails(2, *drawn, "--relocate", "family", says="--relocate family is not of the form OLD=NEW")


@pytest.mark.parametrize("options", [("--method", "average", "--layout", "pointer"), ("--method", "emr")])
def test_a_task_of_a_bundle_without_weights_is_no_checkpoint_and_the_hint_exports_it(
    options, plan, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    succeeds("merge", plan, *options, "-o", "bundle")
    folder = "tasks" if "pointer" in options else "coded"
    done = fails(2, "inspect", f"bundle/{folder}/task0", says="is a task of a bundle")
    assert "hostile" not in done.err
    hint = done.err.split("hint: flexmerge ")[1].split()
    succeeds(*hint)
    succeeds("inspect", "task0")


def test_a_plan_or_nothing_is_no_bundle(plan, tmp_path):
    fails(4, "export", plan, "--task", "task0", "-o", tmp_path / "out", says="it is a file")
    fails(4, "export", tmp_path / "no", "--task", "task0", "-o", tmp_path / "out", says="it does not exist")
    fails(2, "eval", plan, "--spec", "eval.yaml", says=f"hint: flexmerge curve {plan} --spec eval.yaml\n")
