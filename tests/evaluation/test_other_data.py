"""Models beyond their task's own data: `eval --cross`, `unseen` of a spec, `curve` with `--ensembles` or `--plane`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation import curve_record, plane
from flexmerge_cli.evaluation.gate import parse_gate
from flexmerge_cli.evaluation.running import BundleGate, references_of
from flexmerge_cli.evaluation.spec import read_spec
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.report.html_scores import scores_page

from ..program import fails, flexmerge, succeeds
from ..report.pages import Page
from . import tiny

N = 24
LABELS = {"first": ["no", "yes"], "second": ["no", "yes"], "three": ["a", "b", "c"], "words": ["bad", "good"]}
TEXTS = {name: tiny.sentences(N, seed) for seed, name in enumerate(LABELS)}
ANSWERS = {name: np.random.default_rng(len(name)).integers(0, len(names), N) for name, names in LABELS.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, four fine-tunes of it with the heads of LABELS, their plan, a merged bundle, data and spec."""
    folder = tmp_path_factory.mktemp("cross")
    tasks = {}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        path = tiny.tuned_bert(folder, name, seed, labels)
        tiny.rows(folder / f"{name}.jsonl", text=TEXTS[name], label=[labels[n] for n in ANSWERS[name]])
        tasks[name] = {
            "kind": "text-classification", "data": {"path": f"{name}.jsonl", "split": "test"}, "checkpoint": str(path),
        }  # fmt: skip
    succeeds("plan", "--base", folder / "base", "--tasks", folder / "tasks", "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "--method", "average", "-o", folder / "merged")
    (folder / "eval.yaml").write_text(json.dumps({"version": 1, "base": "base", "tasks": tasks}))
    return folder


@pytest.fixture(autouse=True)
def shared_cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def crossed(place: Path, *more: object) -> dict:
    return succeeds("eval", place / "merged", "--spec", place / "eval.yaml", "--cross", "--json", *more).json


def accuracy(path: Path, name: str) -> float:
    """Score a checkpoint folder on a task's data, one text at a time."""
    built = transformers.BertForSequenceClassification.from_pretrained(path).eval()
    of_text = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        found = [built(**of_text(text, return_tensors="pt")).logits.argmax().item() for text in TEXTS[name]]
    return float(np.mean(np.array(found) == ANSWERS[name]))


def test_models_of_the_same_labels_are_scored_on_each_others_data(place, tmp_path):
    found = crossed(place)["cross"]
    for model, data in (("first", "second"), ("second", "first")):
        succeeds("export", place / "merged", "--task", model, "-o", tmp_path / model)
        assert found[model][data]["merged"]["value"] == accuracy(tmp_path / model, data)
        assert found[model][data]["fine_tuned"]["value"] == accuracy(place / "tasks" / model, data)
        assert found[model][data]["merged"]["n"] == N and found[model][data]["merged"]["split"] == "test"


def test_other_labels_are_named_and_have_no_number(place):
    found = crossed(place)["cross"]
    words = {(model, data): entry.get("mismatch") for model, row in found.items() for data, entry in row.items()}
    assert words == {
        ("first", "second"): None, ("second", "first"): None, ("words", "three"): "2≠3", ("three", "words"): "3≠2",
        **{(name, "three"): "2≠3" for name in ("first", "second")}, ("first", "words"): "labels≠",
        **{("three", name): "3≠2" for name in ("first", "second")}, ("second", "words"): "labels≠",
        ("words", "first"): "labels≠", ("words", "second"): "labels≠",
    }  # fmt: skip
    assert "2 classes" in found["first"]["three"]["reason"] and "no, yes" in found["first"]["words"]["reason"]


def test_names_that_say_nothing_are_not_compared(place, tmp_path):
    spec = json.loads((place / "eval.yaml").read_text())
    spec["tasks"]["words"] |= {"labels": ["LABEL_0", "LABEL_1"]}
    spec["tasks"]["words"]["data"] = str(place / "numbers.jsonl")
    tiny.rows(place / "numbers.jsonl", text=TEXTS["words"], label=ANSWERS["words"].tolist())
    (place / "unnamed.yaml").write_text(json.dumps(spec))
    found = succeeds("eval", place / "merged", "--spec", place / "unnamed.yaml", "--cross", "--json").json["cross"]
    assert found["first"]["words"]["merged"]["value"] is not None


def test_data_that_do_not_fit_the_other_model_are_a_word_and_no_failure(place):
    spec = json.loads((place / "eval.yaml").read_text())
    spec["tasks"]["second"] |= {"metric": "agreement"}
    (place / "agreement.yaml").write_text(json.dumps(spec))
    found = succeeds("eval", place / "merged", "--spec", place / "agreement.yaml", "--cross", "--json").json["cross"]
    assert found["first"]["second"]["mismatch"] == "data≠" and "agreement" in found["first"]["second"]["reason"]
    assert "mismatch" not in found["second"]["first"]


def test_every_score_is_computed_once_and_then_comes_from_the_cache(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = crossed(place), crossed(place)
    assert first.pop("evaluations") == {"computed": 3 * 4 + 2 * 2, "repeated": 0, "cached": 0}
    assert second.pop("evaluations") == {"computed": 0, "repeated": 0, "cached": 16}
    assert first == second


def test_sources_alone_have_a_matrix(place):
    arguments = ("--plan", place / "plan.json", "--spec", place / "eval.yaml")
    found = succeeds("eval", "--sources", *arguments, "--cross", "--json").json["cross"]
    assert set(found["first"]["second"]) == {"fine_tuned"}


def test_table_csv_and_page_have_the_numbers_and_the_words(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml", "--cross")
    shown = succeeds(*arguments, "--csv", tmp_path / "scores.csv").out
    assert all(len(line) <= 80 for line in shown.split("Each row")[0].splitlines())
    assert "merged models on every task's data" in shown and "labels≠, other labels" in shown
    found = crossed(place)
    value = found["cross"]["first"]["second"]["merged"]["value"]
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"]]
    assert len(rows) == 2 * 2
    assert [float(row["value"]) for row in rows if (row["model"], row["method"]) == ("first", "average")] == [value]
    page = scores_page(found, "merged")
    text = Page(page).text
    assert f"{100 * value:.1f}" in text and text.count("labels≠") == 2 * 4 and "2≠3" in text


@pytest.fixture(scope="module")
def unseen(place) -> Path:
    """The same spec with two unseen tasks, whose data are those of `second` and `three`; a gate counts one."""
    spec = json.loads((place / "eval.yaml").read_text())
    both = {"new": ("first", "second"), "newer": ("three", "three")}
    spec["unseen"] = {
        name: {"head": head, "kind": "text-classification", "data": f"{data}.jsonl"}
        for name, (head, data) in both.items()
    }
    spec["unseen"]["newer"]["gate"] = True
    (place / "unseen.yaml").write_text(json.dumps(spec))
    return place / "unseen.yaml"


def test_unseen_data_are_scored_with_the_models_of_their_head_and_have_means_apart(place, unseen):
    found = succeeds("eval", place / "merged", "--spec", unseen, "--json").json
    wanted = crossed(place)
    new = found["unseen"]["new"]
    for who in ("merged", "fine_tuned"):
        assert new[who] == wanted["cross"]["first"]["second"][who]["value"]
    assert new["head"] == "first" and new["base"] is not None and new["normalised"] == new["merged"] / new["fine_tuned"]
    assert found["mean"] == wanted["mean"]
    assert found["unseen_mean"]["merged"] == np.mean([new["merged"], found["tasks"]["three"]["merged"]])


def test_processes_side_by_side_come_to_the_same(place, unseen, forked_workers):
    arguments = ("eval", place / "merged", "--spec", unseen, "--cross", "--json")
    alone, beside = succeeds(*arguments).json, succeeds(*arguments, "--parallel", 2, "--no-reuse").json
    assert alone.pop("evaluations") != beside.pop("evaluations")
    assert alone == beside


def test_a_gate_counts_only_the_unseen_data_that_say_so(place, unseen):
    found = flexmerge("eval", place / "merged", "--spec", unseen, "--max-drop", "100%", "--json").json
    assert set(found["gate"]["tasks"]) == {*LABELS, "newer"}


def test_unseen_data_that_change_before_a_bundle_is_scored_are_told(place, unseen):
    fields = json.loads(unseen.read_text())
    fields["unseen"]["newer"]["data"] = "changing.jsonl"
    changing = place / "changing.jsonl"
    changing.write_bytes((place / "three.jsonl").read_bytes())
    (place / "changing.yaml").write_text(json.dumps(fields))
    spec = read_spec(place / "changing.yaml", tuple(LABELS))
    references = references_of(load_plan(place / "plan.json"), place, spec)
    gate = BundleGate(spec=spec, gate=parse_gate("100%", None), references=references, device="cpu")
    assert set(gate.record["data"]) == set(LABELS)
    gate.require(place / "merged", lambda *_step: None)
    changing.write_text("".join(changing.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match="`newer` changed during the run"):
        gate.require(place / "merged", lambda *_step: None)


def test_unseen_scores_are_shown_in_table_csv_and_page(place, unseen, tmp_path):
    arguments = ("eval", place / "merged", "--spec", unseen)
    shown = succeeds(*arguments, "--csv", tmp_path / "scores.csv", "--html", tmp_path / "page.html").out
    assert "unseen tasks" in shown and "new (first)" in shown
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {(row["task"], row["model"]) for row in csv.DictReader(file) if row["model"]}
    assert rows == {("new", "first"), ("newer", "three")}
    assert "new (first)" in Page((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize(
    ("entry", "key", "says"),
    [
        ({"head": None}, "unseen.new.head", "no `head` given"),
        ({"head": "frist"}, "unseen.new.head", "`tasks` has no `frist`"),
        ({"checkpoint": "tasks/first"}, "unseen.new.checkpoint", "models of `head`"),
        ({"data": "three.jsonl"}, "unseen.new.columns.label", "known are no, yes"),
        ({"lables": ["no"]}, "unseen.new.lables", "labels"),
    ],
)
def test_unseen_entries_that_cannot_be_scored_are_refused_by_key(place, unseen, tmp_path, entry, key, says):
    spec = json.loads(unseen.read_text())
    spec["unseen"]["new"] = {key: value for key, value in (spec["unseen"]["new"] | entry).items() if value is not None}
    (place / "bad.yaml").write_text(json.dumps(spec))
    fails(2, "eval", place / "merged", "--spec", place / "bad.yaml", says=(key, says))


def test_merged_tasks_are_not_unseen_and_have_no_head(place, unseen):
    spec = json.loads(unseen.read_text())
    spec["unseen"] = {"words": spec["unseen"]["new"]}
    (place / "bad.yaml").write_text(json.dumps(spec))
    fails(2, "eval", place / "merged", "--spec", place / "bad.yaml", says="`words` is a task that was merged")
    del spec["unseen"]
    spec["tasks"]["words"]["head"] = "first"
    (place / "bad.yaml").write_text(json.dumps(spec))
    fails(2, "eval", place / "merged", "--spec", place / "bad.yaml", says="`head` is a key of `unseen`")


def logits(path: Path, name: str) -> np.ndarray:
    """The outputs of a checkpoint folder on a task's data, [n, C], one text at a time."""
    built = transformers.BertForSequenceClassification.from_pretrained(path).eval()
    of_text = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        rows = [built(**of_text(text, return_tensors="pt")).logits[0].double().numpy() for text in TEXTS[name]]
    return np.stack(rows)


def test_ensembles_combine_the_fine_tuned_models_of_one_label_space(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ("curve", place / "plan.json", "--spec", place / "eval.yaml", "--method", "average", "--ensembles")
    found = succeeds(*arguments, "--json").json
    shown = succeeds(*arguments, "--csv", tmp_path / "rows.csv", "--html", tmp_path / "page.html").out
    assert [(one["rule"], one["of"]) for one in found["ensembles"]] == [
        (rule, ["first", "second"]) for rule in ("mean", "weighted", "max_model")
    ]
    for data in ("first", "second"):
        both = np.stack([logits(place / "tasks" / model, data) for model in ("first", "second")])
        chances = np.exp(both) / np.exp(both).sum(-1, keepdims=True)
        sure = 1 + (chances * np.log(chances)).sum(-1) / np.log(2)
        combined = (both.mean(0), (sure[..., None] / sure.sum(0)[:, None] * both).sum(0), both.max(0))
        for ensemble, values in zip(found["ensembles"], combined):
            assert ensemble["tasks"][data]["value"] == np.mean(values.argmax(-1) == ANSWERS[data])
    for ensemble in found["ensembles"]:
        values = [record["value"] for record in ensemble["tasks"].values()]
        assert ensemble["mean"]["value"] == np.mean(values) and ensemble["passes"] == 2
        assert ensemble["bytes"] == sum(
            found["tasks"][task]["scores"]["fine_tuned"]["bytes"] for task in ("first", "second")
        )
    assert "ensembles of the fine-tuned models" in shown and "max_model" in shown
    assert (tmp_path / "rows.csv").read_text().count("ensemble mean") == 2
    assert "max_model" in Page((tmp_path / "page.html").read_text()).text


def test_without_equal_labels_there_is_no_ensemble(place):
    spec = json.loads((place / "eval.yaml").read_text())
    spec["tasks"] = {name: spec["tasks"][name] for name in ("first", "three", "words")}
    (place / "apart.yaml").write_text(json.dumps(spec))
    arguments = ("curve", place / "plan.json", "--spec", place / "apart.yaml", "--method", "average", "--ensembles")
    assert "no two tasks have the same labels" in succeeds(*arguments).out


def test_a_plane_has_the_scores_of_models_mixed_by_hand(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plane, "PLACES", (0.0, 0.5, 1.0))
    monkeypatch.setattr(curve_record, "PLACES", plane.PLACES)
    arguments = ("curve", place / "plan.json", "--spec", place / "eval.yaml", "--method", "average")
    arguments += ("--plane", "first,three")
    found = succeeds(*arguments, "--json").json
    shown = succeeds(*arguments, "--csv", tmp_path / "rows.csv", "--html", tmp_path / "page.html").out
    base = transformers.BertModel.from_pretrained(place / "base").state_dict()
    both = {
        name: transformers.BertForSequenceClassification.from_pretrained(place / "tasks" / name)
        for name in ("first", "three")
    }
    points = {(point["a"], point["b"]): point["tasks"] for point in found["plane"]["points"]}
    assert list(points) == [(a, b) for b in plane.PLACES for a in plane.PLACES]
    for (a, b), scores in points.items():
        for name in both:
            state = both[name].state_dict()
            for key, value in base.items():
                first, three = (both[other].state_dict()[f"bert.{key}"] for other in ("first", "three"))
                state[f"bert.{key}"] = value + a * (first - value) + b * (three - value)
            mixed = transformers.BertForSequenceClassification(both[name].config)
            mixed.load_state_dict(state)
            mixed.save_pretrained(tmp_path / "mixed")
            transformers.AutoTokenizer.from_pretrained(place / "tasks" / name).save_pretrained(tmp_path / "mixed")
            assert scores[name]["value"] == accuracy(tmp_path / "mixed", name), (a, b, name)
    for name, at in {"first": (1.0, 0.0), "three": (0.0, 1.0)}.items():
        assert points[at][name]["value"] == found["tasks"][name]["fine_tuned"] and points[at][name]["normalised"] == 1
        assert points[0.0, 0.0][name]["value"] == found["tasks"][name]["base"]
    assert len({scores["first"]["value"] for scores in points.values()}) > 1
    assert "the best of these points is a =" in shown
    assert (tmp_path / "rows.csv").read_text().count('"plane first,three at 0.5,0.5"') == 2
    assert "The plane of two tasks" in Page((tmp_path / "page.html").read_text()).text


@pytest.mark.parametrize(
    ("words", "says"),
    [("first", "is not two tasks"), ("first,first", "is not two tasks"), ("first,other", "no task `other`")],
)
def test_a_plane_needs_two_tasks_of_the_spec(place, words, says):
    arguments = ("curve", place / "plan.json", "--spec", place / "eval.yaml", "--method", "average", "--plane", words)
    fails(2, *arguments, says=says)
