"""`--method` with a name that only mergekit has: what we have for it is done, and told on stderr."""

import json

import pytest

from flexmerge_cli import merge, open_bundle

from ..program import fails, succeeds, tree


def merged(plan, folder, *options):
    done = succeeds("merge", plan, "--size", "1x", "-o", folder, "--force", *options)
    (method,) = open_bundle(folder).manifest.methods
    return done, method


@pytest.mark.parametrize("name", ["dare_ties", "DARE-TIES"])
def test_a_name_is_resolved_and_the_message_says_what_to(name, plan, tmp_path):
    done, method = merged(plan, tmp_path / "b", "--method", name)
    assert "mergekit's `dare_ties` is `--method ties:K=1.0,merge=sum --step dare:rescale=l1` here" in done.err
    assert (method.name, method.args["K"], method.args["merge"]) == ("ties", 1.0, "sum")
    assert method.steps == ("dare:p=0.9,seed=0,rescale=l1",)
    merged(plan, tmp_path / "same", "--method", "ties:K=1.0,merge=sum", "--step", "dare:rescale=l1")
    assert tree(tmp_path / "b") == tree(tmp_path / "same")


def test_a_step_that_was_asked_for_takes_the_place_of_its_own(plan, tmp_path):
    options = ["--method", "dare_linear", "--step", "trim:K=0.5", "--step", "dare:p=0.2"]
    _, method = merged(plan, tmp_path / "b", *options)
    assert method.steps == ("trim:K=0.5,scope=model", "dare:p=0.2,seed=0,rescale=true")


def test_names_are_resolved_by_block_in_a_recipe_in_a_plan_and_in_python(family, plan, tmp_path):
    options = ["--method", "linear", "--method-for", "encoder.layer.0.*=dare_linear"]
    done = succeeds("merge", plan, "--size", "1x", *options, "-o", tmp_path / "b")
    assert "mergekit's `linear`" in done.err and "mergekit's `dare_linear`" in done.err
    assert [method.name for method in open_bundle(tmp_path / "b").manifest.methods] == ["average", "task_arithmetic"]
    recipe = tmp_path / "recipe.yaml"
    tasks = {name: str(path) for name, path in family.tasks.items()}
    recipe.write_text(
        json.dumps({"version": 1, "base": str(family.base), "tasks": tasks, "merge": {"method": "linear"}})
    )
    assert "mergekit's `linear`" in succeeds("merge", recipe, "-o", tmp_path / "of-recipe").err
    planned = succeeds("plan", plan, "-o", tmp_path / "plan.json", "--method", "linear", "--size", "1x", "--json")
    assert "mergekit's `linear`" in planned.err and planned.json["cut"]["merges"] > 0
    bundle = merge(plan, tmp_path / "python", method="dare_ties", size="1x")
    assert bundle.manifest.methods[0].steps == ("dare:p=0.9,seed=0,rescale=l1",)


def test_a_name_of_ours_stays_ours_and_nothing_is_told(plan, tmp_path):
    done, method = merged(plan, tmp_path / "b", "--method", "ties")
    assert "mergekit" not in done.err and method.args["K"] == 0.1
    assert "mergekit" not in merged(plan, tmp_path / "b", "--method", "linear", "-q")[0].err


def test_arguments_of_mergekit_are_refused_with_what_to_write(plan, tmp_path):
    fails(
        2,
        "merge",
        plan,
        "--method",
        "dare_ties:density=0.5",
        "-o",
        tmp_path / "b",
        says="density d becomes dare:p=1-d,rescale=l1",
    )
    fails(2, "merge", plan, "--method", "TIES", "-o", tmp_path / "b", says="did you mean `ties`?")


@pytest.mark.parametrize("command", [("methods",), ("merge", "--method")])
def test_a_method_that_is_not_here_is_explained(command, plan, tmp_path):
    name, *option = command
    words = (name, "AdaMerging") if not option else (name, plan, *option, "AdaMerging", "-o", tmp_path / "b")
    failed = fails(2, *words, says="no method `AdaMerging`: it is a method of `flexmerge tune`")
    assert "--method adamerging -o coefficients.json, then --method weighted_average:weights=@" in failed.err
