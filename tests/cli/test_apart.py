"""No output is written over an input, into one, around one, or into any bundle: exit 2, whatever is forced."""

import shutil

import pytest

from flexmerge_cli import OrderSettings
from flexmerge_cli.errors import UsageError

from ..families import plain, write_family
from ..program import flexmerge, succeeds, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a family, its plan and recipe, a bundle and a spec. No test writes here."""
    root = tmp_path_factory.mktemp("apart")
    folders = write_family(root, plain(num_tasks=2))
    succeeds("plan", *folders.arguments, "-o", root / "plan.json")
    succeeds("merge", root / "plan.json", "-o", root / "bundle")
    shutil.copytree(root / "bundle", root / "other")
    tasks = ", ".join(f"{name}: tasks/{name}" for name in folders.tasks)
    (root / "recipe.yaml").write_text(f"version: 1\nbase: base\ntasks: {{{tasks}}}\n")
    (root / "rules.yaml").write_text("blocks: []\n")
    succeeds("eval", "--init", root / "bundle", "-o", root / "spec.yaml")
    return root


PLACES = {
    "plan": (
        ("plan", "--base", "base", "--tasks", "tasks", "--blocks", "rules.yaml", "-o"),
        ["base/model.safetensors", "base/plan.json", "tasks/task1/plan.json", "rules.yaml"],
    ),
    "plan of a recipe": (("plan", "recipe.yaml", "-o"), ["recipe.yaml", "base/p.json", "tasks/task0/p.json"]),
    "plan of a plan": (("plan", "plan.json", "--blocks", "layer", "-o"), ["plan.json"]),
    "merge": (
        ("merge", "plan.json", "-o"),
        ["plan.json", "base", "base/b", "tasks", "tasks/task1", "tasks/task1/b", "."],
    ),
    "merge of a recipe": (("merge", "recipe.yaml", "-o"), ["recipe.yaml", "base", "base/b", "tasks", "."]),
    "kept plan": (
        ("merge", "recipe.yaml", "-o", "bundle", "--force", "--plan"),
        ["recipe.yaml", "base/p.json", "tasks/task0/p.json", "bundle/p.json"],
    ),
    "export": (("export", "bundle", "--task", "task0", "-o"), ["bundle", "bundle/out", "bundle/tasks/task0", "."]),
    "export of all": (("export", "bundle", "--all", "-o"), ["bundle", "bundle/out", "."]),
    "page": (("inspect", "bundle", "--html"), ["bundle/manifest.json", "bundle/page.html"]),
    "page of a plan": (("inspect", "plan.json", "--html"), ["plan.json"]),
    "spec": (("eval", "--init", "bundle", "-o"), ["bundle/spec.yaml", "bundle/manifest.json"]),
} | {
    f"scores as {kind}": (
        ("eval", "bundle", "--spec", "spec.yaml", f"--{kind}"),
        ["spec.yaml", f"bundle/out.{kind}", "bundle/manifest.json"],
    )
    for kind in ("csv", "html")
} | {
    f"curve as {kind}": (
        ("curve", "plan.json", "--spec", "spec.yaml", f"--{kind}"),
        ["spec.yaml", "plan.json"],
    )
    for kind in ("csv", "html", "png")
}  # fmt: skip


IN_ANOTHER_BUNDLE = ["other/out", "other/tasks/out", "other/manifest.json/out"]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("output", PLACES)
def test_no_output_is_an_input_or_lies_in_or_around_one(output, force, made, monkeypatch):
    monkeypatch.chdir(made)
    arguments, places = PLACES[output]
    before = tree(made)
    for place in [*places, *IN_ANOTHER_BUNDLE]:
        for written in (place, made / place):
            result = flexmerge(*arguments, written, *force)
            assert result.code == 2 and "\nhint: " in result.err, (place, result.err)
    assert tree(made) == before


def test_a_link_to_an_input_is_that_input(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    (tmp_path / "link").symlink_to(made / "base")
    assert flexmerge("plan", "recipe.yaml", "-o", tmp_path / "link/plan.json").code == 2
    assert flexmerge("merge", "recipe.yaml", "-o", tmp_path / "link/b").code == 2


def test_python_writes_a_plan_over_no_input_no_bundle_and_no_other_file(made):
    from flexmerge_cli import make_plan

    before = tree(made)
    sources = {name: made / "tasks" / name for name in ("task0", "task1")}
    places = ["base/plan.json", "tasks/task1/model.safetensors", "rules.yaml", "other/plan.json", "recipe.yaml"]
    for place in places:
        order = OrderSettings(blocks=str(made / "rules.yaml"))
        with pytest.raises(UsageError, match=r"the output|is not a plan"):
            make_plan(made / "base", sources, output=made / place, order=order)
    assert tree(made) == before
