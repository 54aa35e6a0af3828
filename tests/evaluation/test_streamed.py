"""`curve --stream` and `eval --stream`: the scores of sources on this disk, and no weight of a source is stored."""

import pickle
from pathlib import Path

import pytest

from flexmerge_cli.evaluation import running

from ..program import Result, succeeds
from .curves import DIGITS, TASKS, Digits


@pytest.fixture
def remote(hub, tmp_path) -> Path:
    """A plan of the digits on the Hub."""
    for name, folder in {"base": DIGITS / "base", **{task: DIGITS / "tasks" / task for task in TASKS}}.items():
        hub.add(f"org/{name}", folder)
    sources = [word for task in TASKS for word in ("--task", f"{task}=hf://org/{task}")]
    succeeds("plan", "--base", "hf://org/base", *sources, "--stream", "-o", tmp_path / "plan.json")
    hub.forget()
    return tmp_path / "plan.json"


def scores(result: Result) -> object:
    """What was scored and how, without the plan and the counts."""
    document = result.json
    points = [
        {key: point[key] for key in ("method", "bytes", "tasks", "mean")}
        for point in (*document.get("points", ()), *document.get("alternatives", ()))
    ]
    return document["tasks"], document["mean"], points


def stored(folder: Path) -> list[str]:
    """The repositories of which a file of weights is in the Hub's cache."""
    found = [path for path in (folder / "hub-cache").rglob("*") if path.suffix == ".safetensors"]
    return sorted({path.relative_to(folder / "hub-cache").parts[0] for path in found})


def test_a_curve_of_streamed_sources_is_that_of_files(hub, sample: Digits, remote, tmp_path):
    options = ["--spec", sample.spec_path, "--sizes", "1.5x,3x", "--method", "average", "--method", "low_bit", "--json"]
    local = scores(succeeds("curve", sample.plan_path, *options))
    assert scores(succeeds("curve", remote, *options, "--stream", "--no-reuse")) == local
    assert hub.weights_sent() > 0 and stored(tmp_path) == []


def test_processes_stream_too(hub, sample: Digits, remote, tmp_path, monkeypatch):
    """With what another process would get, in this one: starting two that import torch takes 20 seconds."""

    def here(prepare, jobs, **_options):
        work = pickle.loads(pickle.dumps(prepare))()
        return [work(job) for job in jobs]

    monkeypatch.setattr(running, "in_processes", here)
    options = ["--sources", "--spec", sample.spec_path, "--json"]
    local = scores(succeeds("eval", "--plan", sample.plan_path, *options))
    again = succeeds("eval", "--plan", remote, *options, "--stream", "--parallel", 2, "--no-reuse")
    assert scores(again) == local
    assert hub.weights_sent() > 0 and stored(tmp_path) == []


def test_a_bundle_of_the_hub_is_fetched_and_what_it_is_compared_with_is_streamed(hub, sample: Digits, remote, tmp_path):
    succeeds("merge", sample.plan_path, "--method", "average", "--size", "2x", "-o", tmp_path / "bundle")
    hub.add("org/bundle", tmp_path / "bundle")
    options = ["--spec", sample.spec_path, "--max-drop", "100%", "--json"]
    local = scores(succeeds("eval", tmp_path / "bundle", "--plan", sample.plan_path, *options))
    again = succeeds("eval", "hf://org/bundle", "--plan", remote, *options, "--stream", "--no-reuse")
    assert scores(again) == local
    assert stored(tmp_path) == ["models--org--bundle"]


def test_python_scores_streamed_sources(hub, sample: Digits, remote, tmp_path):
    from flexmerge_cli import draw_curve, evaluate, merge

    merge(sample.plan_path, tmp_path / "bundle", method="average", size="2x")
    document = evaluate(tmp_path / "bundle", sample.spec_path, plan=remote, stream=True)
    drawn = draw_curve(remote, sample.spec_path, methods="average", sizes="2x", stream=True)
    assert drawn["points"][0]["mean"]["value"] == document["mean"]["merged"]
    assert stored(tmp_path) == []
