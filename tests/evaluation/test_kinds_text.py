"""Kinds over whole texts: scores of real models equal those of a plain loop with transformers, exactly."""

import json

import numpy as np
import pytest
import sklearn.metrics
import torch
import transformers
from scipy.stats import pearsonr, spearmanr

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.scoring import Scorer

from . import tiny

N = 40


@pytest.fixture(scope="module")
def texts():
    return tiny.sentences(N, 1), tiny.sentences(N, 2)


def logits(model, *columns) -> np.ndarray:
    """One example at a time."""
    built = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with torch.inference_mode():
        found = [built(**tokenizer(*row, return_tensors="pt", truncation=True)).logits[0] for row in zip(*columns)]
    return torch.stack(found).numpy()


@pytest.mark.parametrize("pairs", [False, True])
def test_text_classification_equals_a_loop(tmp_path, texts, pairs):
    model = tiny.bert(tmp_path / "model", 3)
    columns = texts if pairs else texts[:1]
    labels = np.random.default_rng(0).integers(0, 3, N)
    data = tiny.rows(tmp_path / "d.jsonl", a=texts[0], b=texts[1], y=labels.tolist())
    names = {"text": "a", "label": "y"} | ({"pair": "b"} if pairs else {})
    found = tiny.scored(
        model,
        {"kind": "text-classification", "data": data, "columns": names, "metric": ["accuracy", "matthews", "f1_macro"]},
    )
    wanted = logits(model, *columns).argmax(-1)
    assert len(set(wanted)) > 1
    assert np.array_equal(found.predictions, wanted)
    assert found.value == sklearn.metrics.accuracy_score(labels, wanted)
    assert [other.value for other in found.others] == [
        sklearn.metrics.matthews_corrcoef(labels, wanted),
        sklearn.metrics.f1_score(labels, wanted, average="macro"),
    ]


def test_labels_by_name_are_those_of_the_config_or_the_spec(tmp_path, texts):
    names = ["no", "yes"]
    model = tiny.bert(
        tmp_path / "model", 2, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)}
    )
    labels = np.random.default_rng(0).integers(0, 2, N)
    by_number = tiny.rows(tmp_path / "n.jsonl", text=texts[0], label=labels.tolist())
    by_name = tiny.rows(tmp_path / "w.jsonl", text=texts[0], label=[names[n] for n in labels])
    other = tiny.rows(tmp_path / "o.jsonl", text=texts[0], label=[["nein", "ja"][n] for n in labels])
    values = [
        tiny.scored(model, {"kind": "text-classification", "data": by_number}).value,
        tiny.scored(model, {"kind": "text-classification", "data": by_name}).value,
        tiny.scored(model, {"kind": "text-classification", "data": other, "labels": ["nein", "ja"]}).value,
    ]
    assert len(set(values)) == 1


def test_a_decoder_with_a_head_reads_the_last_token_of_each_text(tmp_path, texts):
    config = transformers.GPT2Config(vocab_size=len(tiny.WORDS) + 4, n_embd=16, n_layer=1, n_head=2, num_labels=2)
    model = tiny.saved(tmp_path / "model", transformers.GPT2ForSequenceClassification(config), tiny.tokenizer())
    data = tiny.rows(tmp_path / "d.jsonl", text=texts[0], label=[0] * N)
    found = tiny.scored(model, {"kind": "text-classification", "data": data})
    assert np.array_equal(found.predictions, logits(model, texts[0]).argmax(-1))


def test_regression_equals_scipys_correlation_of_a_loop(tmp_path, texts):
    model = tiny.bert(tmp_path / "model", 1)
    labels = np.random.default_rng(3).normal(size=N)
    data = tiny.rows(tmp_path / "d.jsonl", text=texts[0], other=texts[1], score=labels.tolist())
    task = {"kind": "regression", "data": data, "columns": {"text": "text", "pair": "other"}, "batch_size": 1}
    found = tiny.scored(model, task | {"metric": ["pearson", "spearman"]})
    wanted = logits(model, *texts)[:, 0]
    assert np.array_equal(found.predictions, wanted)
    assert found.value == pearsonr(wanted, labels).statistic
    assert found.others[0].value == spearmanr(wanted, labels).statistic


def test_agreement_needs_no_labels_and_is_with_the_fine_tuned_model(tmp_path, texts):
    model, other = tiny.bert(tmp_path / "model", 3), tiny.bert(tmp_path / "other", 3)
    changed = transformers.AutoModelForSequenceClassification.from_pretrained(other)
    with torch.no_grad():
        changed.classifier.weight += 0.3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    changed.save_pretrained(other)
    data = tiny.rows(tmp_path / "d.jsonl", text=texts[0])
    task = {"kind": "text-classification", "data": data, "metric": "agreement"}
    found = tiny.scored(model, task, reference=other)
    ours, theirs = logits(model, texts[0]), logits(other, texts[0])
    assert found.metric == "agreement" and found.n == N
    assert found.value == (ours.argmax(-1) == theirs.argmax(-1)).mean() < 1
    divergence = torch.nn.functional.kl_div(
        *(torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (ours, theirs)),
        reduction="batchmean",
        log_target=True,
    )
    assert found.others[0].metric == "kl_divergence"
    assert found.others[0].value == pytest.approx(float(divergence), rel=1e-4)
    same = tiny.scored(model, task, reference=model)
    assert (same.value, same.others[0].value) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("labels", "config", "said"),
    [
        ([[1], [1, 2]], {}, "labels are integers or names"),
        (["a", "b"], {"label2id": {"a": "x", "b": "y"}}, "name the classes"),
        ([0, 1], {"architectures": 5}, None),
    ],
)
def test_labels_and_configs_that_are_not_what_they_should_be_are_told(tmp_path, labels, config, said):
    """Each was a traceback. A config that names no class of a model is taken for one that names none."""
    model = tiny.bert(tmp_path / "model", 2)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    data = tiny.rows(tmp_path / "d.jsonl", text=["red", "blue"], label=labels)
    spec = tiny.spec_of(tmp_path, {"kind": "text-classification", "data": data})
    if said is None:
        assert Scorer(spec=spec).examples("it", model).n == 2
    else:
        with pytest.raises(UsageError) as raised:
            Scorer(spec=spec).examples("it", model)
        assert said in str(raised.value.hint)
