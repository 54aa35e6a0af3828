"""Top-1 predictions of an image classifier. A transformers model and an .npz in, hits out."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.errors import DataError


def read_images(path: Path, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """images [n, channels, height, width], labels [n]. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"][:limit], file["labels"][:limit]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no `images` and `labels`: {error}", hint="write them with numpy.savez") from None
    if images.ndim != 4 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"{path}: images {list(images.shape)} {images.dtype}, labels {list(labels.shape)} {labels.dtype}",
            hint="images are [n, channels, height, width], labels [n] integers, n at least 1",
        )
    return images, labels


def hits(model: Any, folder: Path, images: np.ndarray, labels: np.ndarray, batch_size: int) -> np.ndarray:
    """Whether each image's most likely class is its label, bool [n]. folder: of preprocessor_config.json.

    Pixels are scaled and normalised as the file says; not resized. Raises DataError for a label outside the classes.
    """
    import torch

    num_labels = int(model.config.num_labels)
    if labels.min() < 0 or labels.max() >= num_labels:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, the model has {num_labels} classes",
            hint="check the data",
        )
    scale, mean, std = _preprocessing(folder, images.shape[1])
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = (images[start : start + batch_size].astype(np.float32) * scale - mean) / std
            inputs = torch.from_numpy(pixels).to(model.device, model.dtype)
            found.append(model(pixel_values=inputs).logits.float().argmax(-1).cpu().numpy())
    return np.concatenate(found) == labels


def _preprocessing(folder: Path, channels: int) -> tuple[np.float32, np.ndarray, np.ndarray]:
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    scale = config.get("rescale_factor", 1.0) if config.get("do_rescale", True) else 1.0
    normalise = config.get("do_normalize", True)
    shape = (1, channels, 1, 1)
    mean = np.array(config.get("image_mean", [0.0] * channels) if normalise else [0.0] * channels, np.float32)
    std = np.array(config.get("image_std", [1.0] * channels) if normalise else [1.0] * channels, np.float32)
    return np.float32(scale), mean.reshape(shape), std.reshape(shape)
