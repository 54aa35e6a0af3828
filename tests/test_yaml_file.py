"""YAML of strangers: what it may hold, and that its time is in proportion to its size."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.registry import format_call, split_call
from flexmerge_cli.yaml_file import MAX_BYTES, MAX_DEPTH, load_bounded, read_document

from .hostile import SLOW_FILES

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text("ab1:-[]{},'\"#*&! \n", max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=9,
)


@settings(deadline=None, suppress_health_check=SLOW_FILES)
@given(PLAIN, st.booleans())
def test_plain_values_come_back_as_pyyaml_reads_them(value, flow):
    text = yaml.safe_dump(value, default_flow_style=flow)
    assert load_bounded(text) == yaml.safe_load(text) == value


@pytest.mark.parametrize("text", [
    "a: " + "[" * 5000 + "]" * 5000, "a: " + "{b: " * 5000 + "}" * 5000, "- " * 5000 + "x", "? " * 5000 + "x",
    "a: " + "[\n" * 5000 + "]\n" * 5000, "[" * 5000, "a: 1" + ":1" * 50000, "a: &b [1]\nc: *b", "a: &a [*a]",
    "9" * 400 + ": 1", "a: 1" + "0" * 5000, "a: !!bool maybe", "a: !!timestamp soon", "a: \x1b", "a: {b: *c}",
    "a: !!python/name:os.mkdir x", "[1]: 2", "a: 1\na: 2", "a: \ud800",
], ids=range(19))  # fmt: skip
def test_what_is_nested_endless_or_odd_is_refused_at_once(text, tmp_path):
    (tmp_path / "x.yaml").write_bytes(text.encode(errors="surrogatepass"))
    start = time.process_time()
    with pytest.raises(UsageError) as raised:
        read_document(tmp_path / "x.yaml", "recipe")
    assert time.process_time() - start < 2
    assert len(str(raised.value)) < 600


def test_brackets_in_text_and_comments_are_not_counted(tmp_path):
    text = f"a: '{'[' * 500}' # {'{' * 500}\nb: \"{'[' * 500}\"\nc: |\n  {'[' * 500}\n"
    (tmp_path / "x.yaml").write_text(text)
    assert read_document(tmp_path / "x.yaml", "recipe").value == yaml.safe_load(text)


def test_the_depth_that_is_allowed_is_allowed(tmp_path):
    for depth, fine in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False)):
        (tmp_path / "x.yaml").write_text("[" * depth + "]" * depth)
        if fine:
            read_document(tmp_path / "x.yaml", "recipe")
        else:
            with pytest.raises(UsageError, match="nested too deeply"):
                read_document(tmp_path / "x.yaml", "recipe")


def test_a_text_over_the_limit_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("a: " + "b" * MAX_BYTES)
    with pytest.raises(UsageError, match="larger than"):
        read_document(tmp_path / "x.yaml", "recipe")


@pytest.mark.parametrize(
    "value", ["\x1b", "{a: *b}", "*a", "[", "&a x", "!!int x", "1:1", "x" * 9, "a\nb", "!x", "%", "@"]
)
def test_an_argument_of_any_text_is_written_and_read_back(value):
    assert split_call(format_call("name", {"key": value})) == ("name", {"key": value})


@pytest.mark.parametrize("value", ["*a", "&a [*a]", "[" * 3000, "{a: *b}", "!!bool maybe", "\x1b", "1" * 5000])
def test_an_argument_that_is_no_plain_value_is_asked_wrongly(value):
    with pytest.raises(UsageError, match="not a valid YAML value"):
        split_call(f"ties:K={value}")
