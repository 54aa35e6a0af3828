"""The table of ways to store a family: each command is run as it is printed, and writes the bytes that are printed."""

import shlex

import pytest

from flexmerge_cli.allocation.options import COMMON, MEASURED, kept_by
from flexmerge_cli.methods.aliases import PRESETS
from flexmerge_cli.methods.registry import all_methods
from flexmerge_cli.request.merge import merge_request

from .. import adapters
from ..families import ODD, Models, encoder, tuned, write_family
from ..program import ROOT, fails, flexmerge, stored_sizes, succeeds, tree


def ways_of(*arguments):
    return {row["name"]: row for row in succeeds("plan", *arguments, "--json").json["options"]}


@pytest.mark.parametrize("name", ["plain", "small_shapes", "bf16"])
def test_every_command_builds_a_bundle_of_the_bytes_that_the_table_says(name, tmp_path, monkeypatch):
    family = write_family(tmp_path / "family of mine", ODD[name]())
    monkeypatch.chdir(tmp_path)
    plan = "family of mine/plan.json"
    rows = ways_of(*family.arguments, "-o", plan, *(["--all-methods"] * (name == "plain")))
    for row in rows.values():
        if row["command"] is None:
            continue
        program, *arguments = shlex.split(row["command"])
        assert program == "flexmerge"
        done = flexmerge(*arguments, "--force")
        assert done.code == 0, (row["command"], done.err)
        assert sum(stored_sizes(tmp_path / "bundle").values()) == row["disk_bytes"], row["name"]
    assert set(rows) >= {"copies as found", "exact deduplication", *COMMON}
    assert ("cast to bf16" in rows) == (name != "bf16"), "a cast that saves nothing is no way of its own"
    sizes = [row["disk_bytes"] for row in rows.values()]
    assert sizes == sorted(sizes)
    if name == "plain":
        assert set(rows) >= {name for name, method in all_methods().items() if not method.reads}  # a calibration


def test_bits_are_those_of_the_tensor_data_per_weight_and_task(plan, tmp_path):
    rows = ways_of(plan, "-o", tmp_path / "plan.json")
    for row in rows.values():
        part = row["factor"] / rows["copies as found"]["factor"]
        assert row["bits"] == pytest.approx(part * rows["copies as found"]["bits"])
    assert rows["residual-1bit"]["bits"] < rows["residual-2bit"]["bits"] < rows["copies as found"]["bits"]


def test_rows_larger_than_copies_as_found_are_left_out_and_named(plan, tmp_path):
    shown = succeeds("plan", plan, "-o", tmp_path / "plan.json")
    found = succeeds("plan", plan, "-o", tmp_path / "plan.json", "--force", "--json").json["options"]
    copies = next(row["disk_bytes"] for row in found if row["name"] == "copies as found")
    larger = [row["name"] for row in found if row["disk_bytes"] > copies]
    assert larger and [row["name"] for row in found if row["is_larger"]] == larger
    assert f"larger than copies as found: {', '.join(larger)}" in shown.out
    assert not [line for line in shown.out.splitlines() for name in larger if line.startswith(f" {name}")]


def test_the_row_to_begin_with_is_the_smallest_that_kept_what_matters(tmp_path):
    base = encoder(width=128)
    models = Models(base=base, tasks={name: tuned(base, seed) for seed, name in enumerate("abcd", 1)})
    plan = tmp_path / "first.json"
    succeeds("plan", *write_family(tmp_path / "family", models).arguments, "-o", plan)
    value = succeeds("plan", plan, "-o", tmp_path / "plan.json", "--json").json
    name, why = value["begin_with"]["name"], value["begin_with"]["why"]
    good = [row["name"] for row in value["options"] if row["kept"] and row["kept"][0] >= 99 and not row["is_larger"]]
    assert name == good[0]
    printed = succeeds("inspect", plan).out
    assert f" {name} *" in printed and f"* begin with {name}: {why}" in printed


def test_inspect_and_its_page_show_the_same_table(plan, tmp_path):
    planned = succeeds("plan", plan, "-o", tmp_path / "plan.json", "--json").json
    seen = succeeds("inspect", tmp_path / "plan.json", "--html", tmp_path / "page.html", "--json").json
    for key in ("options", "begin_with"):
        assert seen[key] == planned[key]
    page = (tmp_path / "page.html").read_text()
    for row in seen["options"]:
        assert row["is_larger"] or row["command"] is None or f"{row['disk_bytes']:,}" in page


def test_kept_adapters_count_their_base_in_copies_as_found(tmp_path):
    lora = {name: adapters.LORA(r=4, target_modules=["q_proj"]) for name in "ab"}
    adapters.make(tmp_path, "llama", lora)
    given = ("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    rows = {row["name"]: row for row in succeeds(*given, "--json").json["options"]}
    base = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert set(rows) == {"copies as found", "exact deduplication"}
    assert rows["copies as found"]["served_bytes"] > base - 10_000
    assert rows["copies as found"]["factor"] >= rows["exact deduplication"]["factor"]


def test_one_task_has_a_short_table(tmp_path):
    family = write_family(tmp_path, ODD["plain"]())
    task = next(iter(family.sources.items()))
    given = ("plan", "--base", family.base, "--task", "=".join(task), "-o", tmp_path / "plan.json")
    names = [row["name"] for row in succeeds(*given, "--json").json["options"]]
    assert {"copies as found", "exact deduplication", "cast to bf16"} <= set(names)
    assert not set(names) & set(COMMON) and len(names) < 8


def test_what_was_measured_stands_in_the_docs():
    docs = (ROOT / "docs" / "benchmarks.md").read_text().split("## What `plan` shows as kept")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in docs.splitlines() if line.startswith("| `")
    ]
    families = list(MEASURED["auto"])
    assert rows == [
        [name, *(", ".join(f"{kept} at {bits:g}" for bits, kept in of.get(family, ())) for family in families)]
        for name, of in MEASURED.items()
    ]


@pytest.mark.parametrize(
    ("bits", "kept"),
    [
        (0.3, None),
        (0.65, (74.5, 98.6)),
        (1.0, (98.7, 99.3)),
        (1.5, (98.8, 100.8)),
        (2.2, (99.8, 100.8)),
        (9.0, (99.8, 100.8)),
    ],
)
def test_auto_is_held_against_measurements_of_no_more_bits(bits, kept):
    assert kept_by("auto", bits) == kept
    assert kept_by("no such method", bits) is None


def test_a_preset_is_its_method_by_a_shorter_name(plan, tmp_path):
    for number, text in enumerate(("residual-2bit", "Residual_2bit", PRESETS["residual-2bit"])):
        done = succeeds("merge", plan, "--method", text, "-o", tmp_path / str(number))
        assert (PRESETS["residual-2bit"] in done.err) == (number < 2)
    assert tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "2")
    fails(2, "merge", plan, "--method", "residual-2bit:bits=3", "-o", tmp_path / "3", says=PRESETS["residual-2bit"])
    recipe = merge_request(method="residual-1bit")
    assert recipe == merge_request(method=PRESETS["residual-1bit"])


def test_commands_are_printed_whole_however_narrow_the_line(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    printed = succeeds("plan", plan, "-o", tmp_path / "plan.json").out
    for row in ways_of(plan, "-o", tmp_path / "plan.json", "--force").values():
        assert row["command"] is None or row["is_larger"] or f"{row['command']}\n" in printed


@pytest.mark.parametrize("method", ["average", "auto"])
@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_a_cast_is_hinted_at_only_where_it_saves(name, method, tmp_path):
    family = write_family(tmp_path / "family", ODD[name]())
    succeeds("plan", *family.arguments, "-o", tmp_path / "plan.json")
    asked = ("merge", tmp_path / "plan.json", "--method", method, "--size", "0.001x", "-o", tmp_path / "bundle")
    assert ("--dtype bf16" in fails(6, *asked, says="does not reach 0.001x").err) == (name == "plain")
    assert "--dtype bf16" not in fails(6, *asked, "--dtype", "bf16").err
