"""Curves drawn in memory against bundles that are written and scored one by one."""

import csv
import io
import shlex
from dataclasses import replace

import pytest

from flexmerge_cli import merge
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.curve import CurveCut
from flexmerge_cli.evaluation.curve_record import curve_record
from flexmerge_cli.evaluation.drawing import Drawing, cuts_of, draw
from flexmerge_cli.evaluation.evaluate import evaluate
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.evaluation.tidy import curve_csv
from flexmerge_cli.evaluation.tuning import tuned
from flexmerge_cli.request.curve import CurveRequest, curve_methods, parse_tune
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.size import parse_size, parse_sizes

from ..program import fails, stored_sizes, succeeds
from .curves import SCORED, Digits

METHODS = ("task_arithmetic", "emr", "low_bit:bits=2", "auto")


def asked(*methods, sizes=None, common=None, **fields):
    found = curve_methods(list(methods), has_statistics=True, **(common or {}))
    return CurveRequest(methods=found, sizes=parse_sizes(sizes) if sizes else (), threads=1, **fields)


@pytest.fixture(scope="module")
def request_() -> CurveRequest:
    return asked(*METHODS, sizes="1.2x,2.3x,2.8x")


@pytest.fixture(scope="module")
def curve(sample: Digits, request_):
    return draw(sample.plan, sample.plan_path, sample.spec, request_)


def test_moving_the_cut_scores_as_bundles_that_are_written_do(sample, curve, tmp_path):
    for number, point in enumerate(curve.points):
        size = point.sizes[0] if point.sizes else None
        path = tmp_path / str(number)
        merge(sample.plan_path, path, method=point.method, size=size)
        bundle = Bundle.open(path)
        found = evaluate(bundle, sample.spec)["tasks"]
        assert {task: scored.value for task, scored in point.scores.items()} == {
            task: record["merged"] for task, record in found.items()
        }
        for task in SCORED:
            assert point.digests[task] == found[task]["scores"]["merged"]["weights"]
        assert point.tensor_bytes == bundle.manifest.stored_bytes
        assert point.total_bytes == sum(stored_sizes(path).values())
    assert {point.method for point in curve.points} == set(METHODS)
    assert sum(bool(point.sizes) for point in curve.points) >= 9


def test_clusters_score_as_the_bundles_that_their_commands_write(sample, tmp_path):
    words = {"cluster": "channels", "seed": 3}
    found = draw(
        sample.plan,
        sample.plan_path,
        sample.spec,
        asked("average", "low_bit:bits=2", "auto", sizes="2x,3x", common=words, alternatives=False),
    )
    assert [(point.method, point.sizes) for point in found.points] == [
        ("average", ("3x",)),
        ("average", ("2x",)),
        ("low_bit:bits=2", ("3x",)),
        ("low_bit:bits=2", ("2x",)),
        ("auto", ("3x",)),
        ("auto", ("2x",)),
    ]
    for number, point in enumerate(found.points):
        command = shlex.split(point.command)
        assert ("--cluster" in command) == (point.method != "auto")
        path = tmp_path / str(number)
        succeeds(*command[1:-1], path)
        bundle = Bundle.open(path)
        assert dict(point.digests) == {task: bundle_model(bundle, task).digest for task in SCORED}
        assert point.total_bytes == sum(stored_sizes(path).values())


def test_an_argument_of_clustered_methods_is_tuned(sample):
    words = {"cluster": "channels"}
    request = asked("task_arithmetic", sizes="2x", common=words, alternatives=False)
    tune = parse_tune("scale=0.001,0.5", request.methods, **words)
    found = tuned(sample.plan, sample.plan_path, sample.spec, request, tune, on_score=lambda *_step: None)
    asked_for = found["task_arithmetic"].request.at(parse_size("2x"))
    assert asked_for == merge_request(method="task_arithmetic:scale=0.5", size="2x", **words)


def test_without_reuse_the_results_are_the_same_and_more_is_scored(sample, curve, request_):
    again = draw(sample.plan, sample.plan_path, sample.spec, replace(request_, reuse=False))
    assert again.counts["computed"] == again.num_evaluations == curve.num_evaluations
    assert curve.counts["computed"] + curve.counts["cached"] < curve.num_evaluations
    first, second = (curve_record(sample.plan, sample.spec, one) for one in (curve, again))
    assert first.pop("evaluations") != second.pop("evaluations")
    assert first == second


def test_a_task_is_scored_again_only_if_its_weights_changed(sample):
    """Two cuts that differ in one merge: the task that it leaves alone is known."""
    plan = sample.plan
    merges = plan.merges()
    number = next(n for n, merge in enumerate(merges) if not {0, 2} <= set(merge.left + merge.right))

    drawing = Drawing(plan=plan, plan_path=sample.plan_path, spec=sample.spec, request=asked("average"))
    cuts = [
        CurveCut(
            method="average",
            sizes=(str(n),),
            layout=allocate(plan, merge_request(method="average", merges=n), drawing.pricer),
            command="",
        )
        for n in (number, number + 1)
    ]
    scored = [point.num_computed for point in drawing.scorer.points(cuts)]
    touched = {0, 2} & set(merges[number].left + merges[number].right)
    assert scored[1] == len(touched) < len(SCORED)


def test_nothing_merged_is_the_fine_tuned_models_and_is_not_scored_again(sample):
    curve = draw(
        sample.plan, sample.plan_path, sample.spec,
        asked("ties", sizes="3x", alternatives=False),
    )  # fmt: skip
    (point,) = curve.points
    assert (point.num_computed, point.num_cached) == (0, 0)
    for task in SCORED:
        assert point.digests[task] == curve.models[task]["fine_tuned"].digest
        assert point.scores[task] is curve.fine_tuned[task]


def test_in_processes_the_results_are_the_same(sample, curve, request_, forked_workers):
    again = draw(
        sample.plan,
        sample.plan_path,
        sample.spec,
        replace(request_, parallel=2, methods=request_.methods[:2], alternatives=False),
    )
    one, two = (curve_record(sample.plan, sample.spec, found)["points"] for found in (curve, again))
    assert two == [point for point in one if point["method"] in METHODS[:2]]


def test_sizes_of_one_allocation_are_one_point(sample):
    request = asked("average", sizes="1x,1.001x,3x,100%")
    cuts, unreached = cuts_of(Pricer(sample.plan), request.sizes, request.methods[0], "plan.json")
    assert [cut.sizes for cut in cuts] == [("1x",), ("3x", "100%")]
    assert [item.size for item in unreached] == ["1.001x"]


def test_what_a_method_cannot_reach_is_told_and_its_own_size_is_there(sample, curve):
    unreached = {(item.method, item.size) for item in curve.unreached}
    assert ("emr", "1.2x") in unreached and ("auto", "1.2x") not in unreached
    own = [point.method for point in curve.points if not point.sizes]
    assert own == ["emr", "low_bit:bits=2"]


def test_commands_build_what_was_scored(sample):
    request = asked("ties", sizes="2.8x", common={"steps": ["dare:p=0.5"], "method_for": ["*.mlp=keep"]})
    cut = cuts_of(Pricer(sample.plan), request.sizes, request.methods[0], "my plan.json")[0][0]
    options = "--method ties --step dare:p=0.5 --method-for '*.mlp=keep' --size 2.8x"
    assert cut.command == f"flexmerge merge 'my plan.json' {options} -o bundle/"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.75x:1.5x:0.25x", ("0.75x", "1x", "1.25x", "1.5x")),
        ("1x:2.9x:1x", ("1x", "2x")),
        ("10%:30%:10%", ("10%", "20%", "30%")),
        ("1x, 600MiB,2x:2.2x:0.1x", ("1x", "600MiB", "2x", "2.1x", "2.2x")),
        ("1x,1x", ("1x",)),
    ],
)
def test_sizes_are_ranges_and_lists(text, expected):
    assert tuple(size.text for size in parse_sizes(text)) == expected


@pytest.mark.parametrize("text", ["", "1x:2x", "2x:1x:1x", "1x:2x:0x", "1x:2:1x", "0x:1x:1x", "x", "1x:8x:0.001x"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UsageError):
        parse_sizes(text)


def test_all_methods_are_every_one_and_auto(sample):
    found = [method.name for method in curve_methods(["all", "ties:K=0.1"], has_statistics=True)]
    assert found[0] == "auto" and {"emr", "low_bit", "tsv_m", "ties:K=0.1"} <= set(found)


def test_csv_has_a_row_per_point_and_task(sample, curve):
    record = curve_record(sample.plan, sample.spec, curve)
    rows = list(csv.DictReader(io.StringIO(curve_csv(record))))
    points = record["points"] + record["alternatives"]
    assert len(rows) == len(points) * len(SCORED)
    assert [float(row["value"]) for row in rows] == [
        point["tasks"][task]["value"] for point in points for task in SCORED
    ]
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)


def test_the_command_tells_what_was_saved(sample, tmp_path):
    arguments = sample.drawn(method="average", sizes="3x")
    result = succeeds(*arguments, "--csv", tmp_path / "rows.csv", "--json")
    assert result.json["evaluations"]["repeated"] >= 2
    assert (tmp_path / "rows.csv").read_text().startswith("method,")
    assert "reused from this run" in succeeds(*arguments).out


def test_the_three_counts_are_those_of_models_that_ran(sample, tmp_path, monkeypatch):
    """Counted where a kind runs a model: of a curve those of its points, of a bundle those of its references too."""
    ran: list[tuple[str, str]] = []
    plain = EvalSpec.kind

    def counted(spec, task):
        kind = plain(spec, task)

        def score(model, *arguments):
            ran.append((task, model.digest))
            return kind.score(model, *arguments)

        return replace(kind, score=score)

    monkeypatch.setattr(EvalSpec, "kind", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    merge(sample.plan_path, tmp_path / "bundle")  # copies: the merged models are the fine-tuned ones
    curve = [*sample.drawn(method="average", sizes="2x"), "--json"]
    bundle = ["eval", tmp_path / "bundle", "--plan", sample.plan_path, "--spec", sample.spec_path, "--json"]

    def counts(*arguments):
        ran.clear()
        return succeeds(*arguments).json["evaluations"]

    references = 2 * len(SCORED)
    first = counts(*curve)
    assert len(ran) == len(set(ran)) == first["computed"] + references and first["cached"] == 0
    assert first["asked"] == first["computed"] + first["repeated"] and first["repeated"] >= len(SCORED)
    assert counts(*curve) == first | {"computed": 0, "cached": first["computed"]} and not ran
    assert counts(*bundle) == {"computed": 0, "repeated": len(SCORED), "cached": references} and not ran
    again = counts(*curve, "--no-reuse")
    assert len(ran) == again["computed"] + references and again["computed"] == again["asked"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert counts(*bundle) == {"computed": references, "repeated": len(SCORED), "cached": 0}
    assert len(ran) == len(set(ran)) == references


def test_a_method_that_reaches_no_size_has_no_point_and_passes_no_gate(sample):
    """Its curve without a point ended in a KeyError."""
    arguments = sample.drawn(method="average")
    found = succeeds(*arguments, "--sizes", "0.5x", "--json").json
    assert found["points"] == [] and [item["size"] for item in found["unreached"]] == ["0.5x"]
    assert len(found["alternatives"]) == 3
    assert "average does not reach 0.5x" in succeeds(*arguments, "--sizes", "0.5x").out
    fails(6, *arguments, "--sizes", "0.5x", "--max-drop", "1%", says="no method reaches a size")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--method", "tiess"], "ties"),
        (["--sizes", "9x"], "9x"),
        (["--method-for", "ties"], "PATTERN=METHOD"),
        (["--method", "average", "--calibrate", "nothing"], "nothing"),
        (["--choose", "0"], "--choose 0.99"),
        (["--tune-spec", "x.yaml"], "--tune-spec needs --choose or --tune"),
        (["--csv", "x", "--html", "x"], "one file"),
        (["--sources"], "No such option: --sources"),
        (["--cluster", "channels"], "no --sizes is given"),
        (["--cluster", "channels", "--sizes", "2x,2.5x"], "--sizes 2.5x is not one"),
        (["--cluster", "channels", "--sizes", "2x", "--fit", "tight"], "--fit has no effect here"),
        (["--cluster", "channels", "--sizes", "2x", "--method", "tsv_m:scope=block"], "tsv_m"),
        (["--cluster", "channels", "--sizes", "2x", "--method", "auto"], "--cluster has no effect here"),
        (["--step", "dare", "--method", "auto"], "--step has no effect here"),
        (["--seed", "1"], "add --cluster channels"),
    ],
)
def test_what_is_asked_wrongly_is_refused(sample, arguments, says):
    fails(2, *sample.drawn(), *arguments, says=says)


def test_a_curve_needs_a_plan_and_a_spec(sample, tmp_path):
    fails(2, "curve", says="Missing argument")
    fails(2, "curve", sample.plan_path, says=f"hint: flexmerge curve {sample.plan_path} --spec eval.yaml")
    fails(4, "curve", tmp_path / "no.json", "--spec", sample.spec_path, says="no plan at")
    fails(2, "curve", tmp_path, "--spec", sample.spec_path, says=f"flexmerge eval {tmp_path} --spec {sample.spec_path}")


@pytest.mark.parametrize("plan", [["--plan", "PLAN"], ["--plan=PLAN"], ["PLAN"]])
def test_eval_says_the_curve_command_that_takes_what_it_was_given(sample, tmp_path, plan):
    """`eval --plan` drew curves once. Options keep their values and their order, quoted for a shell."""
    path = tmp_path / "my plan.json"
    path.write_bytes(sample.plan_path.read_bytes())
    plan = [word.replace("PLAN", str(path)) for word in plan]
    options = [
        "--spec",
        sample.spec_path,
        "--sizes",
        "1x,3x",
        "--method",
        "auto",
        "--method",
        "average",
        "--choose",
        "0.9",
    ]
    for arguments in ([*plan, *options], [*options, *plan]):
        said = fails(2, "eval", *arguments, says="hint: flexmerge curve ").err
        words = shlex.split(said.rpartition("hint: ")[2])
        assert words[:2] == ["flexmerge", "curve"] and str(path) in words
        assert [word for word in words[2:] if word != str(path)] == [str(option) for option in options]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "give a bundle, or --sources and --plan"),
        (["BUNDLE", "--plan", "PLAN", "--sizes", "1x"], "No such option: --sizes"),
        (["BUNDLE", "--choose", "0"], "No such option: --choose"),
        (["--sources", "--plan", "PLAN", "--threads", "2"], "No such option: --threads"),
        (["--plan", "PLAN", "--szies", "1x"], "No such option: --szies"),
    ],
)
def test_eval_has_no_option_that_a_curve_alone_reads(sample, arguments, says):
    words = [sample.plan_path if word == "PLAN" else word for word in arguments]
    said = fails(2, "eval", *words, "--spec", sample.spec_path, says=says).err
    assert "flexmerge curve" not in said
