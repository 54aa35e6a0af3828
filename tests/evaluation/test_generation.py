"""Metrics of generated texts against definitions written out here, and `text2text` with them."""

import math
from collections import Counter

import numpy as np
import pytest

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.intervals import interval, resamples
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.scored import Scored

from . import tiny

TEXTS = np.array(["the cat sat on the mat", "a dog ran far away", "red is not blue", "one two three", ""])
REFERENCES = np.array(
    [
        "the cat is on the mat\nthere is a cat on the mat",
        "the dog ran away",
        "red is not blue",
        "three two one\none",
        "no",
    ]
)
PAIRS = [(text.split(), [line.split() for line in lines.split("\n")]) for text, lines in zip(TEXTS, REFERENCES)]


def grams(words: list[str], order: int) -> Counter:
    return Counter(tuple(words[place : place + order]) for place in range(len(words) - order + 1))


def bleu(pairs: list) -> float:
    """Papineni et al. (2002), over the corpus; an order without a match counts half as much as the one before (exp)."""
    logs, halves = [], 1.0
    for order in range(1, 5):
        hits = whole = 0
        for words, references in pairs:
            most = Counter()
            for reference in references:
                most |= grams(reference, order)
            hits, whole = hits + (grams(words, order) & most).total(), whole + grams(words, order).total()
        halves = halves * 2 if hits == 0 else halves
        logs.append(math.log(hits / whole if hits else 1 / (halves * whole)))
    length = sum(len(words) for words, _ in pairs)
    nearest = sum(min((abs(len(r) - len(words)), len(r)) for r in references)[1] for words, references in pairs)
    return min(1.0, math.exp(1 - nearest / length)) * math.exp(sum(logs) / 4)


def common(left: list[str], right: list[str]) -> int:
    """The length of the longest common subsequence."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + common(left[:-1], right[:-1])
    return max(common(left[:-1], right), common(left, right[:-1]))


def f_measure(hits: int, own: int, given: int) -> float:
    return 2 * hits / (own + given) if hits else 0.0


def rouge(words: list[str], reference: list[str], order: int) -> float:
    if order == 0:
        return f_measure(common(words, reference), len(words), len(reference))
    own, given = grams(words, order), grams(reference, order)
    return f_measure((own & given).total(), own.total(), given.total())


def cider(pairs: list) -> list[float]:
    """CIDEr-D of Vedantam et al. (2015), with clipped counts and a Gaussian of the difference in length, σ = 6."""
    total = [0.0] * len(pairs)
    for order in range(1, 5):
        held = Counter()
        for _, references in pairs:
            held.update({gram for reference in references for gram in grams(reference, order)})

        def weighed(words: list[str], order: int = order, held: Counter = held) -> dict:
            counts = grams(words, order)
            return {gram: n * (math.log(len(pairs)) - math.log(max(1, held[gram]))) for gram, n in counts.items()}

        for row, (words, references) in enumerate(pairs):
            own = weighed(words)
            for reference in references:
                given = weighed(reference)
                norm = math.hypot(*own.values()) * math.hypot(*given.values())
                dot = sum(min(value, given.get(gram, 0.0)) * given.get(gram, 0.0) for gram, value in own.items())
                # The library takes the difference in the number of pairs of words.
                apart = max(0, len(words) - 1) - max(0, len(reference) - 1)
                kept = math.exp(-(apart**2) / (2 * 6**2))
                total[row] += (dot / norm if norm else dot) * kept / len(references) * 10 / 4
    return total


def test_bleu_is_that_of_the_corpus():
    assert METRICS["bleu"].value(TEXTS, REFERENCES) == pytest.approx(bleu(PAIRS), rel=1e-12)
    assert METRICS["bleu"].value(TEXTS[2:3], REFERENCES[2:3]) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "order"), [("rouge1", 1), ("rouge2", 2), ("rougeL", 0)])
def test_rouge_is_the_best_f_measure_of_the_references(name, order):
    wanted = [max(rouge(words, reference, order) for reference in references) for words, references in PAIRS]
    assert METRICS[name].outcomes(TEXTS, REFERENCES) == pytest.approx(wanted)


def test_meteor_weighs_recall_and_counts_chunks():
    found = METRICS["meteor"].outcomes(TEXTS, REFERENCES)
    # red is not blue: one chunk of four words. a dog ran far away: dog ran, away; 3 of 5 and 3 of 4 words.
    mean = (3 / 5) * (3 / 4) / (0.9 * 3 / 5 + 0.1 * 3 / 4)
    assert found[2] == pytest.approx(1 - 0.5 * (1 / 4) ** 3)
    assert found[1] == pytest.approx(mean * (1 - 0.5 * (2 / 3) ** 3))
    assert found[4] == 0.0


def test_cider_weighs_rare_words():
    assert METRICS["cider"].outcomes(TEXTS, REFERENCES) == pytest.approx(cider(PAIRS))


def test_an_interval_of_bleu_is_that_of_bleu_on_resamples():
    scored = Scored(metric="bleu", predictions=TEXTS[:3], labels=REFERENCES[:3])
    draws = [bleu([PAIRS[n] for n in rows]) for rows in resamples(3, 0)]
    assert interval(scored) == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_generated_texts_are_scored_against_one_or_several_references(tmp_path):
    model = tiny.t5(tmp_path / "model")
    texts = tiny.sentences(6)
    task = {"kind": "text2text", "metric": ["rougeL", "bleu", "cider"], "max_new_tokens": 6}
    one = tiny.rows(tmp_path / "one.jsonl", text=texts, target=texts)
    both = tiny.rows(tmp_path / "both.jsonl", text=texts, target=[[text, "red is\nblue"] for text in texts])
    first, second = (tiny.scored(model, {**task, "data": data}) for data in (one, both))
    assert list(first.labels) == texts and list(second.labels) == [f"{text}\nred is blue" for text in texts]
    assert [other.metric for other in first.others] == ["bleu", "cider"]
    assert np.array_equal(first.predictions, second.predictions) and second.value >= first.value


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = tiny.t5(tmp_path / "model")
    data = tiny.rows(tmp_path / "data.jsonl", text=tiny.sentences(2), target=[["red"], []])
    with pytest.raises(UsageError, match=r"row 2 of data\.jsonl has no reference"):
        tiny.scored(model, {"kind": "text2text", "metric": "bleu", "data": data})
    with pytest.raises(UsageError, match="`bleu` needs generated texts"):
        tiny.scored(model, {"kind": "text2text", "metric": "bleu", "data": data, "scoring": "rank", "labels": ["red"]})
