"""Computes log likelihoods of continuations, from rows of token ids with the positions that count. torch, no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flexmerge_cli.evaluation.kinds.kind import Run
from flexmerge_cli.evaluation.kinds.tokens import padded

Normalise = Literal["none", "tokens", "characters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """The input of a decoder, and the position from which its tokens are scored."""

    ids: tuple[int, ...]
    first: int
    """The index of the first scored token, at least 1: each token is predicted from those before it."""


def decoder_likelihoods(built: Any, rows: Sequence[Continuation], run: Run) -> np.ndarray:
    """Sum log p(token | tokens before it) over each row's scored tokens, float64 [n], with a float32 log-softmax."""
    import torch

    found = np.zeros(len(rows))
    with torch.inference_mode():
        for start, stop in run.batches(len(rows)):
            batch = rows[start:stop]
            ids, mask = padded([row.ids for row in batch], 0)
            ids, mask = ids.to(built.device), mask.to(built.device)
            logits = built(input_ids=ids, attention_mask=mask).logits
            for index, row in enumerate(batch):
                places = slice(row.first - 1, len(row.ids) - 1)  # these predict what is scored
                found[start + index] = _sum(logits[index, places], ids[index, row.first : len(row.ids)])
    return found


def target_likelihoods(
    built: Any, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], run: Run
) -> np.ndarray:
    """Sum log p(target token | input, target tokens before it) of an encoder–decoder, float64 [n]."""
    import torch

    found = np.zeros(len(inputs))
    with torch.inference_mode():
        for start, stop in run.batches(len(inputs)):
            ids, mask = padded(inputs[start:stop], 0)
            wanted, scored = padded(targets[start:stop], 0)
            labels = wanted.masked_fill(scored == 0, -100).to(built.device)
            inputs_on = ids.to(built.device), mask.to(built.device)
            logits = built(input_ids=inputs_on[0], attention_mask=inputs_on[1], labels=labels).logits
            for index, target in enumerate(targets[start:stop]):
                found[start + index] = _sum(logits[index, : len(target)], wanted[index, : len(target)].to(built.device))
    return found


def _sum(logits: Any, tokens: Any) -> float:
    """Sum log likelihoods. logits [t, vocabulary], tokens [t]. One row at a time: a batch's log-softmax would double
    the memory."""
    import torch

    each = torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])
    return float(each.double().sum())


def best_of(
    likelihoods: np.ndarray, tokens: Sequence[int], texts: Sequence[str], counts: Sequence[int], normalise: Normalise
) -> np.ndarray:
    """Return the index of the most likely choice of each example, int64 [n]; the first among equals.

    likelihoods, tokens, texts: of all choices of all examples, one after another; counts: choices of each, [n].
    """
    lengths = {"none": [1] * len(texts), "tokens": tokens, "characters": [len(text) for text in texts]}[normalise]
    scores = likelihoods / np.maximum(1, lengths)
    ends = np.cumsum(counts)
    return np.array([int(np.argmax(scores[end - count : end])) for end, count in zip(ends, counts)], np.int64)
