"""Code of one's own, and lm-evaluation-harness: what comes back is a score, and what does not is an error."""

import json
import sys

import numpy as np
import pytest

from flexmerge_cli.errors import DataError

from . import tiny

CODE = """
import numpy as np

def elements(weights, folder, *, scale=1):
    assert (folder / "config.json").is_file()
    return scale * sum(tensor.numel() for tensor in weights.values())

def compared(weights, folder):
    return {"metric": "accuracy", "predictions": np.array([0, 1, 1, 1]), "labels": [0, 1, 0, 1]}

def fails(weights, folder):
    raise RuntimeError("no luck")

def nonsense(weights, folder):
    return {"value": "much"}
"""


@pytest.fixture
def model(tmp_path):
    return tiny.gpt2(tmp_path / "model")


def elements(model) -> int:
    import transformers

    return sum(p.numel() for p in transformers.GPT2LMHeadModel.from_pretrained(model).parameters())


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module beside the spec, forgotten after the test."""
    (tmp_path / "mine.py").write_text(CODE)
    yield
    sys.modules.pop("mine", None)


def test_a_function_beside_the_spec_gets_weights_side_files_and_options(model, mine):
    found = tiny.scored(model, {"kind": "python:mine:elements", "options": {"scale": 2}, "metric": "size"})
    assert (found.metric, found.value, found.n) == ("size", 2 * elements(model), 0)


def test_predictions_and_labels_of_a_function_have_an_interval_like_any_other(model, mine):
    found = tiny.scored(model, {"kind": "python:mine:compared"})
    assert (found.value, found.n) == (0.75, 4) and found.outcomes.tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize(("name", "said"), [("fails", "RuntimeError: no luck"), ("nonsense", "value: ")])
def test_a_function_that_fails_or_gives_no_score_is_told(model, mine, name, said):
    with pytest.raises(DataError) as raised:
        tiny.scored(model, {"kind": f"python:mine:{name}"})
    assert said in raised.value.message and "task `it`" in raised.value.message


PROGRAM = """
import json, sys
from safetensors import safe_open
with safe_open(sys.argv[1] + "/model.safetensors", "pt") as file:
    count = sum(file.get_tensor(name).numel() for name in file.keys())
assert json.load(open(sys.argv[1] + "/config.json"))["model_type"] == "gpt2"
print("working on", sys.argv[2])
print(json.dumps({"value": count, "n": 7, "interval": [0, 1e9], "metric": "size", "higher_is_better": False}))
"""


def test_a_command_gets_the_model_as_a_folder_and_prints_its_score(model, tmp_path):
    (tmp_path / "score.py").write_text(PROGRAM)
    task = {"kind": "command", "command": [sys.executable, "score.py", "{checkpoint}", "{task}"]}
    found = tiny.scored(model, task)
    assert (found.value, found.n, found.higher_is_better) == (elements(model), 7, False)
    assert found.given.interval == (0, 1e9)


def test_what_a_command_gets_loads_in_transformers_with_the_same_logits(model, tmp_path):
    import torch
    import transformers

    from flexmerge_cli.evaluation.materialise import materialised

    with materialised(tiny.source_model("it", str(model))) as folder:
        models = [transformers.GPT2LMHeadModel.from_pretrained(path).eval() for path in (model, folder)]
    assert not folder.exists()
    ids = torch.arange(10)[None]
    assert torch.equal(*(built(ids).logits for built in models))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('so sorry', file=sys.stderr); sys.exit(3)", "exited with 3\n  so sorry"),
        ("print('done')", "printed no JSON"),
        ("print('[1, 2]')", "is not a score"),
        ("print('{\"value\": NaN}')", "value"),
        ('print(\'{"predictions": [1], "labels": [1, 2], "metric": "accuracy"}\')', "of the same length"),
        ('print(\'{"predictions": [1], "labels": [1], "metric": "blue"}\')', "not a metric of flexmerge"),
    ],
)
def test_a_command_that_fails_or_prints_no_score_is_told(model, tmp_path, code, said):
    task = {"kind": "command", "command": [sys.executable, "-c", code + "  # {checkpoint}"]}
    with pytest.raises(DataError) as raised:
        tiny.scored(model, task)
    assert said in raised.value.message


def test_a_command_that_takes_too_long_is_stopped(model):
    task = {"kind": "command", "command": [sys.executable, "-c", "import time; time.sleep(60)  # {checkpoint}"]}
    with pytest.raises(DataError) as raised:
        tiny.scored(model, task | {"timeout_s": 0.5})
    assert "0.5 s" in raised.value.message


HARNESS = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
def test_lm_eval_agrees_with_our_multiple_choice(model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    columns = {
        "context": tiny.sentences(12),
        "choices": [[" ".join(rng.choice(tiny.WORDS, 2)) for _ in range(3)] for _ in range(12)],
        "label": rng.integers(0, 3, 12).tolist(),
    }
    data = tiny.rows(tmp_path / "d.jsonl", **columns)
    ours = tiny.scored(
        model, {"kind": "causal-lm", "data": data, "columns": {"choices": "choices"}, "normalise": "none"}
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(HARNESS.format(data=json.dumps(str(tmp_path / data))))
    theirs = tiny.scored(model, {"kind": "lm-eval", "task": "colours", "include_path": "tasks", "metric": "acc"})
    assert (theirs.value, theirs.n, theirs.metric) == (ours.value, 12, "acc")
    assert theirs.given.interval[0] < theirs.value < theirs.given.interval[1]
