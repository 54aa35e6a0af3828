"""`diff`: what differs between two plans or two bundles, and the exit code."""

import json

import pytest
import torch

from flexmerge_cli import open_bundle
from flexmerge_cli.formats.plan_file import read_plan, save_plan, sealed_plan
from flexmerge_cli.report.diff import _groups

from ..families import plain, write_family
from ..program import fails, flexmerge, succeeds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Plans of four and of three tasks; bundles by average and by ties, and the former again."""
    root = tmp_path_factory.mktemp("diff")
    folders = write_family(root, plain())
    succeeds("plan", "-q", *folders.arguments, "-o", root / "plan.json")
    few = [f"--task={name}={folders.tasks[name]}" for name in ("task0", "task1", "task3")]
    succeeds("plan", "-q", "--base", folders.base, *few, "-o", root / "few.json")
    for name, method in {"average": "average", "again": "average", "ties": "ties"}.items():
        succeeds("merge", root / "plan.json", "--method", method, "--size", "2x", "-o", root / name)
    return root


def differences(a, b):
    result = flexmerge("diff", a, b, "--json")
    assert result.code == 7, result.err
    assert flexmerge("diff", a, b).code == 7
    assert flexmerge("diff", a, b, "-q").out == ""
    return result.json


def test_equal_plans_and_bundles_exit_with_0(made):
    for a, b in ((made / "plan.json", made / "plan.json"), (made / "average", made / "again")):
        assert succeeds("diff", a, b, "--json").json["equal"]
        assert "hold the same" in succeeds("diff", a, b).out


def test_the_version_that_made_a_plan_is_no_difference(made, tmp_path):
    plan = read_plan(made / "plan.json")
    save_plan(sealed_plan(plan.model_dump(mode="json", by_alias=True) | {"generator": "later"}), tmp_path / "p.json")
    value = succeeds("diff", made / "plan.json", tmp_path / "p.json", "--json").json
    assert value["a"]["sha256"] != value["b"]["sha256"] and value["equal"]


def test_plans_differ_in_tasks_sources_settings_and_merges(made, tmp_path):
    value = differences(made / "plan.json", made / "few.json")
    assert value["tasks"]["only_a"] == ["task2"] and value["tasks"]["only_b"] == []
    assert value["tasks"]["changed"] == {} and value["values"] == {}
    assert {len(a) - len(b) for a, b in value["blocks"].values()} == {1}
    succeeds("plan", "-q", made / "plan.json", "--linkage", "average", "-o", tmp_path / "average.json")
    value = differences(made / "plan.json", tmp_path / "average.json")
    assert value["settings"] == {"linkage": ["complete", "average"]}
    other = write_family(tmp_path, plain(torch.bfloat16))
    options = [f"--task={name}={path}" for name, path in other.tasks.items()]
    succeeds("plan", "-q", "--base", other.base, *options, "-o", tmp_path / "bf16.json")
    value = differences(made / "plan.json", tmp_path / "bf16.json")
    assert set(value["tasks"]["changed"]) == set(other.tasks)
    assert all({"weights", "bytes", "length"} <= set(pairs) for pairs in value["tasks"]["changed"].values())
    assert all(len(found["tensors"]) == found["of"] for found in value["values"].values())


def test_bundles_differ_in_methods_groups_bytes_and_distances(made):
    value = differences(made / "average", made / "ties")
    assert value["settings"]["methods"][0] == ["average"] and value["settings"]["methods"][1][0].startswith("ties:")
    for name, pairs in value["tasks"]["changed"].items():
        a, b = (json.loads((made / side / "manifest.json").read_text()) for side in ("average", "ties"))
        assert pairs["distance"] == [a["tasks"][name]["distance"], b["tasks"][name]["distance"]]
    groups = {tuple(tuple(group["tasks"]) for group in side) for pair in value["blocks"].values() for side in pair}
    assert all(sorted(task for group in found for task in group) == [f"task{n}" for n in range(4)] for found in groups)


def test_blocks_that_differ_in_bits_or_arguments_alone_are_shown_with_them(made, tmp_path):
    for name, method, size in (
        ("much", "auto:max_bits=4", ("--size", "1.5x")),
        ("little", "auto:max_bits=4", ("--size", "1x")),
        ("gauss", "low_bit:bits=2", ()),
        ("fitted", "low_bit:bits=2,levels=empirical", ()),
    ):
        succeeds("merge", made / "plan.json", "--method", method, *size, "-o", tmp_path / name)
    for a, b, shown in (("much", "little", ("task0:",)), ("gauss", "fitted", ("=gauss", "=empirical"))):
        value = differences(tmp_path / a, tmp_path / b)
        assert value["blocks"] and all(one != other for one, other in map(_groups, value["blocks"].values()))
        text = flexmerge("diff", tmp_path / a, tmp_path / b, "-v").out
        assert all(word in "".join(text.split()) for word in shown)


def test_the_tensors_that_are_named_are_those_whose_values_differ(made):
    value = differences(made / "average", made / "ties")
    a, b = open_bundle(made / "average"), open_bundle(made / "ties")
    for task in a.tasks:
        left, right = dict(a.view(task).items()), dict(b.view(task).items())
        expected = {name for name in left if not torch.equal(left[name], right[name])}
        assert set(value["values"].get(task, {"tensors": []})["tensors"]) == expected
        assert expected


def test_of_a_bundle_on_the_hub_the_manifest_is_read_and_nothing_else(made, hub):
    hub.add("org/bundle", made / "average")
    assert succeeds("diff", "hf://org/bundle", made / "again", "--json").json["equal"]
    assert [path.rpartition("/")[2] for path in hub.sent] == ["manifest.json"]


def test_what_cannot_be_compared_is_refused(made):
    fails(2, "diff", made / "plan.json", made / "average", says=("is a plan", "is a bundle"))
    fails(2, "diff", made / "base", made / "average", says="is a checkpoint")
    fails(4, "diff", made / "average", made / "none", says="no plan or bundle at")
