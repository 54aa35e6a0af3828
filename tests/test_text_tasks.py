"""The labelled texts of samples/text_tasks.py: every label follows from its texts."""

import importlib
from collections import Counter

import pytest

from .program import ROOT

VERBS = ("Return", "Compute", "Check", "Create", "Count", "Sort")
DOCS = [
    f"{verb} {'a' if n % 2 else 'the'} largest {noun} of {'the' if n % 3 else 'an'} array in {n}{'th' * (n % 4)} order."
    f"\n\nEmpty {noun}s are left out of the {verb.lower()}ed ones."
    for n in range(12)
    for verb in VERBS
    for noun in ("value", "row", "item")
]
THIRDS = ("first", "second", "third")


@pytest.fixture(scope="module")
def texts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "samples")
        return importlib.import_module("text_tasks")


@pytest.fixture(scope="module")
def corpus(texts):
    return texts.Corpus(DOCS)


def label_of(task, row, passages):
    """The label, anew from the texts."""
    words, pair = row["text"].split(), row.get("pair", "").split()
    match task:
        case "where":
            return THIRDS[3 * words.index("the") // len(words)]
        case "sooner":
            return next(word for word in words if word in ("of", "the"))
        case "exchanged":
            return "original" if row["text"] in passages else "exchanged"
        case "contains":
            return "yes" if set(words) <= set(pair) else "no"
        case "half":
            return "first" if 2 * pair.index(words[0]) < len(pair) - 1 else "second"
        case "longer":
            return "first" if len(words) > len(pair) else "second"
        case "order":
            return "in order" if words[0] != "empty" else "exchanged"


def test_every_label_follows_from_the_texts(texts, corpus):
    passages = {" ".join(words) for words in corpus.passages}
    for task in texts.TASKS:
        rows = texts.rows_of(task, corpus, 40, seed=1)
        assert len(rows) > 10
        assert all(row["label"] == label_of(task, row, passages) for row in rows), task


def test_texts_are_the_same_for_a_seed_and_labels_are_balanced(texts, corpus):
    for task in texts.TASKS:
        rows = texts.rows_of(task, corpus, 40, seed=3)
        assert rows == texts.rows_of(task, corpus, 40, seed=3) != texts.rows_of(task, corpus, 40, seed=4)
        counts = Counter(row["label"] for row in rows)
        labels = {row["label"] for row in texts.rows_of(task, corpus, 10**6, seed=3)}
        assert set(counts) == labels and max(counts.values()) <= 40 // len(labels), task


def test_passages_are_prose_of_bounded_length_and_none_is_there_twice(texts):
    code = ">>> largest(rows, of=array) and then some more words here\n\n"
    found = texts.Corpus([DOCS[0], DOCS[0], code + DOCS[0], DOCS[1]]).passages
    assert len({tuple(words) for words in found}) == len(found) == 4
    assert all(texts.FEWEST_WORDS <= len(words) <= texts.MOST_WORDS for words in found)
    assert not any(">>>" in word or "=" in word for words in found for word in words)
