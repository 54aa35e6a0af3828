import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.text import holds_text, is_text, json_holds_text

LONE = [chr(0xD800), chr(0xDFFF), f"a{chr(0xDC80)}b"]


@given(st.text())
def test_text_without_nul_is_text_and_can_be_written(text):
    assert is_text(text) == ("\0" not in text)
    text.encode()


@pytest.mark.parametrize("text", ["\0", "a\0", *LONE])
def test_what_no_path_and_no_file_can_hold_is_none(text):
    assert not is_text(text)
    for value in (text, [text], {"a": text}, {text: 1}, {"a": [{"b": [1, text]}]}):
        assert not holds_text(value)


@pytest.mark.parametrize(
    "value", [None, 1, 0.5, True, "", "ä", "😀", [], {}, ["a", {"b": None}], json.loads('"\\ud83d\\ude00"')]
)
def test_all_else_is(value):
    assert holds_text(value)


@pytest.mark.parametrize("data", [
    b'{"a": "b"}', b'["\\u00e9"]', b'["\\ud800"]', b'{"\\u0000": 1}', b'["\xed\xa0\x80"]', '["é"]'.encode(),
    b'["a", {"b": "\\\\ud800"}]', '["\\ud800"]'.encode("utf-16"), '["plain"]'.encode("utf-32"), b'"\\\\u0000"',
])  # fmt: skip
def test_json_is_judged_by_its_bytes_as_by_its_value(data):
    value = json.loads(data)
    assert json_holds_text(data, value) == holds_text(value)
