"""Scores `image-classification`: an image in, one class out.

columns  image (pixels [n, channels, height, width], or pictures), label (numbers or names)
labels   names of the classes, in their order; by default the config's
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_scores, num_classes
from flexmerge_cli.evaluation.kinds.images import ImageTask, image_examples
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.scored import Scored, TaskModel

ARCHITECTURE = "AutoModelForImageClassification"


class ImageClassification(ImageTask):
    kind: Literal["image-classification"]


def prepare(task: ImageClassification, place: Place) -> Examples:
    return image_examples(task, place, num_classes(task, place, "ForImageClassification"))


def score(model: TaskModel, task: ImageClassification, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    images, labels = examples.items
    built = build_model(model, run.dtype, run.device, architecture=ARCHITECTURE, on_built=run.on_built)
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
