"""Runs the two kinds with a head over a whole text: texts or pairs in, the head's outputs out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from flexmerge_cli.evaluation.data import Column, Table
from flexmerge_cli.evaluation.kinds.kind import Place, Run
from flexmerge_cli.evaluation.kinds.tokens import load_tokenizer, max_length
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.later import Tensor
from flexmerge_cli.record import Record

HEAD = "ForSequenceClassification"
TEXT = ("text", "sentence", "sentence1", "premise", "question", "input")


class SequenceColumns(Record):
    text: str | None = None
    pair: str | None = None
    label: str | None = None


class SequenceTask(TaskSpec):
    """The keys of both kinds."""

    columns: SequenceColumns = SequenceColumns()
    max_length: int | None = Field(default=None, ge=1)


def text_columns(columns: SequenceColumns) -> dict[str, Column]:
    pair = {"pair": Column(name=columns.pair)} if columns.pair is not None else {}
    return {"text": Column(name=columns.text, usual=TEXT)} | pair


def tokenised(table: Table, place: Place, task: SequenceTask) -> Any:
    """Encode the texts, or pairs, truncated to the model's length; returned with the tokenizer, which pads them."""
    tokenizer = load_tokenizer(place)
    length = max_length(tokenizer, place.side, task.max_length)
    texts = [table.texts(role, place) for role in ("text", "pair") if role in table.columns]
    rows = encodings(tokenizer, *texts, truncation=length is not None, max_length=length)
    empty = next((index for index, row in enumerate(rows) if not row["input_ids"]), None)
    if empty is not None:
        raise place.error("columns.text", f"{table.row(empty)} has no tokens", hint="leave out empty texts")
    return tokenizer, rows


def encodings(tokenizer: Any, *texts: Sequence[str], **options: Any) -> list[dict[str, list[int]]]:
    """Return the model's inputs for each text, or pair of texts. options: of the tokenizer."""
    encoded = tokenizer(*texts, **options)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    return [{name: encoded[name][index] for name in names} for index in range(len(texts[0]))]


def head_outputs(model: TaskModel, items: Any, run: Run) -> np.ndarray:
    """Return the outputs of the head, float32 [n, outputs]."""
    tokenizer, rows = items
    built = build_model(model, run.dtype, run.device, architecture=f"AutoModel{HEAD}", on_built=run.on_built)
    size = run.batch_size if takes_batches(built, tokenizer) else 1
    found = []
    for start in range(0, len(rows), size):
        found.append(head_batch(built, tokenizer, rows[start : start + size]))
        run.on_example(min(start + size, len(rows)), len(rows))
    return np.concatenate(found)


def takes_batches(built: Any, tokenizer: Any) -> bool:
    """Return whether the model takes several texts at once. Gives the tokenizer a token to pad with if it has none.

    A decoder finds the last token by the id of the padding; without padding it takes one text at a time.
    """
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    has_padding = tokenizer.pad_token is not None and built.config.pad_token_id is not None
    return has_padding or built.config.is_encoder_decoder or not _is_decoder(built)


def head_batch(built: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the outputs of the head for one batch of encodings, float32 [len(rows), outputs]."""
    import torch

    with torch.inference_mode():
        found: np.ndarray = built(**padded_batch(built, tokenizer, rows)).logits.float().cpu().numpy()
    return found


def padded_batch(built: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one batch of encodings as the model's inputs, on its device."""
    import torch

    if len(rows) == 1:
        inputs = {name: torch.tensor([rows[0][name]]) for name in rows[0]}
    else:
        inputs = dict(tokenizer.pad(rows, padding=True, return_tensors="pt"))
    return {name: value.to(built.device) for name, value in inputs.items()}


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tokens, [batch, width]. states: [batch, tokens, width]; mask: [batch, tokens, 1], 0 for
    padding."""
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


def _is_decoder(built: Any) -> bool:
    """Return whether the head reads the last token, like those of GPT-2 and Llama."""
    return hasattr(built, "score")
