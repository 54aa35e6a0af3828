"""Sources whose files are links into a store, as DVC and git-annex make them."""

import json

import pytest
from safetensors.torch import load_file

from ..families import Models, assert_same_state, normal, write_family
from ..program import fails, succeeds

BASE = {f"layers.{n}.weight": normal(n, 4, 4) for n in range(3)}


@pytest.fixture
def stored(tmp_path):
    """A family whose task has its files in a store outside."""
    task = {name: value + 0.1 for name, value in BASE.items()}
    folders = write_family(tmp_path, Models(base=BASE, tasks={"a": task}))
    (folders.tasks["a"] / "vocab.txt").write_text("[UNK]\n")
    store = tmp_path / "store"
    store.mkdir()
    for number, file in enumerate(sorted(folders.tasks["a"].iterdir())):
        file.rename(store / str(number))
        file.symlink_to(store / str(number))
    return folders


def test_links_into_a_store_are_refused_and_followed_where_that_is_asked_for(stored, tmp_path):
    plan = ("plan", *stored.arguments, "-o", tmp_path / "plan.json")
    assert "--follow-links" in fails(3, *plan, says="outside its folder").err
    succeeds(*plan, "--follow-links")
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["follow_links"] is True
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--task", "a", "-o", tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/vocab.txt").read_text() == "[UNK]\n"
    assert_same_state(load_file(tmp_path / "out/model.safetensors"), stored.models.tasks["a"])


def test_a_recipe_and_python_follow_links_too(stored, tmp_path):
    from flexmerge_cli import make_plan

    assert make_plan(stored.base, stored.tasks, follow_links=True).settings.follow_links
    recipe = {"version": 1, "base": str(stored.base), "tasks": stored.sources, "follow_links": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    succeeds("plan", tmp_path / "recipe.yaml", "-o", tmp_path / "plan.json")
    (tmp_path / "plan.json").unlink()
    succeeds("plan", tmp_path / "recipe.yaml", "--dry-run")


def test_a_link_whose_file_was_not_fetched_is_named(stored, tmp_path):
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    result = fails(4, "plan", "--base", stored.base, "--task", f"a={stored.tasks['a']}", "-o", tmp_path / "plan.json")
    assert "model.safetensors" in result.err and "leads nowhere" in result.err and "git annex get" in result.err
