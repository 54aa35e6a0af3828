"""Language models: perplexity, choices and outputs equal those of a plain loop with transformers."""

import math

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr

from . import tiny

N = 25


def opened(model, auto):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return auto.from_pretrained(model).eval(), tokenizer


def token_losses(built, ids: list[int]) -> list[float]:
    """Minus log p of each token but the first, one prefix at a time."""
    found = []
    with torch.inference_mode():
        for end in range(1, len(ids)):
            logits = built(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
            found.append(float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([ids[end]]))))
    return found


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_perplexity_equals_a_loop_over_tokens(tmp_path, make):
    """A text begins with <s> in Llama's tokenizer, so its first word is scored, too; in GPT-2's it does not."""
    model = make(tmp_path / "model")
    texts = tiny.sentences(N)
    found = tiny.scored(model, {"kind": "causal-lm", "data": tiny.rows(tmp_path / "d.jsonl", text=texts)})
    built, tokenizer = opened(model, transformers.AutoModelForCausalLM)
    losses = [loss for text in texts for loss in token_losses(built, tokenizer(text)["input_ids"])]
    assert found.metric == "perplexity" and not found.higher_is_better and found.n == N
    assert found.labels.sum() == len(losses)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_text_longer_than_the_window_is_cut_into_windows(tmp_path):
    model = tiny.gpt2(tmp_path / "model")
    text = " ".join(tiny.WORDS[:10])
    data = tiny.rows(tmp_path / "d.jsonl", text=[text])
    found = tiny.scored(model, {"kind": "causal-lm", "data": data, "max_length": 4})
    built, tokenizer = opened(model, transformers.AutoModelForCausalLM)
    ids = tokenizer(text)["input_ids"]
    losses = [loss for start in range(0, 10, 4) for loss in token_losses(built, ids[start : start + 4])]
    assert found.labels.tolist() == [len(losses)] == [7]
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


@pytest.mark.parametrize("normalise", ["none", "tokens", "characters"])
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.llama])
def test_the_choice_is_the_likeliest_after_the_context(tmp_path, make, normalise):
    model = make(tmp_path / "model")
    rng = np.random.default_rng(0)
    contexts = tiny.sentences(N)
    choices = [[" ".join(rng.choice(tiny.WORDS, k)) for k in rng.integers(1, 5, 3)] for _ in range(N)]
    labels = rng.integers(0, 3, N)
    data = tiny.rows(tmp_path / "d.jsonl", context=contexts, choices=choices, label=labels.tolist())
    found = tiny.scored(
        model, {"kind": "causal-lm", "data": data, "columns": {"choices": "choices"}, "normalise": normalise}
    )
    built, tokenizer = opened(model, transformers.AutoModelForCausalLM)
    wanted = []
    for context, own in zip(contexts, choices):
        scores = []
        for choice in own:
            count = len(tokenizer(choice, add_special_tokens=False)["input_ids"])
            likelihood = -sum(token_losses(built, tokenizer(f"{context} {choice}")["input_ids"])[-count:])
            scores.append(likelihood / {"none": 1, "tokens": count, "characters": len(choice)}[normalise])
        wanted.append(int(np.argmax(scores)))
    assert found.predictions.tolist() == wanted and len(set(wanted)) > 1
    assert found.value == np.mean(np.array(wanted) == labels)


def test_choices_may_be_columns_and_labels_letters_or_texts(tmp_path):
    model = tiny.gpt2(tmp_path / "model")
    columns = {"context": ["red is", "one two"], "A": ["blue", "three"], "B": ["green", "four"], "x": ["B", "three"]}
    task = {"kind": "causal-lm", "columns": {"choices": ["A", "B"], "label": "x"}}
    found = tiny.scored(model, task | {"data": tiny.rows(tmp_path / "d.jsonl", **columns)})
    assert found.labels.tolist() == [1, 0]


def outputs(model, inputs: list[str], new_tokens: int) -> list[str]:
    built, tokenizer = opened(model, transformers.AutoModelForSeq2SeqLM)
    found = []
    with torch.inference_mode():
        for text in inputs:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            made = built.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False)
            found.append(tokenizer.decode(made[0], skip_special_tokens=True))
    return found


def test_text2text_outputs_equal_a_loop_and_are_compared_stripped_and_lower_cased(tmp_path):
    model = tiny.t5(tmp_path / "model")
    texts = tiny.sentences(N)
    wanted = outputs(model, [f"is {text}" for text in texts], 3)
    targets = [f" {text.upper()} " if n % 2 else "never" for n, text in enumerate(wanted)]
    task = {
        "kind": "text2text", "template": "is {question}", "metric": ["exact_match", "word_f1"], "max_new_tokens": 3,
        "data": tiny.rows(tmp_path / "d.jsonl", question=texts, target=targets),
    }  # fmt: skip
    found = tiny.scored(model, task)
    assert found.predictions.tolist() == [text.strip().lower() for text in wanted]
    assert found.value == (N // 2) / N == found.others[0].value


def test_outputs_are_classes_where_there_are_labels_and_none_of_them_is_a_miss_that_is_told(tmp_path):
    model = tiny.t5(tmp_path / "model")
    texts = tiny.sentences(N)
    made = outputs(model, texts, 2)
    first = made[0]
    data = tiny.rows(tmp_path / "d.jsonl", text=texts, label=[0] * N)
    task = {"kind": "text2text", "data": data, "labels": [[f" {first.upper()}", "other"], "never"], "max_new_tokens": 2}
    found = tiny.scored(model, task)
    hits = sum(text.strip().lower() == first.strip().lower() for text in made)
    assert 0 < hits < N and found.metric == "accuracy" and found.value == hits / N
    assert found.notes == (f"{N - hits} of {N} outputs are none of the labels",)


def test_numbers_are_parsed_and_what_is_none_is_told(tmp_path, monkeypatch):
    model = tiny.t5(tmp_path / "model")
    texts, labels = tiny.sentences(N), np.random.default_rng(0).integers(0, 6, N)
    said = [" 2.0 ", "three", "nan", *(str(label) for label in labels[3:])]
    # An untrained model says no numbers.
    monkeypatch.setattr("flexmerge_cli.evaluation.kinds.text2text._generated", lambda *_args: said)
    data = tiny.rows(tmp_path / "d.jsonl", text=texts, label=labels.tolist())
    found = tiny.scored(model, {"kind": "text2text", "data": data, "metric": "spearman"})
    assert found.notes == (f"2 of {N} outputs are not numbers",)
    known = np.isfinite(found.predictions)
    assert known.sum() == N - 2
    rest = spearmanr(found.predictions[known], labels[known]).statistic
    assert found.value == rest * (N - 2) / N


@pytest.mark.parametrize("normalise", ["none", "tokens"])
def test_ranking_takes_the_likeliest_label(tmp_path, normalise):
    model = tiny.t5(tmp_path / "model")
    texts, labels = tiny.sentences(N), ["negative", "positive one two"]
    targets = np.random.default_rng(0).integers(0, 2, N)
    data = tiny.rows(tmp_path / "d.jsonl", text=texts, label=[labels[n] for n in targets])
    task = {"kind": "text2text", "data": data, "labels": labels, "scoring": "rank", "normalise": normalise}
    found = tiny.scored(model, task)
    built, tokenizer = opened(model, transformers.AutoModelForSeq2SeqLM)
    wanted = []
    with torch.inference_mode():
        for text in texts:
            ids, scores = tokenizer(text, return_tensors="pt")["input_ids"], []
            for label in labels:
                target = tokenizer(label, return_tensors="pt")["input_ids"]
                mean = -float(built(input_ids=ids, labels=target).loss)
                scores.append(mean if normalise == "tokens" else mean * target.shape[1])
            wanted.append(int(np.argmax(scores)))
    assert found.predictions.tolist() == wanted and found.value == np.mean(np.array(wanted) == targets)


def test_ranking_takes_the_likeliest_of_each_examples_own_choices(tmp_path):
    model = tiny.t5(tmp_path / "model")
    choices = [["red", "blue"], ["one", "two", "three"]]
    data = tiny.rows(tmp_path / "d.jsonl", text=tiny.sentences(2), choices=choices, target=["blue", "one"])
    found = tiny.scored(model, {"kind": "text2text", "data": data, "scoring": "rank"})
    assert found.metric == "exact_match"
    assert all(text in own for text, own in zip(found.predictions, choices))


def test_agreement_of_text2text_is_exact_match_of_outputs(tmp_path):
    model, other = tiny.t5(tmp_path / "model"), tiny.t5(tmp_path / "other")
    changed = transformers.T5ForConditionalGeneration.from_pretrained(other)
    with torch.no_grad():
        changed.shared.weight[10:20] += 0.3
    changed.save_pretrained(other)
    texts = tiny.sentences(N)
    data = tiny.rows(tmp_path / "d.jsonl", text=texts)
    task = {"kind": "text2text", "data": data, "metric": "agreement", "max_new_tokens": 3}
    found = tiny.scored(model, task, reference=other)
    ours, theirs = outputs(model, texts, 3), outputs(other, texts, 3)
    assert found.metric == "agreement" and found.value == np.mean([a == b for a, b in zip(ours, theirs)])
    assert found.others == ()


def test_an_empty_text_has_nothing_to_predict_also_where_no_window_is_told(tmp_path, monkeypatch):
    """It was cut into windows of no token."""
    monkeypatch.setattr("flexmerge_cli.evaluation.kinds.causal_lm.max_length", lambda *_args: None)
    model = tiny.llama(tmp_path / "model")
    data = tiny.rows(tmp_path / "d.jsonl", text=["red blue", ""])
    found = tiny.scored(model, {"kind": "causal-lm", "data": data})
    assert found.labels.tolist() == [2, 0]
