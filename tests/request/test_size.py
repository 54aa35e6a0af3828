import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.errors import UsageError
from flexmerge_cli.request.size import parse_bytes, parse_size


def size(text, num_tasks=8, one_model_bytes=1000):
    return parse_size(text).target(num_tasks=num_tasks, one_model_bytes=one_model_bytes)


@pytest.mark.parametrize(("text", "max_bytes", "on_disk"), [
    ("2.25x", 2250, False), ("0.5x", 500, False), ("1x", 1000, False), ("40%", 3200, False), ("0.1%", 8, False),
    ("600MiB", 600 << 20, True), ("6GB", 6e9, True), ("123456B", 123456, True), ("1.5KiB", 1536, True),
    ("1TB", 1e12, True), (" 2x ", 2000, False), ("2 x", 2000, False), ("+2x", 2000, False), ("0.5B", 0.5, True),
    ("900GB", 9e11, True),
])  # fmt: skip
def test_sizes_are_factors_percentages_or_bytes(text, max_bytes, on_disk):
    found = size(text)
    assert (found.max_bytes, found.on_disk) == (pytest.approx(max_bytes), on_disk)
    assert found.all_merges == (text == "1x")


@pytest.mark.parametrize("text", [
    "0x", "-1x", "-0x", "8.01x", "900x", "0%", "-1%", "100.1%", "0B", "-5MB", "abc", "", "x", "2", "2.x", ".5x", "1e1x",
    "nanx", "infx", "2xx", "2x 3x", "5 apples", "5iB", "5 M", "½x", "٣x", "2x\n3", "9" * 400 + "x",
])  # fmt: skip
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError) as raised:
        size(text)
    assert raised.value.hint


@pytest.mark.parametrize("text", ["3x", "3.0x", "100%", "100.0%"])
def test_the_full_size_is_no_limit(text):
    """Three models of 10, 12 and 12 bytes have a mean of 11 bytes: three times that is less than they take."""
    assert size(text, num_tasks=3, one_model_bytes=11).max_bytes == math.inf


def test_one_task_has_one_size():
    assert size("1x", num_tasks=1).all_merges
    assert size("0.5x", num_tasks=1).max_bytes == 500
    with pytest.raises(UsageError):
        size("1.01x", num_tasks=1)


@given(st.text())
def test_any_text_is_a_size_or_refused(text):
    try:
        assert size(text).max_bytes > 0
    except UsageError:
        pass
    try:
        assert parse_bytes(text) >= 0
    except UsageError:
        pass


@pytest.mark.parametrize(("text", "expected"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1B", 1), ("0.5KiB", 512)])
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["2x", "40%", "0B", "-1GB", "8", "GiB", "lots", "9" * 400 + "GB"])
def test_other_amounts_of_memory_are_refused(text):
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("1X", "1x"), ("2mb", "2MB"), ("2 Mib", "2MiB"), ("5KIB", "5KiB"), ("3kb", "3kB"), ("7b", "7B")]
)
def test_units_are_read_in_any_case(text, meant):
    assert parse_size(text) == parse_size(meant), "so that the same is recorded for both"


def test_memory_is_read_in_any_case():
    assert parse_bytes("8gib") == parse_bytes("8GiB") == 8 << 30
