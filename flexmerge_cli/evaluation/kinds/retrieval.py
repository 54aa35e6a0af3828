"""Scores `image-text-retrieval`: CLIP finds the texts of an image among all texts, or the image of a text.

columns     image, text: a text, or a list of texts that all describe the image
direction   `image-to-text` (the default) or `text-to-image`; `recall@k` counts queries with a right answer among the k
            most similar ones
text_model  a whole CLIP checkpoint, for its text tower and tokenizer; by default the spec's `base`. A task that is a
            whole CLIP model embeds texts itself
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flexmerge_cli.evaluation.data import Column, Table, read_table
from flexmerge_cli.evaluation.kinds.images import USUAL, Images, images_of
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.kinds.tokens import load_tokenizer
from flexmerge_cli.evaluation.kinds.zero_shot import (
    TextTower,
    image_embeddings,
    require_encoder,
    text_embeddings,
    text_tower,
)
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

USUAL_TEXTS = ("text", "texts", "caption", "captions", "sentences")
METRICS = ("recall@1", "recall@k")
NEVER = -2.0
"""A similarity below any of normalised embeddings."""


class Columns(Record):
    image: str | None = None
    text: str | None = None


class Retrieval(TaskSpec):
    kind: Literal["image-text-retrieval"]
    columns: Columns = Columns()
    direction: Literal["image-to-text", "text-to-image"] = "image-to-text"
    text_model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The images, and the texts that describe them."""

    images: Images
    texts: list[str]
    owners: np.ndarray
    """The image that each text describes, int [texts]."""
    tower: TextTower | None
    """None if the task's model embeds texts itself, with its own tokenizer."""
    tokenizer: Any


def prepare(task: Retrieval, place: Place) -> Examples:
    encoder = require_encoder(place)
    metrics = chosen_metrics(task, place, METRICS)
    wanted = {"image": Column(name=task.columns.image, usual=USUAL)}
    table = read_table(task, place, wanted | {"text": Column(name=task.columns.text, usual=USUAL_TEXTS)})
    images, digest = images_of(table, place)
    texts = [_texts(table, index, place) for index in range(len(table))]
    owners = np.repeat(np.arange(len(table)), [len(of) for of in texts])
    tower = None if encoder == "CLIPModel" and task.text_model is None else text_tower(task.text_model, place)
    tokenizer = load_tokenizer(place) if tower is None else tower.tokenizer
    pairs = Pairs(images=images, texts=[t for of in texts for t in of], owners=owners, tower=tower, tokenizer=tokenizer)
    n = len(table) if task.direction == "image-to-text" else len(owners)
    return Examples(
        items=pairs, n=n, digest=digest, split=table.split, metrics=metrics, rest=str if tower is None else tower.digest
    )


def score(model: TaskModel, task: Retrieval, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    pairs: Pairs = examples.items
    count = int(pairs.owners[-1]) + 1
    with torch.inference_mode():
        texts = projection = None
        if pairs.tower is not None:  # One model is in memory at a time.
            built = build_model(pairs.tower.model, "float32", run.device)
            texts, projection = _embedded(built, pairs, run), built.visual_projection
        built = build_model(model, run.dtype, run.device, on_built=run.on_built)
        texts = _embedded(built, pairs, run) if texts is None else texts
        images = []
        for start, stop in run.batches(count):
            pixels = pairs.images.pixels(start, stop, model.folder).to(built.device, built.dtype)
            images.append(image_embeddings(built, pixels, projection))
        sides = torch.cat(images), texts
        owners = torch.arange(count), torch.from_numpy(pairs.owners)
        to = 1 if task.direction == "image-to-text" else 0
        deepest = max(int(name.removeprefix("recall@")) for name in examples.metrics)
        found = _right_and_wrong(sides[1 - to], owners[1 - to], sides[to], owners[to], deepest, run)
    return [Scored(metric=name, predictions=found, labels=np.zeros(len(found), int)) for name in examples.metrics]


def _right_and_wrong(queries: Any, of_query: Any, answers: Any, of_answer: Any, count: int, run: Run) -> np.ndarray:
    """Return the similarity of each query's best right answer, then those of the best `count` wrong ones.

    float32 [queries, 1 + count], fewer if no query has as many wrong answers; where one has fewer than another, NEVER
    fills the row. Memory is that of one batch of queries.
    """
    import torch

    of_query, of_answer = of_query.to(queries.device), of_answer.to(queries.device)
    count = min(count, len(answers) - int(torch.bincount(of_answer).min()))
    found = []
    for start in range(0, len(queries), run.batch_size):
        batch = slice(start, start + run.batch_size)
        similarity = queries[batch] @ answers.T
        is_right = of_query[batch, None] == of_answer
        right = similarity.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        wrong = similarity.masked_fill(is_right, NEVER).topk(count, 1).values
        found.append(torch.cat([right, wrong], 1).cpu())
    return torch.cat(found).numpy()


def _embedded(built: Any, pairs: Pairs, run: Run) -> Any:
    import torch

    steps = range(0, len(pairs.texts), run.batch_size)
    parts = [pairs.texts[start : start + run.batch_size] for start in steps]
    return torch.cat([text_embeddings(built, pairs.tokenizer, part).float() for part in parts])


def _texts(table: Table, index: int, place: Place) -> list[str]:
    """Return the texts of one image. Raises UsageError."""
    value = table.columns["text"][index]
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple | np.ndarray) else []
    if not found or not all(isinstance(text, str) for text in found):
        raise place.error(
            "columns.text",
            f"`{table.names['text']}` in {table.row(index)} is neither a text nor a list of texts",
            hint="give each image at least one text",
        )
    return [str(text) for text in found]


KIND = Kind(name="image-text-retrieval", schema=Retrieval, metrics=METRICS, prepare=prepare, score=score, batch_size=64)
