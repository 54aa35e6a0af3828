"""Recipes as a stranger may write them: each is read or refused, never more."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.request.recipe import Recipe, read_recipe

TEXT = """version: 1
base: ./base
tasks: {sst2: ./ft/sst2, cola: {source: "hf://org/cola-model", revision: 3f2a}}
blocks: component
order: {linkage: complete, strategy: greedy, similarity: cosine}
private: ["*.norm.*"]
merge:
  method: "task_arithmetic:scale=1.5"
  steps: ["dare:p=0.5"]
  method_for: {"*.attention": "ties:K=0.2", "*.norm": keep}
  size: 2.25x
"""
KEYS = sorted({*Recipe.model_fields, "source", "revision", "method", "size", "steps", "calibrate", "linkage", "merges"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(KEYS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, inner, max_size=4),
    max_leaves=12,
)
PIECES = [
    "&a",
    "*a",
    "!!python/object/apply:os.system [id]",
    "{",
    "}",
    "]",
    ": ",
    "\n",
    "\t",
    "\0",
    "’",
    "- ",
    "<<: ",
    "1e999",
]


def outcome(text: str | bytes, path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    try:
        assert isinstance(read_recipe(path), Recipe)
    except FlexmergeError as error:
        assert str(error) and error.exit_code in (2, 3, 4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def test_the_text_that_is_changed_below_is_a_recipe(path):
    path.write_text(TEXT)
    assert read_recipe(path).task_sources()["cola"] == "hf://org/cola-model@3f2a"


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_recipe_with_something_put_in_or_left_out_is_read_or_refused(path, data):
    text = TEXT
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.sampled_from([0, 0, 1, 5, 40])))
        text = text[:start] + data.draw(st.sampled_from(PIECES) | st.text(max_size=4)) + text[stop:]
    outcome(text, path)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_structure_is_read_or_refused(path, value):
    outcome(yaml.safe_dump({"version": 1, "base": "base", "tasks": {"a": "a"}} | value), path)


@given(st.binary(max_size=60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(path, data):
    outcome(data, path)


def test_text_that_unfolds_without_end_is_refused(path):
    """Each line doubles the one before: 2^40 values from forty lines."""
    lines = ["version: 1", "base: b", "a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    path.write_text("\n".join([*lines, "tasks: {t: *a39}"]))
    with pytest.raises(UsageError):
        read_recipe(path)
