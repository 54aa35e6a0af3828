"""`image-classification`: an image in, one class out.

columns  image (pixels [n, channels, height, width], or pictures), label (numbers or names)
labels   names of the classes, in their order; by default the config's
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from flexmerge_cli.allocation.record import Record
from flexmerge_cli.evaluation.data import read_table
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_labels, class_scores, label_column, num_classes
from flexmerge_cli.evaluation.kinds.images import image_column, images_of
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

ARCHITECTURE = "AutoModelForImageClassification"


class Columns(Record):
    image: str | None = None
    label: str | None = None


class ImageClassification(TaskSpec):
    kind: Literal["image-classification"]
    columns: Columns = Columns()
    labels: tuple[str, ...] | None = None


def prepare(task: ImageClassification, place: Place) -> Examples:
    classes = num_classes(task, place, "ForImageClassification")
    metrics = chosen_metrics(task, place, KIND.metrics, num_classes=classes)
    labelled = AGREEMENT not in metrics
    wanted = {"image": image_column(task.columns.image)}
    table = read_table(task, place, wanted | ({"label": label_column(task.columns.label)} if labelled else {}))
    images, digest = images_of(table, place)
    labels = class_labels(table, task.labels, classes, place) if labelled else None
    return Examples(items=(images, labels), n=len(table), digest=digest, split=table.split, metrics=metrics)


def score(model: TaskModel, task: ImageClassification, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    images, labels = examples.items
    built = build_model(model, run.dtype, run.device, architecture=ARCHITECTURE)
    found = []
    with torch.inference_mode():
        for start, stop in run.batches(examples.n):
            pixels = images.pixels(start, stop, model.folder).to(built.device, built.dtype)
            found.append(built(pixel_values=pixels).logits.float().cpu().numpy())
    return class_scores(np.concatenate(found), labels, examples.metrics)


KIND = Kind(
    name="image-classification",
    schema=ImageClassification,
    metrics=CLASS_METRICS,
    prepare=prepare,
    score=score,
    batch_size=256,
)
