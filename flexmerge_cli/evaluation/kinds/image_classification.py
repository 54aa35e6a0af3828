"""`image-classification`: pixels in, one class out; scored by accuracy and its kin.

data     columns `image` ([n, channels, height, width] pixels, or images) and `label`; `labels`: names of the classes
Pixels that are arrays are scaled and normalised as preprocessor_config.json says, and not resized; images are made
into pixels by the task's own image processor.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexmerge_cli.allocation.plan_file import Record
from flexmerge_cli.evaluation.data import Table, read_table
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_labels, class_scores, num_classes
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

ARCHITECTURE = "AutoModelForImageClassification"


class Columns(Record):
    image: str = "images"
    label: str = "labels"


class ImageClassification(TaskSpec):
    kind: Literal["image-classification"]
    columns: Columns = Columns()
    labels: tuple[str, ...] | None = None


def prepare(task: ImageClassification, place: Place) -> Examples:
    classes = num_classes(task, place, "ForImageClassification")
    metrics = chosen_metrics(task, place, KIND.metrics, num_classes=classes)
    labelled = AGREEMENT not in metrics
    table = read_table(task, place, {"image": task.columns.image, "label": task.columns.label if labelled else None})
    images = pixels_of(table, task.columns.image, place)
    labels = class_labels(table, task.columns.label, task.labels, classes, place) if labelled else None
    return Examples(items=(images, labels), n=len(table), digest=table.digest, split=table.split, metrics=metrics)


def score(model: TaskModel, task: ImageClassification, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    images, labels = examples.items
    built = build_model(model, run.dtype, run.device, architecture=ARCHITECTURE)
    found = []
    with torch.inference_mode():
        for start in range(0, examples.n, run.batch_size):
            inputs = to_pixels(images[start : start + run.batch_size], model.folder).to(built.device, built.dtype)
            found.append(built(pixel_values=inputs).logits.float().cpu().numpy())
            run.on_example(min(start + run.batch_size, examples.n), examples.n)
    return class_scores(np.concatenate(found), labels, examples.metrics)


def pixels_of(table: Table, column: str, place: Place) -> np.ndarray:
    """[n, channels, height, width]. Raises UsageError."""
    images = np.asarray(table.columns[column])
    if images.ndim != 4 or images.dtype.kind not in "uif":
        raise place.error(
            "columns.image",
            f"`{column}` of {table.source} is {images.dtype} {list(images.shape)}",
            hint="images are numbers [n, channels, height, width]",
        )
    return images


def to_pixels(images: np.ndarray, folder: Path) -> Any:
    """float32 [batch, channels, height, width], scaled and normalised by preprocessor_config.json."""
    import torch

    scale, mean, std = _preprocessing(folder, images.shape[1])
    return torch.from_numpy((images.astype(np.float32) * scale - mean) / std)


def _preprocessing(folder: Path, channels: int) -> tuple[np.float32, np.ndarray, np.ndarray]:
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    scale = config.get("rescale_factor", 1.0) if config.get("do_rescale", True) else 1.0
    normalise = config.get("do_normalize", True)
    shape = (1, channels, 1, 1)
    mean = np.array(config.get("image_mean", [0.0] * channels) if normalise else [0.0] * channels, np.float32)
    std = np.array(config.get("image_std", [1.0] * channels) if normalise else [1.0] * channels, np.float32)
    return np.float32(scale), mean.reshape(shape), std.reshape(shape)


KIND = Kind(
    name="image-classification", schema=ImageClassification, metrics=CLASS_METRICS, prepare=prepare, score=score
)
