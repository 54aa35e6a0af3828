"""Computes metrics of generated texts with the libraries that papers use: BLEU, ROUGE, METEOR, CIDEr.

texts       str [n]
references  str [n]; several references of one text are on a line each
BLEU is sacreBLEU's (13a tokens, case-sensitive), ROUGE is the F-measure of rouge-score without stemming, METEOR is
NLTK's with exact and stem matches and without WordNet, whose data is not a package, and CIDEr is that of pycocoevalcap.
METEOR and CIDEr compare lower-case words without punctuation. With several references, the best counts for ROUGE and
METEOR.
"""

import re
from functools import cache
from typing import Any

import numpy as np

EXTRA = "flexmerge-cli[generation]"
ORDERS = 4  # BLEU counts n-grams of 1 to 4 words.


def bleu_statistics(texts: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return what BLEU adds up over texts, int64 [n, 10]: matches and n-grams of each order, lengths of both."""
    from sacrebleu.metrics.bleu import BLEU

    found = np.zeros((len(texts), 2 * ORDERS + 2), np.int64)
    scorer = BLEU(effective_order=True)
    for row, (text, lines) in enumerate(zip(texts, references)):
        score = scorer.sentence_score(str(text), str(lines).split("\n"))
        found[row] = (*score.counts, *score.totals, score.sys_len, score.ref_len)
    return found


def bleu(sums: np.ndarray) -> float:
    """Return the BLEU of a corpus, from 0 to 1, from the sums of its statistics."""
    from sacrebleu.metrics.bleu import BLEU

    whole = [int(number) for number in sums]
    score = BLEU.compute_bleu(whole[:ORDERS], whole[ORDERS : 2 * ORDERS], whole[-2], whole[-1], smooth_method="exp")
    return float(score.score) / 100


def rouge(kind: str, texts: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the F-measures, float64 [n]. kind: `rouge1`, `rouge2` or `rougeL`."""
    scorer = _rouge_scorer(kind)
    return np.array(
        [scorer.score_multi(str(lines).split("\n"), str(text))[kind].fmeasure for text, lines in zip(texts, references)]
    )


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


class _NoSynonyms:
    """Replaces WordNet, without any synonyms."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def meteor(texts: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the METEOR of each text, float64 [n]."""
    from nltk.translate.meteor_score import meteor_score

    return np.array(
        [
            meteor_score([words(line) for line in str(lines).split("\n")], words(str(text)), wordnet=_NoSynonyms())
            for text, lines in zip(texts, references)
        ]
    )


def cider(texts: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the CIDEr-D of each text, float64 [n], from 0 to 10.

    Words are weighted by how many of the n references contain them.
    """
    from pycocoevalcap.cider.cider import Cider

    own = {row: [" ".join(words(str(text)))] for row, text in enumerate(texts)}
    given = {row: [" ".join(words(line)) for line in str(lines).split("\n")] for row, lines in enumerate(references)}
    return np.asarray(Cider().compute_score(given, own)[1], np.float64)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
