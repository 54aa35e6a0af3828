"""Bad specs: exit 2 with file, line and key, before a weight is read."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from flexmerge_cli.errors import UsageError

from ..program import fails, flexmerge, succeeds
from . import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A bundle of three tasks, a folder to write specs in, and data beside them."""
    folder = tmp_path_factory.mktemp("specs")
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    tiny.bert(folder / "tasks" / "judged", 2, **names)
    tiny.bert(folder / "tasks" / "graded", 1)
    tiny.bert(folder / "tasks" / "sorted", 5)
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "tasks" / "judged").bert
    base.save_pretrained(folder / "base")
    succeeds("plan", "--base", folder / "base", "--tasks", folder / "tasks", "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "--method", "average", "-o", folder / "bundle")
    texts = tiny.sentences(6)
    tiny.rows(folder / "good.jsonl", text=texts, label=[0, 1] * 3, score=[0.5] * 6, name=["no", "yes"] * 3)
    tiny.rows(folder / "far.jsonl", text=texts, label=[0, 1, 7, 0, 1, 0], name=["no", "maybe"] * 3, score=["x"] * 6)
    (folder / "empty.jsonl").write_text("")
    np.savez(folder / "none.npz", text=np.zeros(0), label=np.zeros(0, int))
    np.savez(folder / "uneven.npz", text=np.array(["red", "blue"]), label=np.zeros(3, int))
    (folder / "notes.txt").write_text("red is one")
    return folder


HEAD = "version: 1\ntasks:\n  judged:\n"
GOOD = HEAD + "    kind: text-classification\n    data: good.jsonl\n"

BAD = {
    "unknown kind": (HEAD + "    kind: text-clasification\n    data: good.jsonl\n", 4, "judged.kind", "text-class"),
    "no kind": (HEAD + "    data: good.jsonl\n", 3, "tasks.judged", "no `kind`"),
    "kind that is no text": (HEAD + "    kind: [a]\n    data: good.jsonl\n", 4, "judged.kind", "unknown kind"),
    "task that is no map": ("version: 1\ntasks:\n  judged: good.jsonl\n", 3, "tasks.judged", "must be a mapping"),
    "no tasks": ("version: 1\ntasks: {}\n", 2, "tasks", "is empty"),
    "another version": (GOOD.replace("version: 1", "version: 2"), 1, "version", "1"),
    "unknown key": (GOOD + "    lables: [no, yes]\n", 6, "judged.lables", "did you mean `labels`?"),
    "unknown column role": (GOOD + "    columns:\n      txt: text\n", 7, "columns.txt", "did you mean `text`?"),
    "key of another kind": (GOOD + "    template: '{text}'\n", 6, "judged.template", "known here"),
    "unknown task": (GOOD.replace("judged", "jugded"), 3, "tasks.jugded", "judged"),
    "missing column": (GOOD + "    columns:\n      text: sentence\n", 7, "columns.text", "no column `sentence`"),
    "missing label column": (GOOD + "    columns: {label: gold}\n", 6, "columns.label", "its columns: text, label"),
    "label outside range": (
        GOOD.replace("good", "far"), 5, "judged.columns.label", "row 3 of far.jsonl has label 7, the model has 2"
    ),
    "label that is no class": (
        GOOD.replace("good", "far") + "    columns: {label: name}\n", 6, "columns.label", "'maybe', known are no, yes"
    ),
    "too few names": (GOOD + "    labels: [only]\n", 5, "columns.label", "has label 1, `labels` names 1"),
    "too many names": (GOOD + "    labels: [a, b, c]\n", 6, "judged.labels", "3 labels, but the model has 2"),
    "empty split": (GOOD.replace("good", "empty"), 5, "judged.data", "has no examples"),
    "empty columns": (GOOD.replace("good.jsonl", "none.npz"), 5, "judged.data", "has no examples"),
    "columns of two lengths": (GOOD.replace("good.jsonl", "uneven.npz"), 5, "judged.data", "differ in length"),
    "format that no name tells": (GOOD.replace("good.jsonl", "notes.txt"), 5, "judged.data", "format: jsonl"),
    "unknown metric": (GOOD + "    metric: perplexity\n", 6, "judged.metric", "one of: accuracy"),
    "metric twice": (GOOD + "    metric: [f1, f1]\n", 6, "judged.metric", "twice"),
    "recall at nothing": (GOOD + "    metric: recall@0\n", 6, "judged.metric", "recall@0"),
    "agreement and more": (GOOD + "    metric: [agreement, f1]\n", 6, "judged.metric", "with other"),
    "agreement with nothing": (GOOD + "    metric: agreement\n", 6, "judged.metric", "checkpoint:"),
    "limit of none": (GOOD + "    limit: 0\n", 6, "judged.limit", "`0` is less than 1"),
    "unknown dtype": (GOOD + "    dtype: float8\n", 6, "judged.dtype", "float32"),
    "head of one number": (GOOD.replace("judged", "graded"), 4, "graded.kind", "kind: regression"),
    "head of classes": (HEAD + "    kind: regression\n    data: good.jsonl\n", 4, "judged.kind", "kind: text-class"),
    "f1 of five classes": (GOOD.replace("judged", "sorted") + "    metric: f1\n", 6, "sorted.metric", "f1_macro"),
    "kind of another head": (HEAD + "    kind: causal-lm\n    data: good.jsonl\n", 4, "judged.kind", "ForCausalLM"),
    "image kind of a text model": (
        HEAD + "    kind: image-classification\n    data: good.jsonl\n", 4, "judged.kind", "BertForSequence"
    ),
    "CLIP kind of a text model": (
        HEAD + "    kind: zero-shot-image-classification\n    data: good.jsonl\n    labels: [a]\n",
        4, "judged.kind", "CLIP",
    ),
    "number that is none": (
        HEAD.replace("judged", "graded") + "    kind: regression\n    data: far.jsonl\n    columns: {label: score}\n",
        6, "columns.label", "not a number: 'x'",
    ),
    "text that is none": (GOOD + "    columns: {text: label}\n", 6, "columns.text", "not a text: int"),
    "code without leave": (HEAD + "    kind: python:os:getcwd\n", 4, "judged.kind", "--allow-exec"),
    "command without leave": (HEAD + "    kind: command\n    command: [ls]\n", 4, "judged.kind", "--allow-exec"),
    "code behind lm-eval without leave": (
        HEAD + "    kind: lm-eval\n    task: x\n    include_path: .\n", 6, "include_path", "--allow-exec"
    ),
    "key twice": (GOOD + "    data: good.jsonl\n", 6, "data", "twice"),
    "no YAML": ("version: 1\ntasks: [\n", 3, "", ""),
}  # fmt: skip


@pytest.fixture
def no_weight(monkeypatch):
    """Reading a weight fails the test."""

    def read(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("flexmerge_cli.bundle.view.View.__getitem__", read)
    monkeypatch.setattr("flexmerge_cli.evaluation.models.StoredWeights.array", read)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_spec_is_refused_with_file_line_and_key_before_a_weight_is_read(place, no_weight, name):
    text, line, key, said = BAD[name]
    spec = place / "eval.yaml"
    spec.write_text(text)
    fails(2, "eval", place / "bundle", "--spec", spec, says=(f"{spec}, line {line}", key, said))


def test_the_good_one_is_scored(place):
    spec = place / "good.yaml"
    spec.write_text(GOOD)
    record = succeeds("eval", place / "bundle", "--spec", spec, "--json").json["tasks"]["judged"]
    assert (record["kind"], record["metric"], record["n"]) == ("text-classification", "accuracy", 6)


def test_errors_of_a_spec_are_json_where_json_is_asked_for(place):
    spec = place / "eval.yaml"
    spec.write_text(BAD["unknown kind"][0])
    found = flexmerge("eval", place / "bundle", "--spec", spec, "--json")
    assert found.code == 2 and found.json["error"]["exit_code"] == 2


def test_a_kind_without_a_tokenizer_says_where_it_looked(tmp_path):
    model = tiny.bert(tmp_path / "model", 2)
    for path in model.glob("*token*"):
        path.unlink()
    data = tiny.rows(tmp_path / "d.jsonl", text=["red"], label=[0])
    with pytest.raises(UsageError, match=r"tasks\.it\.kind: no tokenizer in .*model"):
        tiny.scored(model, {"kind": "text-classification", "data": data})


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (GOOD.replace("good", "gone"), 4, "tasks.judged.data: no data at"),
        (GOOD + "    checkpoint: gone\n", 4, "tasks.judged.checkpoint"),
        ("base: gone\n" + GOOD, 4, "line 1: base"),
    ],
)
def test_what_is_not_there_is_a_source_that_cannot_be_had(place, no_weight, text, code, said):
    spec = place / "eval.yaml"
    spec.write_text(text)
    fails(code, "eval", place / "bundle", "--spec", spec, says=said)


def test_a_spec_that_is_not_there_and_a_bundle_that_is_not_there(place):
    fails(4, "eval", place / "bundle", "--spec", place / "none.yaml", says="no spec at")
    fails(2, "eval", place / "bundle", says="--spec")
    fails(2, "eval", "--spec", place / "good.yaml", says="give a bundle")


@pytest.mark.parametrize("curve", [False, True])
def test_code_runs_with_leave(place, curve, monkeypatch):
    (place / "counting.py").write_text("def count(weights, folder):\n    return len(weights)\n")
    spec = place / "eval.yaml"
    spec.write_text(HEAD + "    kind: python:counting:count\n")
    options = ("--plan", place / "plan.json", "--sources") if curve else (place / "bundle",)
    record = succeeds("eval", *options, "--spec", spec, "--allow-exec", "--json").json["tasks"]["judged"]
    assert record["merged" if not curve else "fine_tuned"] > 10
