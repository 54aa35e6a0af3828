"""Scores `semantic-segmentation` and `depth-estimation`, whose models give a class or a depth for every pixel.

columns  image (pixels [n, channels, height, width], or pictures), and label: numbers [n, height, width], or pictures of
         one channel, of any size
ignore   for segmentation: pixels with this label do not count; by default 255
unit     for depth: the factor from a label to a depth in the model's unit; pixels of depth 0 do not count
Outputs are resized to the label, bilinearly, before they are compared. Only sums over the pixels of an image are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.data import Column, read_table
from flexmerge_cli.evaluation.kinds.classes import check_architecture, label_column, label_count
from flexmerge_cli.evaluation.kinds.images import USUAL, ImageColumns, images_of, opened, pictures_of
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run, chosen_metrics
from flexmerge_cli.evaluation.loading import build_model, read_config
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

OF_PIXELS = ("miou", "pixel_accuracy")
OF_DEPTHS = ("abs_rel", "rmse", "delta1")


class DenseTask(TaskSpec):
    """The keys of both kinds."""

    columns: ImageColumns = ImageColumns()


class Segmentation(DenseTask):
    kind: Literal["semantic-segmentation"]
    ignore: int = Field(default=255, ge=0)


class Depth(DenseTask):
    kind: Literal["depth-estimation"]
    unit: float = Field(default=1.0, gt=0)


def pixel_counts(found: np.ndarray, labels: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """Count the pixels of each class, [classes, 3] int64: found and labelled, only found, only labelled."""
    valid = labels != ignore
    both = np.bincount(labels[valid & (found == labels)], minlength=classes)
    each = [np.bincount(values[valid], minlength=classes) for values in (found, labels)]
    return np.stack([both, each[0] - both, each[1] - both], -1)


def depth_errors(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean of |d - d*|/d*, the root of the mean of (d - d*)², and the part with max(d/d*, d*/d) < 1.25.

    found, labels: d and d*, [height, width]. Pixels of depth 0 do not count; an image without others has errors of 0.
    """
    known = labels > 0
    if not known.any():
        return np.array([0.0, 0.0, 1.0])
    ours, theirs = found[known].astype(np.float64), labels[known].astype(np.float64)
    ratio = np.maximum(ours / theirs, theirs / np.maximum(ours, np.finfo(np.float64).tiny))
    off = ours - theirs
    return np.array([(np.abs(off) / theirs).mean(), np.sqrt((off**2).mean()), (ratio < 1.25).mean()])


def _prepare(task: Any, place: Place, ending: str, metrics: Sequence[str]) -> Examples:
    """Read images and labels. Raises UsageError, DataError."""
    check_architecture(task, place, ending)
    names = chosen_metrics(task, place, metrics)
    wanted = {"image": Column(name=task.columns.image, usual=USUAL), "label": label_column(task.columns.label)}
    table = read_table(task, place, wanted)
    images, digest = images_of(table, place)
    labels: Sequence[Any] = table.columns["label"]
    if not isinstance(labels, np.ndarray):
        labels, digest = pictures_of(table, place, "label", digest)
    elif labels.ndim != 3:
        raise place.error(
            "columns.label",
            f"`{table.names['label']}` of {table.source} is {labels.dtype} {list(labels.shape)}",
            hint="labels are numbers [n, height, width], or pictures",
        )
    return Examples(items=(images, labels), n=len(table), digest=digest, split=table.split, metrics=names)


def _maps(
    model: TaskModel, examples: Examples, run: Run, architecture: str, output: Callable[[Any], Any]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the model's output for each image, float32 [channels, height, width], and its label, [height, width].

    Raises DataError for a label that does not have one channel.
    """
    import torch

    images, labels = examples.items
    built = build_model(model, run.dtype, run.device, architecture=architecture)
    with torch.inference_mode():
        for start, stop in run.batches(examples.n):
            pixels = images.pixels(start, stop, model.folder).to(built.device, built.dtype)
            for maps, value in zip(output(built(pixel_values=pixels)).float(), labels[start:stop]):
                label = value if isinstance(value, np.ndarray) else np.asarray(opened(value))
                if label.ndim != 2:
                    raise DataError(f"a label has the shape {list(label.shape)}", hint="labels have one channel")
                resized = torch.nn.functional.interpolate(maps[None], label.shape, mode="bilinear", align_corners=False)
                yield resized[0].cpu().numpy(), label


def prepare_segmentation(task: Segmentation, place: Place) -> Examples:
    return _prepare(task, place, "ForSemanticSegmentation", OF_PIXELS)


def score_segmentation(model: TaskModel, task: Segmentation, examples: Examples, run: Run) -> Sequence[Scored]:
    classes = label_count(read_config(model.folder))
    counts = []
    for logits, label in _maps(model, examples, run, "AutoModelForSemanticSegmentation", lambda made: made.logits):
        outside = (label != task.ignore) & ((label < 0) | (label >= classes))
        if outside.any():
            raise DataError(
                f"task `{model.task}`: a pixel has label {label[outside][0]}, the model has {classes} classes",
                hint="labels are 0 to the number of classes - 1; `ignore` names a label that does not count",
            )
        counts.append(pixel_counts(logits.argmax(0), label.astype(np.int64), classes, task.ignore))
    found = np.stack(counts)
    return [Scored(metric=name, predictions=found, labels=np.zeros(len(found), int)) for name in examples.metrics]


def prepare_depth(task: Depth, place: Place) -> Examples:
    return _prepare(task, place, "ForDepthEstimation", OF_DEPTHS)


def score_depth(model: TaskModel, task: Depth, examples: Examples, run: Run) -> Sequence[Scored]:
    maps = _maps(model, examples, run, "AutoModelForDepthEstimation", lambda made: made.predicted_depth.unsqueeze(1))
    found = np.stack([depth_errors(depth[0], label * task.unit) for depth, label in maps])
    columns = {name: found[:, OF_DEPTHS.index(name)] for name in examples.metrics}
    return [Scored(metric=name, predictions=of, labels=np.zeros(len(of))) for name, of in columns.items()]


SEGMENTATION = Kind(
    name="semantic-segmentation",
    schema=Segmentation,
    metrics=OF_PIXELS,
    prepare=prepare_segmentation,
    score=score_segmentation,
    batch_size=16,
)
DEPTH = Kind(
    name="depth-estimation", schema=Depth, metrics=OF_DEPTHS, prepare=prepare_depth, score=score_depth, batch_size=16
)
