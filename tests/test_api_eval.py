"""`evaluate` and `draw_curve` give what the command prints."""

import flexmerge_cli

from .evaluation.curves import digits
from .program import succeeds


def test_the_functions_give_what_the_command_prints(tmp_path):
    sample = digits(tmp_path)
    succeeds("merge", sample.plan_path, "--method", "average", "--size", "2x", "-o", tmp_path / "bundle")
    found = flexmerge_cli.evaluate(tmp_path / "bundle", sample.spec_path, plan=sample.plan_path, max_drop="1%")
    printed = succeeds(
        "eval", tmp_path / "bundle", "--plan", sample.plan_path, "--spec", sample.spec_path, "--json"
    ).json
    assert found["gate"]["outcome"] in ("fail", "undecided")
    assert {task: record["merged"] for task, record in found["tasks"].items()} == {
        task: record["merged"] for task, record in printed["tasks"].items()
    }
    curve = flexmerge_cli.draw_curve(sample.plan_path, sample.spec_path, methods="average", sizes="2x")
    assert {t: r["value"] for t, r in curve["points"][0]["tasks"].items()} == {
        task: record["merged"] for task, record in printed["tasks"].items()
    }
    arguments = [sample.plan_path, "--spec", sample.spec_path, "--method", "average", "--sizes", "2x"]
    assert succeeds("curve", *arguments, "--json").json["points"] == curve["points"]
