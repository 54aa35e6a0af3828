"""Shared by the two kinds with a head over a whole text: texts or pairs in, the head's outputs out."""

from typing import Any

import numpy as np
from pydantic import Field

from flexmerge_cli.evaluation.data import Column, Table
from flexmerge_cli.evaluation.kinds.kind import Place, Run
from flexmerge_cli.evaluation.kinds.tokens import load_tokenizer, max_length
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

HEAD = "ForSequenceClassification"
TEXT = ("text", "sentence", "sentence1", "premise", "question", "input")


class Columns(Record):
    text: str | None = None
    pair: str | None = None
    label: str | None = None


class SequenceTask(TaskSpec):
    """The keys of both kinds."""

    columns: Columns = Columns()
    max_length: int | None = Field(default=None, ge=1)


def text_columns(columns: Columns) -> dict[str, Column]:
    pair = {"pair": Column(name=columns.pair)} if columns.pair is not None else {}
    return {"text": Column(name=columns.text, usual=TEXT)} | pair


def tokenised(table: Table, place: Place, task: SequenceTask) -> Any:
    """Encodings of the texts, or pairs, truncated to the model's length, with the tokenizer, which pads them."""
    tokenizer = load_tokenizer(place)
    length = max_length(tokenizer, place.side, task.max_length)
    texts = [table.texts(role, place) for role in ("text", "pair") if role in table.columns]
    encoded = tokenizer(*texts, truncation=length is not None, max_length=length)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    rows = [{name: encoded[name][index] for name in names} for index in range(len(table))]
    empty = next((index for index, row in enumerate(rows) if not row["input_ids"]), None)
    if empty is not None:
        raise place.error("columns.text", f"{table.row(empty)} has no tokens", hint="leave out empty texts")
    return tokenizer, rows


def head_outputs(model: TaskModel, items: Any, run: Run) -> np.ndarray:
    """The outputs of the head, float32 [n, outputs]."""
    import torch

    tokenizer, rows = items
    built = build_model(model, run.dtype, run.device, architecture=f"AutoModel{HEAD}")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    # A decoder finds the last token by the id of the padding; without padding it takes one text at a time.
    alone = tokenizer.pad_token is None or built.config.pad_token_id is None
    size = 1 if alone and not built.config.is_encoder_decoder and _is_decoder(built) else run.batch_size
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            inputs = {name: torch.tensor([batch[0][name]]) for name in batch[0]} if len(batch) == 1 else None
            inputs = inputs or dict(tokenizer.pad(batch, padding=True, return_tensors="pt"))
            inputs = {name: value.to(built.device) for name, value in inputs.items()}
            found.append(built(**inputs).logits.float().cpu().numpy())
            run.on_example(min(start + size, len(rows)), len(rows))
    return np.concatenate(found)


def _is_decoder(built: Any) -> bool:
    """Whether the head reads the last token, like those of GPT-2 and Llama."""
    return hasattr(built, "score")
