"""Labelled texts for make_texts.py, made from the docstrings of the Python packages that are installed.

The standard library, numpy, scikit-learn, torch and transformers are read as text, and none of them is imported.
The labels depend on the order of words, or on a pair of texts: what a text is about, a linear head on the frozen base
already knows.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

LIBRARIES = ("numpy", "sklearn", "torch", "transformers")
MAX_FILES = 250  # of one library
FEWEST_WORDS, MOST_WORDS = 7, 12  # of a passage

Row = dict[str, str]
"""`text`, perhaps `pair`, and `label`."""
Words = list[str]


class Corpus:
    """Docstrings, none of them twice, and their passages."""

    def __init__(self, docs: Iterable[str]) -> None:
        self.docs = list(dict.fromkeys(docs))
        self.passages = list(_passages(self.docs))
        """The first words of every paragraph of prose, in lower case and without punctuation, none twice."""


def _passages(docs: Iterable[str]) -> Iterator[Words]:
    paragraphs = (paragraph for doc in docs for paragraph in doc.split("\n\n"))
    found = (tuple(words_of(text)[:MOST_WORDS]) for text in paragraphs if not re.search(r"[>=|\[{]|::|--", text))
    yield from (list(words) for words in dict.fromkeys(found) if len(words) >= FEWEST_WORDS)


def words_of(text: str) -> Words:
    return re.findall(r"[a-z0-9]+(?:['-][a-z]+)*", text.lower())


def read_corpus() -> Corpus:
    return Corpus(doc for file in _files() for doc in _docstrings(file))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            yield doc


def _files() -> Iterator[Path]:
    for root in (Path(sysconfig.get_path("stdlib")), *(Path(sysconfig.get_path("purelib")) / n for n in LIBRARIES)):
        inside = [file.relative_to(root) for file in root.rglob("*.py")]
        own = [path for path in inside if "site-packages" not in path.parts and "test" not in str(path).lower()]
        yield from (root / path for path in sorted(own)[:MAX_FILES])


# ---- tasks ----


def exchanged(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask whether the halves of a passage are exchanged."""
    for words in corpus.passages:
        label, half = ("original", "exchanged")[rng.integers(2)], len(words) // 2
        yield {"text": " ".join(words[half:] + words[:half] if label == "exchanged" else words), "label": label}


def where(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask which third of a passage has its only `the`."""
    for words in corpus.passages:
        if words.count("the") == 1:
            yield {"text": " ".join(words), "label": ("first", "second", "third")[3 * words.index("the") // len(words)]}


def sooner(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask which of two words of a passage, `of` and `the`, is first."""
    for words in corpus.passages:
        if {"of", "the"} <= set(words):
            yield {"text": " ".join(words), "label": min("of", "the", key=words.index)}


def contains(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask whether a passage has a word."""
    found = corpus.passages
    for words in found:
        label = ("yes", "no")[rng.integers(2)]
        other = words if label == "yes" else found[rng.integers(len(found))]
        word = other[rng.integers(len(other))]
        if (word in words) == (label == "yes"):
            yield {"text": word, "pair": " ".join(words), "label": label}


def half(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask which half of a passage has a word."""
    for words in corpus.passages:
        place = rng.integers(len(words))
        if words.count(words[place]) == 1:
            label = "first" if 2 * place < len(words) - 1 else "second"
            yield {"text": words[place], "pair": " ".join(words), "label": label}


def longer(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask which of two passages has more words."""
    found = corpus.passages
    for words in found:
        other = found[rng.integers(len(found))]
        words, other = words[:10], other[:10]
        if len(words) != len(other):
            label = "first" if len(words) > len(other) else "second"
            yield {"text": " ".join(words), "pair": " ".join(other), "label": label}


def order(corpus: Corpus, rng: np.random.Generator) -> Iterator[Row]:
    """Ask whether the first two paragraphs of a docstring are in order."""
    for doc in corpus.docs:
        found = [words_of(part)[:10] for part in doc.split("\n\n")[:2]]
        if len(found) == 2 and all(len(part) >= 4 for part in found):
            label = ("in order", "exchanged")[rng.integers(2)]
            first, second = found if label == "in order" else found[::-1]
            yield {"text": " ".join(first), "pair": " ".join(second), "label": label}


TASKS: dict[str, Callable[[Corpus, np.random.Generator], Iterator[Row]]] = {
    task.__name__: task for task in (where, half, contains, sooner, longer, exchanged, order)
}


def rows_of(task: str, corpus: Corpus, count: int, seed: int) -> list[Row]:
    """Draw up to `count` examples, as many of each label as there can be."""
    rng = np.random.default_rng(seed)
    found = list(TASKS[task](corpus, rng))
    labels = sorted({row["label"] for row in found})
    left = dict.fromkeys(labels, count // len(labels))
    taken: list[Row] = []
    for number in rng.permutation(len(found)):
        row = found[number]
        if left[row["label"]] > 0:
            left[row["label"]] -= 1
            taken.append(row)
    return taken
