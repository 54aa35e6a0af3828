"""Evaluations of one's own: a function that `python.yaml` names, and a program that `command.yaml` runs."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification


def accuracy(weights: Mapping[str, torch.Tensor], folder: Path, *, data: str) -> dict[str, object]:
    """Predictions and labels, so that flexmerge has an interval and a gate can compare. data: beside this file."""
    config = ViTConfig.from_pretrained(folder)
    model = ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=torch.float32
    )
    return predictions(model.eval(), Path(__file__).parent / data)


def predictions(model: ViTForImageClassification, data: Path) -> dict[str, object]:
    """Score the first hundred images."""
    with np.load(data) as file:
        images, labels = file["images"][:100], file["labels"][:100]
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(images).float() / 8 - 1).logits
    return {"metric": "accuracy", "predictions": logits.argmax(-1).tolist(), "labels": labels.tolist()}


if __name__ == "__main__":
    checkpoint, data = sys.argv[1:]
    found = ViTForImageClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    print(json.dumps(predictions(found, Path(data))))
