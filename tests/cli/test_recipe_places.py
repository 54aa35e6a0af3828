"""Where the bundle of a recipe lies: in folders that are still to be made, and at an address."""

import json

import fsspec
import pytest

from ..families import plain, write_family
from ..program import succeeds, tree

RECIPE = "version: 1\nbase: base\ntasks: tasks\nmerge: {method: average, size: 2x}\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose sources are relative to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "models"
    write_family(root, plain())
    (root / "recipe.yaml").write_text(RECIPE)
    return root / "recipe.yaml"


def sources(manifest):
    return {name: task["source"] for name, task in json.loads(manifest)["tasks"].items()}


def test_the_folders_above_a_bundle_may_be_missing(recipe, tmp_path):
    """The sources of a recipe were looked for through a folder that is not there yet."""
    succeeds("merge", recipe, "-o", tmp_path / "bundle")
    succeeds("merge", recipe, "-o", tmp_path / "new" / "folders" / "bundle")
    found = tree(tmp_path / "new" / "folders" / "bundle")
    assert {name for name, data in tree(tmp_path / "bundle").items() if found[name] != data} == {"manifest.json"}
    assert sources(found["manifest.json"])["task1"] == "../../models/tasks/task1"
    (recipe.parent / "sizes.yaml").write_text(RECIPE.replace("size: 2x", 'sizes: "1.5x,2x"'))
    succeeds("merge", recipe.parent / "sizes.yaml", "-o", tmp_path / "sizes")
    assert sources((tmp_path / "sizes/2x/manifest.json").read_bytes())["task1"] == "../models/tasks/task1"


def test_the_sources_of_a_bundle_at_an_address_are_relative_to_the_recipe(recipe):
    """They were relative to a folder of this user's cache."""
    succeeds("merge", recipe, "-o", "memory://models/bundle")
    succeeds("merge", recipe, "-o", recipe.parent / "bundle")
    files = fsspec.filesystem("memory")
    sent = files.cat_file("/models/bundle/manifest.json")
    files.rm("/", recursive=True)
    assert sent == (recipe.parent / "bundle" / "manifest.json").read_bytes()
    assert sources(sent)["task1"] == "tasks/task1"
