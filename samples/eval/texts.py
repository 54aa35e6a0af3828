"""Made-up texts with labels, and tokenizers of one token per word, for make_models.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

NUM_TRAIN, NUM_TEST = 512, 120
LENGTH = 24
Row = dict[str, Any]

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
GOOD, BAD, FILLERS = ("fine", "good", "great"), ("poor", "bad", "dull"), ("a", "the", "very", "quite", "was", "is")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DIGITS = tuple("0123456789")
TASK_WORDS = ("judge", "count", "then", "and", ":", "positive", "negative")
WORDS = (*ANIMALS, *GOOD, *BAD, *FILLERS, *DAYS, *DIGITS, *TASK_WORDS)


# ---- texts with labels ----


def judged(rng: np.random.Generator) -> Row:
    """A sentence of good or bad words: 1 where the good ones are more."""
    good = int(rng.integers(4))
    words = [*rng.choice(GOOD, good), *rng.choice(BAD, 3 - good), *rng.choice(FILLERS, 3)]
    return {"sentence": " ".join(rng.permutation(words)), "label": int(good >= 2)}


def better(rng: np.random.Generator) -> Row:
    """Two sentences of three judgements: which has more good ones."""
    first, second = rng.permutation(4)[:2]
    texts = [" ".join(rng.permutation([*rng.choice(GOOD, n), *rng.choice(BAD, 3 - n)])) for n in (first, second)]
    return {"sentence1": texts[0], "sentence2": texts[1], "label": ("second", "first")[int(first > second)]}


def share_of_good(rng: np.random.Generator) -> Row:
    """A sentence of six judgements, and which part of them is good."""
    good = int(rng.integers(7))
    words = rng.permutation([*rng.choice(GOOD, good), *rng.choice(BAD, 6 - good)])
    return {"sentence": " ".join(words), "score": good / 6}


def how_much_better(rng: np.random.Generator) -> Row:
    """The same, and by how many."""
    first, second = rng.integers(4, size=2)
    texts = [" ".join(rng.permutation([*rng.choice(GOOD, n), *rng.choice(BAD, 3 - n)])) for n in (first, second)]
    return {"sentence1": texts[0], "sentence2": texts[1], "score": int(first - second)}


def days(rng: np.random.Generator) -> Row:
    """Days of the week in order, from any on."""
    start = int(rng.integers(7))
    return {"text": " ".join(DAYS[(start + step) % 7] for step in range(int(rng.integers(5, 10))))}


def next_day(rng: np.random.Generator) -> Row:
    """Two days, and three that could be the next."""
    start = int(rng.integers(7))
    choices = [DAYS[(start + step) % 7] for step in rng.choice([2, 3, 4, 5, 6], 3, replace=False)]
    if DAYS[(start + 2) % 7] not in choices:
        choices[int(rng.integers(3))] = DAYS[(start + 2) % 7]
    right = choices.index(DAYS[(start + 2) % 7])
    context = f"{DAYS[start]} then {DAYS[(start + 1) % 7]} then"
    return {"context": context, "choices": choices, "label": right, "text": f"{context} {choices[right]}"}


def counted(rng: np.random.Generator) -> Row:
    """A sentence, and how many of its words are good, as a digit."""
    good = int(rng.integers(6))
    words = rng.permutation([*rng.choice(GOOD, good), *rng.choice(BAD, 5 - good)])
    return {"sentence": " ".join(words), "number": str(good)}


def rows_of(make: Callable[[np.random.Generator], Row], seed: int) -> tuple[list[Row], list[Row]]:
    """To train on, and to test on."""
    rng = np.random.default_rng(seed)
    rows = [make(rng) for _ in range(NUM_TRAIN + NUM_TEST)]
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]


# ---- tokenizers ----


def word_tokenizer(start: str | None, end: str | None, between: str | None) -> transformers.PreTrainedTokenizerFast:
    """One token a word. start, end, between: special tokens around a text, and between two."""
    special = [token for token in ("[PAD]", "[UNK]", start, end, between) if token is not None]
    special = list(dict.fromkeys(special))
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    one = [*([start] if start else []), "$A", *([end or between] if end or between else [])]
    two = [*one, "$B:1", f"{between}:1"] if between else None
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(one), pair=" ".join(two) if two else None,
        special_tokens=[(token, special.index(token)) for token in special[2:]],
    )  # fmt: skip
    names = {"bos_token": start, "eos_token": end, "cls_token": start if between else None, "sep_token": between}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=LENGTH,
        **{key: token for key, token in names.items() if token is not None},
    )  # fmt: skip
