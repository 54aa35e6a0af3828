"""Choosing: the smallest that qualifies by its lower bound, on data that are not those reported."""

import numpy as np
import pytest
import yaml

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.choose import choose, halves
from flexmerge_cli.evaluation.curve import Point
from flexmerge_cli.evaluation.scored import Given, Scored
from flexmerge_cli.request.curve import curve_methods, parse_tune

from ..program import fails, flexmerge, succeeds
from .curves import DIGITS, write_spec

N = 600


def scored(lost: int, *, seed: int = 0, n: int = N) -> Scored:
    """90 % right, but for some that are lost, anywhere."""
    right = np.arange(n) < round(0.9 * n)
    wrong = np.random.default_rng(seed).permutation(round(0.9 * n))[:lost]
    right[wrong] = False
    order = np.random.default_rng(7).permutation(n)
    return Scored(metric="accuracy", predictions=np.where(right, 0, 1)[order], labels=np.zeros(n, int))


def point(num_bytes: int, *lost: int) -> Point:
    scores = {f"t{number}": scored(count, seed=number) for number, count in enumerate(lost)}
    return Point(
        method=f"m{num_bytes}", sizes=(), tensor_bytes=num_bytes, total_bytes=num_bytes + 10, merges=0, undone=0,
        command=f"flexmerge merge {num_bytes}", scores=scores, digests=dict.fromkeys(scores, ""), num_computed=0,
        num_cached=0,
    )  # fmt: skip


def chosen(points: list[Point], target: float, *, each: bool = False):
    reference = {task: scored(0) for task in points[0].scores}
    return choose([(one, *halves(one.scores)) for one in points], halves(reference), target, each=each, data="one half")


def test_the_smallest_that_qualifies_is_chosen():
    points = [point(400, 0, 0), point(100, 120, 120), point(200, 4, 4), point(300, 2, 2)]
    found = chosen(points, 0.95)
    assert found.qualifies and found.point.tensor_bytes == 200
    assert found.chosen_on.low >= 0.95 and found.chosen_on.n == N // 2


def test_what_qualifies_by_its_value_alone_is_not_chosen():
    """96 % is kept, and 95 % is not sure."""
    found = chosen([point(100, 24, 24), point(200, 0, 0)], 0.955)
    assert found.point.tensor_bytes == 200


def test_each_task_must_reach_it_where_asked():
    points = [point(100, 0, 60), point(200, 4, 4)]
    assert chosen(points, 0.92).point.tensor_bytes == 100
    assert chosen(points, 0.92, each=True).point.tensor_bytes == 200
    assert "every task" in chosen(points, 0.92, each=True).message


def test_none_that_qualifies_gives_the_best():
    found = chosen([point(100, 100, 100), point(200, 50, 50)], 0.99)
    assert not found.qualifies and found.point.tensor_bytes == 200 and "none" in found.message


def test_halves_share_no_example_and_leave_none_out():
    labels = np.arange(101)
    whole = Scored(metric="accuracy", predictions=labels, labels=labels)
    one, other = (half["t"].labels for half in halves({"t": whole}))
    assert sorted([*one, *other]) == labels.tolist() and abs(len(one) - len(other)) == 1
    again, _ = halves({"t": whole})
    assert (again["t"].labels == one).all() and set(one) != set(range(50))


@pytest.mark.parametrize(
    "whole",
    [
        Scored(metric="x", given=Given(value=1.0, n=5)),
        Scored(metric="accuracy", predictions=np.zeros(1), labels=np.zeros(1)),
    ],
)
def test_what_has_no_halves_is_refused(whole):
    with pytest.raises(UsageError):
        halves({"t": whole})


def test_the_command_prints_the_merge_that_builds_it(sample, tmp_path):
    arguments = sample.drawn(method="average")
    out = succeeds(*arguments, "--sizes", "1x,3x", "--choose", "0.9").out.rstrip().splitlines()[-1]
    words = out.split()
    assert words[:2] == ["flexmerge", "merge"] and words[-1] == "bundle/"
    succeeds(*words[1:-1], tmp_path / "bundle")
    found = flexmerge(*arguments, "--sizes", "1x,3x", "--choose", "1.5", "--json")
    assert found.code == 6 and found.json["chosen"]["qualifies"] is False


def validation(path, source: str):
    """Images of the test set that `source` takes, as a file of their own."""
    for task in ("digit", "rotation"):
        data = np.load(DIGITS / "test" / f"{task}.npz")
        rows = slice(100, 130) if source == "others" else slice(None)
        np.savez(path.parent / f"{task}.npz", images=data["images"][rows], labels=data["labels"][rows])
    write_spec(path)
    fields = yaml.safe_load(path.read_text())
    for task in fields["tasks"]:
        fields["tasks"][task]["data"] = f"{task}.npz"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_another_spec_chooses_and_the_whole_of_this_one_is_reported(sample, tmp_path):
    arguments = sample.drawn(method="average", sizes="3x")
    spec = validation(tmp_path / "val.yaml", "others")
    found = succeeds(*arguments, "--choose", "0.9", "--tune-spec", spec, "--json").json["chosen"]
    assert found["chosen_on"]["data"] == str(spec) and found["reported"]["n"] == 30


def test_tasks_of_the_other_spec_that_are_not_reported_decide_nothing(sample, tmp_path):
    """They were drawn, and counted among those that had to be kept."""
    arguments = [*sample.drawn(method="average", sizes="1x", choose="0.1"), "--tune-spec"]
    both = validation(tmp_path / "val.yaml", "others")
    one = yaml.safe_load(sample.spec_path.read_text())
    del one["tasks"]["rotation"]
    one["not_scored"].append("rotation")
    arguments[3] = tmp_path / "one.yaml"
    arguments[3].write_text(yaml.safe_dump(one))
    alone = yaml.safe_load(both.read_text())
    del alone["tasks"]["rotation"]
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    chosen = [succeeds(*arguments, spec, "--json").json["chosen"] for spec in (both, tmp_path / "alone.yaml")]
    for kept in ("value", "low", "worst"):
        assert chosen[0]["chosen_on"][kept] == chosen[1]["chosen_on"][kept]


def test_the_same_data_are_refused_under_another_path_too(sample, tmp_path):
    arguments = sample.drawn(method="average", choose="0.9")
    fails(2, *arguments, "--tune-spec", sample.spec_path, says="same data")
    spec = write_spec(tmp_path / "val.yaml")
    for task in ("digit", "rotation"):
        (tmp_path / f"{task}.npz").write_bytes((DIGITS / "test" / f"{task}.npz").read_bytes())
    spec.write_text(spec.read_text().replace(str(DIGITS / "test") + "/", ""))
    fails(2, *arguments, "--tune-spec", spec, says="same data")


def test_an_argument_is_tuned_on_other_data_and_marked(sample, tmp_path):
    arguments = sample.drawn(sizes="1x")
    spec = validation(tmp_path / "val.yaml", "others")
    words = [
        *arguments,
        "--method",
        "task_arithmetic",
        "--method",
        "auto",
        "--tune",
        "scale=0.01,1",
        "--tune-spec",
        spec,
    ]
    found = succeeds(*words, "--json", "--html", tmp_path / "page.html").json
    assert found["data_dependent"] == {"arguments": "task_arithmetic:scale=1", "spec": str(spec)}
    assert {point["method"] for point in found["points"]} == {"task_arithmetic:scale=1", "auto"}
    assert "Data-dependent" in (tmp_path / "page.html").read_text()
    fails(2, *arguments, "--tune", "scale=0.01,1", says="data other than those reported")
    fails(2, *arguments, "--tune", "scale=0.01,1", "--tune-spec", sample.spec_path, says="same data")
    fails(2, *arguments, "--method", "average", "--tune", "scale=0.01,1", "--tune-spec", spec, says="scale")


@pytest.mark.parametrize(
    "text",
    [
        "scale",
        "scale=",
        "=1,2",
        "scale=1",
        "scale=2:1:1",
        "scale=0:1:0",
        "scale=0:1000:1",
        "scale=a:b:c",
        "scale=0:nan:1",
    ],
)
def test_values_that_are_none_are_refused(text):
    with pytest.raises(UsageError):
        parse_tune(text, curve_methods("task_arithmetic", has_statistics=False))


def test_ranges_have_both_ends():
    tune = parse_tune("scale=0.5:1.5:0.25", curve_methods("task_arithmetic", has_statistics=False))
    assert list(tune.variants["task_arithmetic"]) == ["0.50", "0.75", "1.00", "1.25", "1.50"]
