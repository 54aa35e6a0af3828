"""docs/promises.md: every line names the tests that show it, and the numbers are those of the code."""

import ast
import importlib
import re
from functools import cache

import pytest

from .faults import COMMANDS, ERRORS
from .program import ROOT

TEXT = (ROOT / "docs/promises.md").read_text()
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "": 1}


def promises() -> list[str]:
    """The items of all lists but the table of contents."""
    return re.findall(r"^- (?!\[).*(?:\n  .*)*", TEXT, re.MULTILINE)


def named(text: str) -> list[tuple[str, str]]:
    """Tests as (file, name)."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_the_tests_that_show_it_and_they_exist():
    assert len(promises()) > 80
    assert [promise for promise in promises() if not named(promise)] == []
    assert [test for test in named(TEXT) if test[1] not in functions(test[0])] == []


def table(head: str) -> list[list[str]]:
    rows = re.search(rf"^\| {head} \|.*\n\|.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert rows, head
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]


@pytest.mark.parametrize("row", table("what"), ids=lambda row: row[2].strip("`"))
def test_bounds_are_those_of_the_code(row):
    number, _, unit = row[1].partition(" ")
    module, _, name = row[2].strip("`").rpartition(".")
    assert getattr(importlib.import_module(module), name) == int(number.replace(",", "")) * UNITS[unit]


def test_the_recorded_run_is_of_all_commands_and_found_nothing():
    rows = {row[0].strip("`"): [int(cell.replace(",", "")) for cell in row[1:]] for row in table("command")}
    assert set(rows) - {"all"} == set(COMMANDS)
    for calls, runs, *found in rows.values():
        assert runs == calls * (len(ERRORS) + 1) and found == [0, 0, 0, 0]
    assert rows["all"] == [sum(column) for column in zip(*(row for name, row in rows.items() if name != "all"))]
