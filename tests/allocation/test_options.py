"""The table of ways to store a family: each command is run as it is printed, and writes the bytes that are printed."""

import shlex

import pytest

from flexmerge_cli.allocation.options import COMMON
from flexmerge_cli.methods.registry import all_methods

from ..families import ODD, write_family
from ..program import fails, flexmerge, succeeds, tree


def ways_of(*arguments):
    return {row["name"]: row for row in succeeds("plan", *arguments, "--json").json["options"]}


@pytest.mark.parametrize("name", ["plain", "small_shapes", "bf16"])
def test_every_command_builds_a_bundle_of_the_bytes_that_the_table_says(name, tmp_path, monkeypatch):
    family = write_family(tmp_path / "family of mine", ODD[name]())
    monkeypatch.chdir(tmp_path)
    plan = "family of mine/plan.json"
    rows = ways_of(*family.arguments, "-o", plan, "--methods", "all" if name == "plain" else "common")
    for row in rows.values():
        if row["command"] is None:
            continue
        program, *arguments = shlex.split(row["command"])
        assert program == "flexmerge"
        done = flexmerge(*arguments, "--force")
        assert done.code == 0, (row["command"], done.err)
        assert sum(map(len, tree(tmp_path / "bundle").values())) == row["disk_bytes"], row["name"]
    assert set(rows) >= {"copies as found", "cast to bf16", "exact deduplication", *COMMON}
    if name == "plain":
        assert set(rows) >= set(all_methods())


def test_commands_are_printed_whole_however_narrow_the_line(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    printed = succeeds("plan", plan, "-o", tmp_path / "plan.json").out
    for row in ways_of(plan, "-o", tmp_path / "plan.json", "--force").values():
        assert row["command"] is None or f"{row['command']}\n" in printed


def test_ways_that_are_neither_common_nor_all_are_refused(plan, tmp_path):
    fails(2, "plan", plan, "-o", tmp_path / "plan.json", "--methods", "some", says="--methods some is not known")


@pytest.mark.parametrize("method", ["average", "auto"])
@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_a_cast_is_hinted_at_only_where_it_saves(name, method, tmp_path):
    family = write_family(tmp_path / "family", ODD[name]())
    succeeds("plan", *family.arguments, "-o", tmp_path / "plan.json")
    asked = ("merge", tmp_path / "plan.json", "--method", method, "--size", "0.001x", "-o", tmp_path / "bundle")
    assert ("--dtype bf16" in fails(6, *asked, says="does not reach 0.001x").err) == (name == "plain")
    assert "--dtype bf16" not in fails(6, *asked, "--dtype", "bf16").err
