"""Gates: three outcomes by the paired bound, the examples that would decide, and how commands end by them."""

import hashlib
import json

import numpy as np
import pytest
import torch
import yaml

import flexmerge_cli
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.evaluation import running as scores
from flexmerge_cli.evaluation.gate import MEAN, Gate, Outcome, judge, parse_gate, parse_limit, require_pass
from flexmerge_cli.evaluation.resampling import mean_drops, parts_kept
from flexmerge_cli.evaluation.scored import Given, Scored
from flexmerge_cli.formats.manifest import Manifest

from ..program import fails, flexmerge, stored_sizes, succeeds
from .curves import DIGITS, TASKS, Digits, write_spec


def hits(n: int, share: float, *, lost: int = 0) -> Scored:
    """share of n right, the first ones; `lost` of these are wrong."""
    predictions = (np.arange(n) >= round(n * share)).astype(int)
    predictions[:lost] = 1
    return Scored(metric="accuracy", predictions=predictions, labels=np.zeros(n, int))


def outcome(merged: Scored, reference: Scored, limit: str) -> Outcome:
    return judge({"t": merged}, {"t": reference}, Gate(max_drop=parse_limit(limit, "--max-drop"))).outcome


@pytest.mark.parametrize(
    "n, lost, limit, expected",
    [
        (2000, 5, "2%", Outcome.PASS),
        (2000, 5, "2pt", Outcome.PASS),
        (2000, 200, "2%", Outcome.FAIL),
        (2000, 200, "2pt", Outcome.FAIL),
        (2000, 40, "2pt", Outcome.UNDECIDED),
        (30, 0, "1pt", Outcome.UNDECIDED),
        (30, 0, "50pt", Outcome.PASS),
    ],
)
def test_three_outcomes(n, lost, limit, expected):
    assert outcome(hits(n, 0.9, lost=lost), hits(n, 0.9), limit) is expected


def test_a_percentage_is_of_the_fine_tuned_score_and_points_are_of_the_metric():
    """14 of 2000 are 0.7 points, and 3.5 % of a score of 20 %."""
    merged, reference = hits(2000, 0.2, lost=14), hits(2000, 0.2)
    assert outcome(merged, reference, "1.5pt") is Outcome.PASS
    assert outcome(merged, reference, "1.5%") is Outcome.FAIL


def test_undecided_tells_examples_that_decide():
    merged, reference = hits(400, 0.9, lost=2), hits(400, 0.9)
    (task,) = judge({"t": merged}, {"t": reference}, parse_gate("1pt", None)).tasks
    assert task.outcome is Outcome.UNDECIDED and task.needed is not None and task.needed > 400
    times = -(-2 * task.needed // 400)
    assert outcome(hits(400 * times, 0.9, lost=2 * times), hits(400 * times, 0.9), "1pt") is Outcome.PASS
    assert "would decide" in task.message and f"{task.needed:,}" in task.message


def test_equal_weights_pass_with_any_number_of_examples():
    scored = hits(3, 0.9)
    assert judge({"t": scored}, {"t": scored}, parse_gate("0pt", None), {"t": True}).outcome is Outcome.PASS
    assert judge({"t": scored}, {"t": scored}, parse_gate("1pt", None)).outcome is Outcome.UNDECIDED


def test_an_infinite_bound_is_null_in_json():
    """The bound of one example was Infinity, which no JSON has."""
    one = Scored(metric="kl_divergence", predictions=np.array([[0.0, 1.0]]), labels=np.array([[1.0, 0.0]]))
    record = judge({"t": one}, {"t": one}, parse_gate("1%", None)).record()
    assert record["outcome"] == "undecided" and record["tasks"]["t"]["high"] is None
    json.dumps(record, allow_nan=False)


def test_a_number_from_outside_decides_nothing():
    given = Scored(metric="bleu", given=Given(value=0.9, n=100))
    verdict = judge({"t": given}, {"t": given}, parse_gate("1%", "1%"))
    assert [task.outcome for task in verdict.tasks] == [Outcome.UNDECIDED] * 2
    assert "external number" in verdict.message


def test_the_mean_may_pass_where_a_task_fails():
    merged = {"bad": hits(2000, 0.9, lost=60), "good": hits(2000, 0.9), "better": hits(2000, 0.95)}
    references = {task: hits(2000, 0.9) for task in merged}
    verdict = judge(merged, references, parse_gate("1%", "1%"))
    found = {task.name: task.outcome for task in verdict.tasks}
    assert found == {"bad": Outcome.FAIL, "good": Outcome.PASS, "better": Outcome.PASS, MEAN: Outcome.PASS}
    assert verdict.outcome is Outcome.FAIL
    with pytest.raises(GateError, match=r"bad: lost 3\.33%") as error:
        require_pass(verdict.record(), "bundle")
    assert "good" not in error.value.message and error.value.exit_code == 6


def test_perplexity_may_rise_by_a_part_of_it():
    rng = np.random.default_rng(0)
    likelihood, counts = rng.normal(-20, 2, 500), np.full(500, 10)
    reference = Scored(metric="perplexity", predictions=likelihood, labels=counts)
    assert (
        outcome(Scored(metric="perplexity", predictions=likelihood - 0.01, labels=counts), reference, "1%")
        is Outcome.PASS
    )
    assert (
        outcome(Scored(metric="perplexity", predictions=likelihood - 2.0, labels=counts), reference, "1%")
        is Outcome.FAIL
    )
    assert (
        outcome(Scored(metric="perplexity", predictions=likelihood + 2.0, labels=counts), reference, "1%")
        is Outcome.PASS
    )


def test_a_point_of_perplexity_is_one_of_its_units():
    """It was told a hundred times as large, and in the mean counted as a hundred."""
    rng = np.random.default_rng(0)
    likelihood, counts = rng.normal(-20, 0.1, 500), np.full(500, 10)
    reference = Scored(metric="perplexity", predictions=likelihood, labels=counts)
    merged = Scored(metric="perplexity", predictions=likelihood - 0.5, labels=counts)
    lost = merged.value - reference.value
    assert 0.3 < lost < 0.5
    verdict = judge({"t": merged}, {"t": reference}, parse_gate("0.5pt", "0.5pt"))
    assert verdict.outcome is Outcome.PASS
    assert [f"lost {lost:.2f}pt" in task.message for task in verdict.tasks] == [True, True]
    assert judge({"t": merged}, {"t": reference}, parse_gate("0.3pt", "0.3pt")).outcome is Outcome.FAIL


def test_resampled_means_surround_the_mean():
    merged = {"a": hits(500, 0.8), "b": hits(300, 0.6, lost=30)}
    references = {"a": hits(500, 0.9), "b": hits(300, 0.6)}
    drop, draws = mean_drops(merged, references, relative=True)
    kept, kept_draws = zip(*parts_kept(merged, references).values())
    assert np.mean(kept) == pytest.approx(1 - drop) and np.allclose(np.mean(kept_draws, axis=0), 1 - draws)
    assert drop == pytest.approx((1 / 9 + 1 / 6) / 2)
    assert np.quantile(draws, 0.025) < drop < np.quantile(draws, 0.975) and 0.005 < draws.std() < 0.03


@pytest.mark.parametrize("text", ["1", "-1%", "1 %%", "101%", "pt", "1e3%", "nan%"])
def test_limits_that_are_none_are_refused(text):
    with pytest.raises(UsageError):
        parse_limit(text, "--max-drop")


@pytest.fixture(scope="module")
def bundles(sample: Digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    succeeds("merge", sample.plan_path, "--method", "task_arithmetic", "--size", "1x", "-o", folder / "merged")
    succeeds("merge", sample.plan_path, "--method", "low_bit:bits=4", "-o", folder / "near")
    succeeds("merge", sample.plan_path, "-o", folder / "exact")
    return folder


@pytest.mark.parametrize(
    "bundle, limit, expected", [("exact", "0.1%", "pass"), ("merged", "5pt", "fail"), ("near", "0.1pt", "undecided")]
)
def test_a_bundle_passes_fails_or_is_undecided(sample, bundles, bundle, limit, expected):
    arguments = ["eval", bundles / bundle, "--plan", sample.plan_path, "--spec", sample.spec_path, "--max-drop", limit]
    result = flexmerge(*arguments)
    assert result.code == (0 if expected == "pass" else 6)
    assert "gate: pass" in result.out if expected == "pass" else f"{expected}: " in result.err
    as_json = flexmerge(*arguments, "--json")
    assert ("error" in as_json.json) == (expected != "pass") and as_json.json["tasks"]
    assert as_json.json["gate"]["outcome"] == expected and as_json.code == result.code
    if expected == "undecided":
        assert "would decide" in result.err


def test_a_curve_passes_where_some_point_does(sample):
    arguments = sample.drawn(method="average")
    assert (
        succeeds(*arguments, "--sizes", "1x,3x", "--max-drop", "1%")
        .out.rstrip()
        .splitlines()[-1]
        .startswith("gate: pass")
    )
    fails(6, *arguments, "--sizes", "1x", "--max-drop", "1%", says="rotation")


def test_a_gate_needs_a_fine_tuned_model_before_a_weight_is_read(sample, bundles, monkeypatch):
    def read(*_args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("flexmerge_cli.bundle.view.View.__getitem__", read)
    monkeypatch.setattr("flexmerge_cli.evaluation.models.StoredWeights.array", read)
    limit = ("--spec", sample.spec_path, "--max-drop", "1%")
    fails(2, "eval", bundles / "exact", *limit, says="fine-tuned")
    fails(2, "eval", "--sources", "--plan", sample.plan_path, *limit, says="--sources")


def recipe(sample: Digits, folder, *, size: str, limit: str, spec: str = "eval.yaml"):
    path = folder / "recipe.yaml"
    tasks = {task: str(DIGITS / "tasks" / task) for task in TASKS}
    fields = {
        "version": 1, "base": str(DIGITS / "base"), "tasks": tasks, "merge": {"method": "average", "size": size},
        "gate": {"spec": spec, "max_drop": limit},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(fields))
    write_spec(folder / "eval.yaml")
    return path


def test_a_recipe_publishes_what_passes(sample, tmp_path):
    succeeds("merge", recipe(sample, tmp_path, size="3x", limit="1%"), "-o", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def forgetful(spec, *, not_scored=()):
    """A spec that says nothing of `parity`, unless it is in not_scored."""
    fields = yaml.safe_load(spec.read_text())
    spec.write_text(yaml.safe_dump({**fields, "not_scored": list(not_scored)}))
    return spec


def test_a_gate_fails_where_the_spec_forgets_a_task(sample, bundles, tmp_path):
    """One of eight tasks was scored, and a bundle that had lost the others passed."""
    spec = forgetful(write_spec(tmp_path / "eval.yaml"))
    arguments = ["eval", bundles / "exact", "--plan", sample.plan_path, "--spec", spec]
    for limit in ("--max-drop", "--max-mean-drop"):
        fails(6, *arguments, limit, "100%", says=("parity", "not_scored: [parity]"))
    found = flexmerge(*arguments, "--max-drop", "1%", "--json")
    assert found.code == 6 and found.json["error"]["exit_code"] == 6
    assert found.json["gate"]["outcome"] == "fail" and found.json["gate"]["forgotten"] == ["parity"]
    assert {task["outcome"] for task in found.json["gate"]["tasks"].values()} == {"pass"}
    verdict = flexmerge_cli.evaluate(bundles / "exact", spec, plan=sample.plan_path, max_drop="1%")["gate"]
    assert verdict["outcome"] == "fail" and verdict["forgotten"] == ["parity"]
    fails(6, *sample.drawn(method="average", sizes="3x")[:3], spec, "--max-drop", "1%", says="parity")
    fails(6, *sample.drawn(method="average", sizes="3x")[:3], spec, "--choose", "0.1", says="parity")


def test_a_task_that_is_left_out_by_name_is_named_in_the_verdict(sample, bundles, tmp_path):
    spec = forgetful(write_spec(tmp_path / "eval.yaml"), not_scored=["parity"])
    arguments = ["eval", bundles / "exact", "--plan", sample.plan_path, "--spec", spec, "--max-drop", "1%"]
    found = succeeds(*arguments, "--json").json
    assert (found["gate"]["outcome"], found["gate"]["not_scored"], found["gate"]["forgotten"]) == (
        "pass",
        ["parity"],
        [],
    )
    assert "not scored: parity" in succeeds(*arguments).out


@pytest.mark.parametrize(
    "not_scored, said",
    [(["parety"], "did you mean `parity`?"), (["digit"], "is scored as well"), (["parity"] * 2, "twice")],
)
def test_what_is_left_out_is_a_task_of_the_bundle_and_not_scored(sample, bundles, tmp_path, not_scored, said):
    spec = forgetful(write_spec(tmp_path / "eval.yaml"), not_scored=not_scored)
    fails(2, "eval", bundles / "exact", "--plan", sample.plan_path, "--spec", spec, says=("not_scored.", said))


def test_a_recipe_that_forgets_a_task_is_refused_before_anything_is_read(sample, tmp_path, monkeypatch):
    path = recipe(sample, tmp_path, size="3x", limit="1%")
    forgetful(tmp_path / "eval.yaml")
    monkeypatch.setattr("flexmerge_cli.cli.packing.make_plan", None)
    fails(6, "merge", path, "-o", tmp_path / "bundle", says=("parity", "not_scored: [parity]"))
    assert flexmerge("merge", path, "-o", tmp_path / "bundle", "--json").json["gate"]["forgotten"] == ["parity"]


def test_a_recipes_gate_is_told_and_recorded(sample, tmp_path):
    """It left nothing on pass, and one string on fail."""
    path = recipe(sample, tmp_path, size="3x", limit="1%")
    found = succeeds("merge", path, "-o", tmp_path / "bundle", "--json").json
    spec = hashlib.sha256((tmp_path / "eval.yaml").read_bytes()).hexdigest()
    assert found["gate"]["outcome"] == "pass" and set(found["gate"]["tasks"]) == {"digit", "rotation"}
    evaluation = found["evaluation"]
    assert evaluation["spec"] == {"path": str(tmp_path / "eval.yaml"), "sha256": spec, "not_scored": ["parity"]}
    data = {task: record["data"] for task, record in evaluation["tasks"].items()}
    assert all(len(digest) == 32 for digest in data.values())
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())
    gate = manifest["gate"]
    assert gate.pop("versions")["torch"] == torch.__version__
    assert gate == {"max_drop": "1%", "spec": spec, "data": data, "not_scored": ["parity"]}
    on_disk = sum(stored_sizes(tmp_path / "bundle").values())
    assert found["total_bytes"] == on_disk
    shown = succeeds("inspect", tmp_path / "bundle")
    assert "passed its gate" in shown.out and spec[:16] in shown.out and "not scored: parity" in shown.out
    assert succeeds("inspect", tmp_path / "bundle", "--json").json["gate"]["data"] == data
    assert "sound" in succeeds("inspect", tmp_path / "bundle", "--verify").out
    out = succeeds("merge", path, "-o", tmp_path / "again").out
    assert "gate: pass" in out and spec in out and all(digest in out for digest in data.values())
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (tmp_path / "bundle" / "manifest.json").read_bytes()


def test_a_byte_target_counts_the_record_of_the_gate(sample, tmp_path):
    path = recipe(sample, tmp_path, size="3x", limit="100%")
    size = succeeds("merge", path, "-o", tmp_path / "bundle", "--json").json["total_bytes"]
    fields = yaml.safe_load(path.read_text())
    fields["merge"]["size"] = f"{size - 1}B"
    path.write_text(yaml.safe_dump(fields))
    smaller = succeeds("merge", path, "-o", tmp_path / "smaller", "--json").json
    on_disk = sum(stored_sizes(tmp_path / "smaller").values())
    assert smaller["total_bytes"] == on_disk < size


def test_without_a_gate_the_manifest_says_nothing_of_one(bundles):
    assert "gate" not in json.loads((bundles / "exact" / "manifest.json").read_bytes())


def test_a_manifest_whose_gate_forgets_a_task_is_unsound(sample, tmp_path):
    succeeds("merge", recipe(sample, tmp_path, size="3x", limit="1%"), "-o", tmp_path / "bundle")
    fields = json.loads((tmp_path / "bundle" / "manifest.json").read_bytes())
    Manifest.model_validate(fields)
    fields["gate"]["not_scored"] = []
    with pytest.raises(ValueError, match="gate"):
        Manifest.model_validate(fields)


def test_what_does_not_pass_is_told_whole(sample, tmp_path):
    path = recipe(sample, tmp_path, size="1x", limit="1%")
    found = flexmerge("merge", path, "-o", tmp_path / "bundle", "--json")
    assert found.code == 6 and found.json["error"]["exit_code"] == 6 and found.json["written"] is False
    assert found.json["gate"]["outcome"] == "fail" and found.json["gate"]["tasks"]["rotation"]["outcome"] == "fail"
    assert found.json["evaluation"]["tasks"]["rotation"]["merged"] is not None
    shown = fails(6, "merge", path, "-o", tmp_path / "bundle")
    assert "rotation: lost" in shown.out and "rotation" in shown.err


def test_data_that_change_while_the_bundle_is_made_are_told(sample, tmp_path, monkeypatch):
    """The manifest names the data that were there before: a score of others must not stand for them."""
    path = recipe(sample, tmp_path, size="3x", limit="1%")
    data = {task: tmp_path / f"{task}.npz" for task in ("digit", "rotation")}
    fields = yaml.safe_load((tmp_path / "eval.yaml").read_text())
    for task, place in data.items():
        place.write_bytes((DIGITS / f"test/{task}.npz").read_bytes())
        fields["tasks"][task]["data"] = str(place)
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(fields))
    opened = scores.Bundle.open

    def changed(*arguments, **options):
        with np.load(data["digit"]) as file:
            arrays = dict(file)
        arrays["labels"] = np.zeros_like(arrays["labels"])
        np.savez(data["digit"], **arrays)
        return opened(*arguments, **options)

    monkeypatch.setattr(scores.Bundle, "open", changed)
    fails(3, "merge", path, "-o", tmp_path / "bundle", says=("digit", "changed during the run"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("limit", ["1%", "27pt"])
def test_a_recipe_leaves_nothing_of_what_does_not_pass(sample, tmp_path, limit):
    """Failed, and undecided: neither a bundle nor a file beside it."""
    path = recipe(sample, tmp_path, size="1x", limit=limit)
    before = {file.name for file in tmp_path.iterdir()}
    fails(6, "merge", path, "-o", tmp_path / "bundle", says=("not published", "rotation"))
    assert {file.name for file in tmp_path.iterdir()} == before


def test_what_was_there_stays_where_the_new_bundle_does_not_pass(sample, tmp_path):
    succeeds("merge", recipe(sample, tmp_path, size="3x", limit="1%"), "-o", tmp_path / "bundle")
    manifest = (tmp_path / "bundle" / "manifest.json").read_bytes()
    fails(6, "merge", recipe(sample, tmp_path, size="1x", limit="1%"), "-o", tmp_path / "bundle", "--force")
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == manifest


def test_a_recipe_runs_no_code_of_its_spec(sample, tmp_path):
    path = recipe(sample, tmp_path, size="3x", limit="1%")
    task = {"kind": "python", "function": "os:getcwd"}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"version": 1, "tasks": {"digit": task}}))
    fails(2, "merge", path, "-o", tmp_path / "bundle", says="runs code")


@pytest.mark.parametrize("limit", ["many", "-1%"])
def test_a_gate_that_says_no_limit_is_refused_before_anything_is_read(sample, tmp_path, limit):
    fails(2, "merge", recipe(sample, tmp_path, size="3x", limit=limit), "-o", tmp_path / "bundle", says=limit)
