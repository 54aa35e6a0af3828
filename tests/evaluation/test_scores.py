"""`eval` of bundles and of sources through the command line: numbers, what they rest on, and what is computed again."""

import csv
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli.evaluation.kinds import sequences

from ..program import fails, stored_sizes, succeeds
from . import tiny

N = 30
TEXTS = tiny.sentences(N, 4)
LABELS = {name: np.random.default_rng(seed).integers(0, 2, N).tolist() for seed, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, two fine-tunes of it that differ, their plan, bundles `exact` and `merged`, data and spec."""
    folder = tmp_path_factory.mktemp("scores")
    for seed, name in enumerate(LABELS, 1):
        tiny.tuned_bert(folder, name, seed)
        tiny.rows(folder / f"{name}.jsonl", text=TEXTS, label=LABELS[name])
    succeeds("plan", "--base", folder / "base", "--tasks", folder / "tasks", "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "-o", folder / "exact")
    succeeds("merge", folder / "plan.json", "--method", "average", "-o", folder / "merged")
    tasks = {
        name: {
            "kind": "text-classification", "data": {"path": f"{name}.jsonl", "split": "test"},
            "metric": ["accuracy", "f1"],
        }
        for name in LABELS
    }  # fmt: skip
    (folder / "bare.yaml").write_text(json.dumps({"version": 1, "tasks": tasks}))
    named = {name: {**task, "checkpoint": f"tasks/{name}"} for name, task in tasks.items()}
    (folder / "eval.yaml").write_text(json.dumps({"version": 1, "base": "base", "tasks": named}))
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def accuracy(path: Path, name: str, state: dict[str, torch.Tensor] | None = None) -> float:
    """Score a checkpoint folder, one text at a time."""
    built = transformers.BertForSequenceClassification.from_pretrained(path).eval()
    built.load_state_dict(state or {}, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    with torch.inference_mode():
        found = [built(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in TEXTS]
    return float(np.mean(np.array(found) == LABELS[name]))


def test_merged_fine_tuned_and_base_equal_a_loop(place, tmp_path):
    found = succeeds("eval", place / "merged", "--spec", place / "eval.yaml", "--json").json
    base = transformers.BertModel.from_pretrained(place / "base").state_dict()
    for name in LABELS:
        succeeds("export", place / "merged", "--task", name, "-o", tmp_path / name)
        record = found["tasks"][name]
        assert record["merged"] == accuracy(tmp_path / name, name)
        assert record["fine_tuned"] == accuracy(place / "tasks" / name, name)
        with_head = {f"bert.{key}": tensor for key, tensor in base.items()}
        assert record["base"] == accuracy(place / "tasks" / name, name, with_head)
        assert record["normalised"] == record["merged"] / record["fine_tuned"]
    assert found["mean"]["merged"] == np.mean([record["merged"] for record in found["tasks"].values()])


def test_every_number_carries_what_it_rests_on(place):
    found = succeeds("eval", place / "merged", "--spec", place / "eval.yaml", "--json").json
    assert found["format"] == "flexmerge.eval/1"
    for record in found["tasks"].values():
        assert set(record["scores"]) == {"merged", "fine_tuned", "base"}
        for scored in record["scores"].values():
            assert [other["metric"] for other in scored["others"]] == ["f1"]
            for number in (scored, *scored["others"]):
                low, high = number["interval"]
                assert low <= number["value"] <= high and number["n"] == N and number["split"] == "test"
                assert len(number["weights"]) == 32 and number["bytes"] > 0
        assert len({scored["weights"] for scored in record["scores"].values()}) == 3


@pytest.mark.parametrize("how", ["spec", "plan", "bundle and plan"])
def test_sources_are_scored_the_same_wherever_they_are_named(place, how):
    wanted = succeeds("eval", place / "merged", "--spec", place / "eval.yaml", "--json").json["tasks"]
    given = {
        "spec": (place / "merged", "--spec", place / "eval.yaml"),
        "plan": ("--plan", place / "plan.json", "--spec", place / "bare.yaml"),
        "bundle and plan": (place / "merged", "--plan", place / "plan.json", "--spec", place / "bare.yaml"),
    }[how]
    found = succeeds("eval", "--sources", *given, "--json").json
    for name, record in found["tasks"].items():
        assert record["merged"] is None
        for who in ("fine_tuned", "base"):
            assert record[who] == wanted[name][who]
            assert record["scores"][who]["weights"] == wanted[name]["scores"][who]["weights"]
    # What they are compared by is the same: nothing had to be computed a second time.
    assert found["evaluations"] == {"computed": 0, "repeated": 0, "cached": 4}


def test_a_bundle_beside_its_plan_is_scored_beside_the_plans_sources(place):
    by_plan = succeeds("eval", place / "merged", "--plan", place / "plan.json", "--spec", place / "bare.yaml", "--json")
    by_spec = succeeds("eval", place / "merged", "--spec", place / "eval.yaml", "--json").json
    for key in ("merged", "fine_tuned", "base", "normalised"):
        assert by_plan.json["mean"][key] == by_spec["mean"][key] is not None


def test_sources_that_nobody_names_are_asked_for(place):
    fails(2, "eval", "--sources", place / "merged", "--spec", place / "bare.yaml", says=("tasks.first", "--plan"))


def test_known_scores_are_reused_and_are_the_same_without_reuse(place):
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml", "--json")
    first, second = (succeeds(*arguments).json for _ in range(2))
    again = succeeds(*arguments, "--no-reuse").json
    counts = [found.pop("evaluations") for found in (first, second, again)]
    assert counts == [
        {"computed": 6, "repeated": 0, "cached": 0},
        {"computed": 0, "repeated": 0, "cached": 6},
        {"computed": 6, "repeated": 0, "cached": 0},
    ]
    assert first == second == again


def test_an_exact_bundle_is_its_sources_and_each_is_scored_once(place):
    found = succeeds("eval", place / "exact", "--spec", place / "eval.yaml", "--json").json
    assert found["evaluations"] == {"computed": 4, "repeated": 2, "cached": 0}
    for record in found["tasks"].values():
        assert record["normalised"] == 1.0
        assert record["scores"]["merged"]["weights"] == record["scores"]["fine_tuned"]["weights"]


@pytest.mark.slow
def test_processes_side_by_side_come_to_the_same(place):
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml", "--no-reuse", "--json")
    assert succeeds(*arguments).json == succeeds(*arguments, "--parallel", 2).json


def test_one_model_is_in_memory_at_a_time(place, monkeypatch):
    alive: list[weakref.ref] = []
    most, build = [], sequences.build_model

    def counted(*arguments, **options):
        most.append(sum(model() is not None for model in alive))
        model = build(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sequences, "build_model", counted)
    succeeds("eval", place / "merged", "--spec", place / "eval.yaml")
    assert len(most) == 6 and max(most) == 0


def test_the_table_marks_the_worst_task_and_has_every_column(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = succeeds("eval", place / "merged", "--spec", place / "eval.yaml").out
    head = next(line for line in out.splitlines() if "metric" in line)
    assert head.split() == ["task", "metric", "n", "merged", "±", "95", "%", "fine-tuned", "base", "kept", "%"]
    assert sum("(worst)" in line for line in out.splitlines()) == 1 and "f1" in out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_number_of_the_document(place, tmp_path):
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml")
    found = succeeds(*arguments, "--csv", tmp_path / "scores.csv", "--json").json
    rows = rows_of(tmp_path / "scores.csv")
    numbers = [
        (task, method, number["metric"], str(number["value"]), *map(str, number["interval"]), number["weights"])
        for task, record in found["tasks"].items()
        for method, who in (("average", "merged"), ("fine-tuned", "fine_tuned"), ("base", "base"))
        for number in (record["scores"][who], *record["scores"][who]["others"])
    ]
    keys = ("task", "method", "metric", "value", "low", "high", "weights")
    assert sorted(tuple(row[key] for key in keys) for row in rows) == sorted(numbers)
    assert len(rows) == 2 * 3 * 2 and {(row["n"], row["split"]) for row in rows} == {(str(N), "test")}
    sizes = {(row["method"], row["bytes"], row["total_bytes"]) for row in rows}
    on_disk = sum(stored_sizes(place / "merged").values())
    assert sizes == {
        ("average", str(found["stored_bytes"]), str(on_disk)), ("fine-tuned", "", ""), ("base", "", ""),
    }  # fmt: skip


def test_csv_of_sources_has_them_alone(place, tmp_path):
    arguments = ("--plan", place / "plan.json", "--spec", place / "bare.yaml", "--csv", tmp_path / "scores.csv")
    succeeds("eval", "--sources", *arguments)
    assert {row["method"] for row in rows_of(tmp_path / "scores.csv")} == {"fine-tuned", "base"}


def test_the_page_is_of_these_scores_and_replaces_nothing(place, tmp_path):
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml", "--html", tmp_path / "scores.html")
    out = succeeds(*arguments).out
    page = (tmp_path / "scores.html").read_text()
    number = next(line for line in out.splitlines() if line.split()[:1] == ["first"]).split()[3]
    assert f">{number}<" in page and "data-method" in page
    fails(2, *arguments, says="exists")
    fails(2, "eval", place / "merged", "--spec", place / "eval.yaml", "--png", tmp_path / "x.png", says="--png")


def test_progress_is_on_stderr_and_quiet_is_silent(place):
    arguments = ("eval", place / "merged", "--spec", place / "eval.yaml")
    assert "scoring second, base (6 of 6)" in succeeds(*arguments).err
    assert succeeds(*arguments, "-q").err == ""


def test_a_starter_spec_is_a_spec_and_knows_kinds_labels_and_data(place):
    from flexmerge_cli.evaluation.spec import read_spec

    succeeds("eval", "--init", place / "merged", "-o", place / "starter.yaml", "--force")
    spec = read_spec(place / "starter.yaml", tuple(LABELS))
    assert {task.kind for task in spec.tasks.values()} == {"text-classification"}
    assert spec.tasks["first"].labels == ("no", "yes") and spec.tasks["first"].data == "first.jsonl"
    found = succeeds("eval", place / "merged", "--spec", place / "starter.yaml", "--json").json
    wanted = succeeds("eval", place / "merged", "--spec", place / "bare.yaml", "--json").json
    assert found["mean"]["merged"] == wanted["mean"]["merged"]
    assert found["mean"]["base"] is not None, "plan.json lies beside the bundle"


def test_a_starter_spec_names_the_sources_that_the_plan_knows_and_the_columns_of_the_data(place, tmp_path):
    from flexmerge_cli.evaluation.spec import read_spec

    (tmp_path / "data").mkdir()
    lines = [json.dumps({"sentence": "a", "target": 0, "id": 1}), json.dumps({"sentence": "b", "target": 1, "id": 2})]
    (tmp_path / "data" / "first.jsonl").write_text("\n".join(lines))
    succeeds("eval", "--init", place / "merged", "--plan", place / "plan.json", "-o", tmp_path / "eval.yaml")
    spec = read_spec(tmp_path / "eval.yaml", tuple(LABELS))
    plan = json.loads((place / "plan.json").read_text())
    assert (tmp_path / spec.base).resolve() == (place / plan["base"]["source"]).resolve()
    for task in plan["tasks"]:
        assert (tmp_path / spec.tasks[task["name"]].checkpoint).resolve() == (place / task["source"]).resolve()
    assert (spec.tasks["first"].columns.text, spec.tasks["first"].columns.label) == ("sentence", "target")
    other = tmp_path / "other.json"
    succeeds("plan", place / "plan.json", "--blocks", "tensor", "-o", other)
    again = ("--plan", other, "-o", tmp_path / "again.yaml")
    fails(2, "eval", "--init", place / "merged", *again, says="was not made from")


def test_init_never_replaces_and_says_where_it_writes(place, tmp_path):
    (tmp_path / "eval.yaml").write_text("mine")
    fails(2, "eval", "--init", place / "merged", "-o", tmp_path / "eval.yaml", says="exists")
    fails(2, "eval", "--init", place / "merged", says="no output file given")
    fails(2, "eval", "--init", place / "merged", "--spec", place / "eval.yaml", "-o", tmp_path / "x", says="no --spec")
    fails(2, "eval", place / "merged", "--spec", place / "eval.yaml", "-o", tmp_path / "x", says="--init")
    assert (tmp_path / "eval.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny.vit, "image-classification"),
        (tiny.clip, "zero-shot-image-classification"),
        (tiny.t5, "text2text"),
        (tiny.llama, "causal-lm"),
        (lambda path: tiny.bert(path, 1), "regression"),
    ],
)
def test_every_kind_of_model_has_a_starter_that_is_a_spec(tmp_path, make, kind):
    from flexmerge_cli.evaluation.spec import read_spec

    for name in ("on", "1"):  # which YAML would take for something else
        make(tmp_path / "tasks" / name)
    tasks = [word for name in ("on", "1") for word in ("--task", f"{name}={tmp_path / 'tasks' / name}")]
    arguments = ("--base", tmp_path / "tasks" / "on", *tasks)
    succeeds("plan", *arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("eval", "--init", tmp_path / "bundle", "-o", tmp_path / "eval.yaml")
    spec = read_spec(tmp_path / "eval.yaml", ("1", "on"))
    assert [task.kind for task in spec.tasks.values()] == [kind, kind]


def test_a_task_without_a_config_has_a_command_as_starter(tmp_path):
    from safetensors.torch import save_file

    from flexmerge_cli.evaluation.spec import read_spec

    for name in ("base", "tasks/a", "tasks/b"):
        (tmp_path / name).mkdir(parents=True)
        save_file({"w": torch.full((4,), float(len(name)))}, tmp_path / name / "model.safetensors")
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    succeeds("eval", "--init", tmp_path / "bundle", "-o", tmp_path / "eval.yaml")
    assert read_spec(tmp_path / "eval.yaml", ("a", "b"), allow_exec=True).tasks["a"].kind == "command"


def test_a_score_beyond_all_numbers_is_null_and_not_infinite():
    """A perplexity overflows; JSON has no infinity."""
    from flexmerge_cli.evaluation.evaluate import score_record
    from flexmerge_cli.evaluation.scored import Scored, TaskModel

    scored = Scored(metric="perplexity", predictions=np.array([-1e6, -1e6]), labels=np.array([1, 1]))
    model = TaskModel(task="it", weights={}, folder=Path(), digest="0" * 32)
    record = score_record(scored, model, split=None)
    assert (record["value"], record["interval"], record["n"]) == (None, None, 2)
