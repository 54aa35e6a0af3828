"""Scores `text2text`: a text in, a text out, as T5 does every task.

template   with columns in braces, `sst2 sentence: {sentence}`; optional if there is one column of inputs
columns    text (without a template), target (a text or a number; with `labels`, also the number of a class), choices
labels     texts of the classes, in their order; one may be a list of texts that all mean it
scoring    generate (default): the greedy output is compared; rank: the most likely of `labels` or of the column
           `choices` is the output, as in T0
normalise  likelihoods by `none` (default, as for T0), `tokens` or `characters`
max_length, max_new_tokens   of input and output
Texts are compared stripped and in lower case, but as they are by the metrics of generation (evaluation/generation.py),
for which a target may be a list of texts. For correlations, outputs are parsed as numbers; an output that is not a
number counts as no correlation. An output that is not a label is a miss. Both are reported.
"""

from collections.abc import Sequence
from string import Formatter
from typing import Any, Literal

import numpy as np
from pydantic import Field

from flexmerge_cli.evaluation.data import Column, Table, read_table
from flexmerge_cli.evaluation.kinds.choices import choice_columns, choices_of
from flexmerge_cli.evaluation.kinds.classes import check_architecture
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.kinds.likelihood import Normalise, best_of, target_likelihoods
from flexmerge_cli.evaluation.kinds.tokens import load_tokenizer, max_length, padded
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.metrics import METRICS, Takes
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

ARCHITECTURE = "AutoModelForSeq2SeqLM"
TEXT = ("text", "input", "inputs", "sentence", "source", "question")
TARGET = ("target", "targets", "label", "output", "answer", "labels")
OF_TEXTS = ("exact_match", "word_f1")
OF_CLASSES = ("accuracy", "balanced_accuracy", "f1", "f1_macro", "matthews")
OF_NUMBERS = ("spearman", "pearson")
OF_GENERATED = ("bleu", "rouge1", "rouge2", "rougeL", "meteor", "cider")


class Text2TextColumns(Record):
    text: str | None = None
    target: str | None = None
    choices: str | tuple[str, ...] | None = None


class Text2Text(TaskSpec):
    kind: Literal["text2text"]
    template: str | None = None
    columns: Text2TextColumns = Text2TextColumns()
    labels: tuple[str | tuple[str, ...], ...] | None = None
    scoring: Literal["generate", "rank"] = "generate"
    normalise: Normalise = "none"
    max_length: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)

    @property
    def label_texts(self) -> list[tuple[str, ...]]:
        """The texts that mean each class, in the form in which they are compared; the first is ranked."""
        return [(label,) if isinstance(label, str) else label for label in self.labels or ()]


def comparable(text: str) -> str:
    return text.strip().lower()


def prepare(task: Text2Text, place: Place) -> Examples:
    check_architecture(task, place, "ForConditionalGeneration")
    metrics = _metrics(task, place)
    tokenizer = load_tokenizer(place)
    columns, fields = _columns(task, place, labelled=AGREEMENT not in metrics)
    table = read_table(task, place, columns)
    inputs = _inputs(task, table, fields, place)
    length = max_length(tokenizer, place.side, task.max_length)
    ids = tokenizer(inputs, truncation=length is not None, max_length=length)["input_ids"]
    empty = next((index for index, row in enumerate(ids) if not row), None)
    if empty is not None:
        raise place.error("columns.text", f"{table.row(empty)} has no tokens", hint="leave out empty texts")
    choices = _ranked(task, table, place) if task.scoring == "rank" else None
    items = (tokenizer, ids, choices, _targets(task, table, place, metrics))
    return Examples(items=items, n=len(table), digest=table.digest, split=table.split, metrics=metrics)


def score(model: TaskModel, task: Text2Text, examples: Examples, run: Run) -> Sequence[Scored]:
    tokenizer, ids, choices, targets = examples.items
    built = build_model(model, run.dtype, run.device, architecture=ARCHITECTURE, on_built=run.on_built)
    if choices is None:
        outputs = _generated(built, tokenizer, ids, task, run)
    else:
        outputs = _likeliest(built, tokenizer, ids, choices, task, run)
    if examples.metrics == (AGREEMENT,):
        return [Scored(metric=AGREEMENT, predictions=np.array([comparable(text) for text in outputs]))]
    return [_scored(name, outputs, targets[METRICS[name].takes], task) for name in examples.metrics]


def _metrics(task: Text2Text, place: Place) -> tuple[str, ...]:
    first = OF_CLASSES if task.labels is not None else OF_TEXTS
    rest = [name for name in (*OF_TEXTS, *OF_NUMBERS, *OF_GENERATED) if name not in first]
    metrics = chosen_metrics(
        task, place, (*first, *rest, AGREEMENT), num_classes=len(task.labels) if task.labels is not None else None
    )
    generated = [name for name in metrics if name in (*OF_NUMBERS, *OF_GENERATED)]
    if task.scoring == "rank" and generated:
        raise place.error("metric", f"`{generated[0]}` needs generated texts", hint="scoring: generate")
    return metrics


def _columns(task: Text2Text, place: Place, *, labelled: bool) -> tuple[dict[str, Column], list[str]]:
    """Return the columns by role, and the names in the template's braces."""
    fields: list[str] = []
    if task.template is not None:
        try:
            parts = list(Formatter().parse(task.template))
        except ValueError as error:
            raise place.error("template", f"{error}", hint="write a literal brace twice: {{") from None
        fields = [name for _, name, _, _ in parts if name is not None]
        if any(
            not name or set(name) & set(".[]") or spec or turned for _, name, spec, turned in parts if name is not None
        ):
            raise place.error("template", "braces hold the name of a column, and nothing else", hint="{sentence}")
        columns = {f"template.{name}": Column(name=name) for name in fields}
    else:
        columns = {"text": Column(name=task.columns.text, usual=TEXT)}
    if labelled:
        columns["target"] = Column(name=task.columns.target, usual=TARGET)
    if task.scoring == "rank" and task.labels is None:
        columns |= choice_columns(task.columns.choices)
    return columns, fields


def _inputs(task: Text2Text, table: Table, fields: list[str], place: Place) -> list[str]:
    if task.template is None:
        return table.texts("text", place)
    rows = zip(*(table.columns[f"template.{name}"] for name in fields)) if fields else iter([()] * len(table))
    return [task.template.format_map(dict(zip(fields, row))) for row in rows]


def _ranked(task: Text2Text, table: Table, place: Place) -> list[list[str]]:
    """Return the texts that each example's output is chosen from."""
    if task.labels is not None:
        return [[texts[0] for texts in task.label_texts]] * len(table)
    return choices_of(table, task.columns.choices, place)


def _targets(task: Text2Text, table: Table, place: Place, metrics: Sequence[str]) -> dict[Takes, np.ndarray]:
    """Return the targets that outputs are compared with, keyed by what the metrics take."""
    found: dict[Takes, np.ndarray] = {}
    column = table.columns.get("target", ())
    for takes in {METRICS[name].takes for name in metrics if name != AGREEMENT}:
        if takes is Takes.NUMBERS:
            found[takes] = table.numbers("target", place)
        elif takes is Takes.GENERATED:
            found[takes] = np.array([_references(value, table, row, place) for row, value in enumerate(column)])
        elif takes is Takes.CLASSES:
            found[takes] = np.array([_class_of(task, table, index, place) for index in range(len(table))])
        elif task.labels is not None:
            classes = [_class_of(task, table, index, place) for index in range(len(table))]
            found[takes] = np.array([comparable(task.label_texts[number][0]) for number in classes])
        else:
            found[takes] = np.array([comparable(str(value)) for value in table.columns["target"]])
    return found


def _references(value: Any, table: Table, row: int, place: Place) -> str:
    """Return the texts of a target, one per line. Raises UsageError."""
    texts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise place.error(
            "columns.target",
            f"{table.row(row)} has no reference: {str(value)[:60]!r}",
            hint="a text, or a list of texts",
        )
    return "\n".join(" ".join(text.split()) for text in texts)


def _class_of(task: Text2Text, table: Table, index: int, place: Place) -> int:
    """Return the class that a target means, given by text or number."""
    value, texts = table.columns["target"][index], task.label_texts
    if isinstance(value, str):
        number = _meant(comparable(value), texts)
        if number < 0 and value.strip().isdecimal():
            number = int(value)
    else:
        number = int(value) if isinstance(value, int | np.integer) else -1
    if not 0 <= number < len(texts):
        raise place.error(
            "columns.target",
            f"{table.row(index)} has target {str(value)[:60]!r}, and `labels` are {', '.join(t[0] for t in texts)}",
            hint="targets are texts of `labels`, or their numbers from 0",
        )
    return number


def _meant(text: str, labels: Sequence[tuple[str, ...]]) -> int:
    """Return the class of a comparable text; -1 if it names none."""
    return next((number for number, texts in enumerate(labels) if text in map(comparable, texts)), -1)


def _generated(built: Any, tokenizer: Any, ids: Sequence[Sequence[int]], task: Text2Text, run: Run) -> list[str]:
    """Generate greedy outputs, without special tokens."""
    import torch

    found: list[str] = []
    with torch.inference_mode():
        for start, stop in run.batches(len(ids)):
            inputs, mask = padded(ids[start:stop], 0)
            made = built.generate(
                input_ids=inputs.to(built.device),
                attention_mask=mask.to(built.device),
                max_new_tokens=task.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            found += tokenizer.batch_decode(made, skip_special_tokens=True)
    return found


def _likeliest(
    built: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    task: Text2Text,
    run: Run,
) -> list[str]:
    """Return the most likely of each example's choices; the end of text counts if the tokenizer adds it."""
    counts = [len(own) for own in choices]
    texts = [text for own in choices for text in own]
    targets = tokenizer(text_target=texts)["input_ids"]
    inputs = [row for row, count in zip(ids, counts) for _ in range(count)]
    found = target_likelihoods(built, inputs, targets, run)
    chosen = best_of(found, [len(target) for target in targets], texts, counts, task.normalise)
    return [own[number] for own, number in zip(choices, chosen)]


def _scored(name: str, outputs: Sequence[str], targets: np.ndarray, task: Text2Text) -> Scored:
    takes, texts = METRICS[name].takes, [comparable(text) for text in outputs]
    if takes is Takes.NUMBERS:
        numbers = np.array([_number(text) for text in texts])
        wrong, what = int(np.isnan(numbers).sum()), "are not numbers"
        predictions = numbers
    elif takes is Takes.CLASSES:
        predictions = np.array([_meant(text, task.label_texts) for text in texts])
        wrong, what = int((predictions < 0).sum()), "are none of the labels"
    elif takes is Takes.GENERATED:
        predictions, wrong, what = np.array([" ".join(text.split()) for text in outputs]), 0, ""
    else:
        predictions, wrong, what = np.array(texts), 0, ""
    notes = (f"{wrong} of {len(texts)} outputs {what}",) if wrong else ()
    return Scored(metric=name, predictions=predictions, labels=targets, notes=notes)


def _number(text: str) -> float:
    """Parse a number; NaN if the text is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


KIND = Kind(
    name="text2text",
    schema=Text2Text,
    metrics=(*OF_TEXTS, *OF_CLASSES, *OF_NUMBERS, *OF_GENERATED, AGREEMENT),
    prepare=prepare,
    score=score,
    batch_size=16,
)
