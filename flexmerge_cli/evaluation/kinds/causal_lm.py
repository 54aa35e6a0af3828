"""Scores `causal-lm`: perplexity of texts, or multiple choice by the likelihood of each choice after a context.

columns     text, for perplexity; or context (optional), choices (a list, or several columns), label (the index of the
            right one, or its text), for accuracy
normalise   the likelihoods of choices by `tokens` (default), `characters` or `none`
join        the text between context and choice; by default a space
max_length  tokens of a window; by default the tokenizer's. Longer texts are cut into windows, each predicted by itself:
            its first token is not scored. Longer contexts lose their beginning
If the tokenizer adds a beginning-of-text token, it comes first and is not scored.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from flexmerge_cli.evaluation.data import Column, Table, read_table
from flexmerge_cli.evaluation.kinds.choices import choice_columns, choices_of, right_choice
from flexmerge_cli.evaluation.kinds.classes import check_architecture
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.kinds.likelihood import Continuation, Normalise, best_of, decoder_likelihoods
from flexmerge_cli.evaluation.kinds.tokens import load_tokenizer, max_length
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

HEADS = ("ForCausalLM", "LMHeadModel")


class CausalColumns(Record):
    text: str | None = None
    context: str | None = None
    choices: str | tuple[str, ...] | None = None
    label: str | None = None


class CausalLm(TaskSpec):
    kind: Literal["causal-lm"]
    columns: CausalColumns = CausalColumns()
    normalise: Normalise = "tokens"
    join: str = " "
    max_length: int | None = Field(default=None, ge=2)


def prepare(task: CausalLm, place: Place) -> Examples:
    check_architecture(task, place, *HEADS)
    tokenizer = load_tokenizer(place)
    length = max_length(tokenizer, place.side, task.max_length)
    if task.columns.choices is None:
        return _texts(task, place, tokenizer, length)
    return _choices(task, place, tokenizer, length)


def score(model: TaskModel, task: CausalLm, examples: Examples, run: Run) -> Sequence[Scored]:
    built = build_model(model, run.dtype, run.device, architecture="AutoModelForCausalLM", on_built=run.on_built)
    rows, rest = examples.items
    found = decoder_likelihoods(built, rows, run)
    if task.columns.choices is None:
        owners = rest
        sums, tokens = np.zeros(examples.n), np.zeros(examples.n, np.int64)
        np.add.at(sums, owners, found)
        np.add.at(tokens, owners, [len(row.ids) - row.first for row in rows])
        return [Scored(metric=name, predictions=sums, labels=tokens) for name in examples.metrics]
    texts, counts, labels = rest
    lengths = [len(row.ids) - row.first for row in rows]
    chosen = best_of(found, lengths, texts, counts, task.normalise)
    return [Scored(metric=name, predictions=chosen, labels=labels) for name in examples.metrics]


def _texts(task: CausalLm, place: Place, tokenizer: Any, length: int | None) -> Examples:
    metrics = chosen_metrics(task, place, ("perplexity",))
    table = read_table(task, place, {"text": Column(name=task.columns.text, usual=("text", "sentence", "content"))})
    start, rows, owners = _start(tokenizer), [], []
    for index, text in enumerate(table.texts("text", place)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        size = max(1, (length or len(ids) + 1) - len(start))
        for begin in range(0, len(ids), size):
            window = (*start, *ids[begin : begin + size])
            if len(window) > 1:
                rows.append(Continuation(ids=window, first=1))
                owners.append(index)
    if not rows:
        raise place.error("columns.text", f"no text of {table.source} has a token to predict", hint="check the data")
    return Examples(
        items=(rows, np.array(owners)), n=len(table), digest=table.digest, split=table.split, metrics=metrics
    )


def _choices(task: CausalLm, place: Place, tokenizer: Any, length: int | None) -> Examples:
    metrics = chosen_metrics(task, place, ("accuracy",))
    written = task.columns.choices
    columns = choice_columns(written) | {
        "context": Column(name=task.columns.context, usual=("context", "question", "prompt"), optional=True),
        "label": Column(name=task.columns.label, usual=("label", "answer", "gold", "answerKey")),
    }
    table = read_table(task, place, columns)
    contexts = table.texts("context", place) if "context" in table.columns else [""] * len(table)
    choices = choices_of(table, written, place)
    labels = np.array([right_choice(table, index, choices[index], place) for index in range(len(table))])
    rows, texts = [], []
    for index, (context, own) in enumerate(zip(contexts, choices)):
        for choice in own:
            rows.append(_continued(tokenizer, context, choice, task.join, length, table, index, place))
            texts.append(choice)
    counts = [len(own) for own in choices]
    items = (rows, (texts, counts, labels))
    return Examples(items=items, n=len(table), digest=table.digest, split=table.split, metrics=metrics)


def _continued(
    tokenizer: Any, context: str, choice: str, join: str, length: int | None, table: Table, index: int, place: Place
) -> Continuation:
    """Tokenise context and choice, split where the tokens of the context alone end; spaces belong to the choice."""
    stripped = context.rstrip()
    between = context[len(stripped) :] or (join if stripped else "")
    before = tokenizer(stripped, add_special_tokens=False)["input_ids"] if stripped else []
    whole = tokenizer(stripped + between + choice, add_special_tokens=False)["input_ids"]
    # A choice that fuses with the context's last token takes that token with it.
    shared = next(
        (at for at, pair in enumerate(zip(before, whole)) if pair[0] != pair[1]), min(len(before), len(whole))
    )
    first = min(shared, len(whole) - 1)
    start = _start(tokenizer) or _any_start(tokenizer, first)
    ids = (*start, *whole)
    first += len(start)
    if not whole or first < 1:
        raise place.error(
            "columns.choices", f"{table.row(index)}: the choice {choice[:60]!r} has no token to predict",
            hint="give it a context, or leave it out",
        )  # fmt: skip
    cut = max(0, len(ids) - length) if length is not None else 0
    if cut >= first:
        raise place.error(
            "columns.choices", f"{table.row(index)}: a choice of more tokens than the {length} of a window",
            hint="max_length: larger, or leave it out",
        )  # fmt: skip
    return Continuation(ids=tuple(ids[cut:]), first=first - cut)


def _start(tokenizer: Any) -> tuple[int, ...]:
    """Return the beginning-of-text token if the tokenizer puts one before every text."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and (tokenizer("")["input_ids"] or [None])[0] == bos else ()


def _any_start(tokenizer: Any, first: int) -> tuple[int, ...]:
    """Return the token from which the first one is predicted if there is no context."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tuple(mark for mark in marks if mark is not None)[:1] if first == 0 else ()


KIND = Kind(
    name="causal-lm", schema=CausalLm, metrics=("perplexity", "accuracy"), prepare=prepare, score=score, batch_size=8
)
