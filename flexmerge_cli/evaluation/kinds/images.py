"""Prepares images for the kinds: arrays of pixels, or pictures that the task's image processor turns into pixels.

Arrays are scaled and normalised as preprocessor_config.json says, and not resized. Pictures (files, their bytes, or
the objects of `datasets`) are opened a batch at a time.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.weights import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.data import Column, Table, read_table
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_labels, label_column
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Place, chosen_metrics
from flexmerge_cli.evaluation.loading import quiet_transformers, read_config, require
from flexmerge_cli.evaluation.readers import DATA_EXTRA, file_digest
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

USUAL = ("image", "images", "img", "pixel_values")
PROCESSOR = "preprocessor_config.json"


class Columns(Record):
    image: str | None = None
    label: str | None = None


class ImageTask(TaskSpec):
    """The keys of both kinds of image classification."""

    columns: Columns = Columns()
    labels: tuple[str, ...] | None = None


def image_examples(task: ImageTask, place: Place, classes: int) -> Examples:
    """Return the images and their labels, None for agreement. Raises UsageError, DataError."""
    metrics = chosen_metrics(task, place, CLASS_METRICS, num_classes=classes)
    wanted = {"image": Column(name=task.columns.image, usual=USUAL)}
    if AGREEMENT not in metrics:
        wanted["label"] = label_column(task.columns.label)
    table = read_table(task, place, wanted)
    images, digest = images_of(table, place)
    labels = class_labels(table, task.labels, classes, place) if "label" in wanted else None
    return Examples(items=(images, labels), n=len(table), digest=digest, split=table.split, metrics=metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The n images of one task."""

    arrays: np.ndarray | None = None
    """Numbers, [n, channels, height, width]."""
    pictures: Sequence[Any] = ()
    """Paths, bytes, {bytes, path}, or PIL images, if arrays is None."""

    def pixels(self, start: int, stop: int, side: Path) -> Any:
        """Return a batch as float32 tensor [batch, channels, height, width]. side: folder of
        preprocessor_config.json."""
        if self.arrays is not None:
            return pixels_of_array(self.arrays[start:stop], side)
        return pixels_of(image_processor(side), self.pictures[start:stop])


def image_processor(side: Path) -> Any:
    return quiet_transformers().AutoImageProcessor.from_pretrained(side, local_files_only=True)


def pixels_of(processor: Any, pictures: Sequence[Any]) -> Any:
    """Return a float32 tensor [batch, channels, height, width]. Raises DataError for anything that is not a picture."""
    mode = "L" if len(np.atleast_1d(getattr(processor, "image_mean", None) or [0, 0, 0])) == 1 else "RGB"
    batch = [opened(picture).convert(mode) for picture in pictures]
    return processor(images=batch, return_tensors="pt")["pixel_values"].float()


def pixels_of_array(array: np.ndarray, side: Path) -> Any:
    """Scale and normalise numbers [batch, channels, height, width] into a float32 tensor of that shape."""
    import torch

    scale, mean, std = _preprocessing(side, array.shape[1])
    return torch.from_numpy((array.astype(np.float32) * scale - mean) / std)


def images_of(table: Table, place: Place) -> tuple[Images, str]:
    """Return the column `image`, and a digest of the files it refers to. Raises UsageError, DataError."""
    column = table.columns["image"]
    if isinstance(column, np.ndarray):
        if column.ndim != 4 or column.dtype.kind not in "uif":
            raise place.error(
                "columns.image",
                f"`{table.names['image']}` of {table.source} is {column.dtype} {list(column.shape)}",
                hint="images are numbers [n, channels, height, width]",
            )
        _check_size(column.shape[1:], place)
        _preprocessing(place.side, column.shape[1])  # reports a malformed file before any weight is read
        return Images(arrays=column), table.digest
    require("PIL", extra=DATA_EXTRA)
    if not (place.side / PROCESSOR).is_file():
        raise place.error(
            "data", f"the data are pictures, but {place.side} has no {PROCESSOR}", hint="give pixels, as an .npz"
        )
    pictures = [_picture(value, table, place, index) for index, value in enumerate(column)]
    digest = xxhash.xxh3_128(table.digest.encode())
    for picture in pictures:
        if isinstance(picture, Path):
            digest.update(file_digest(picture).encode())
    return Images(pictures=pictures), digest.hexdigest()


def opened(picture: Any) -> Any:
    """Open a PIL image. Raises DataError."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(picture, Path | bytes):
        return picture
    try:
        image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
        image.load()
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        where = picture if isinstance(picture, Path) else f"{len(picture)} bytes"
        raise DataError(f"{where} is not a valid picture: {error}", hint="get a sound copy of it") from None
    return image


def _picture(value: Any, table: Table, place: Place, index: int) -> Any:
    """Return a path that exists, bytes, or a PIL image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = table.folder / value
    if isinstance(value, Path) and not value.is_file():
        raise place.error("columns.image", f"{table.row(index)}: no picture at {value}", hint="check the path")
    if not isinstance(value, Path | bytes) and not hasattr(value, "convert"):
        raise place.error(
            "columns.image",
            f"`{table.names['image']}` in {table.row(index)} is no picture: {type(value).__name__}",
            hint="a path, or the bytes of a file",
        )
    return value


def _check_size(shape: tuple[int, ...], place: Place) -> None:
    if (wanted := image_shape(place.side, shape)) != tuple(shape):
        raise place.error(
            "columns.image",
            f"images of {list(shape)}, and the model takes {list(wanted)} by {place.side}/config.json",
            hint="channels, height, width: resize the images",
        )


def image_shape(side: Path, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Return channels, height and width of the images that a model takes. usual: used if the config does not say."""
    config = read_config(side)
    config = config.get("vision_config", config) if isinstance(config.get("vision_config"), dict) else config
    size, channels = config.get("image_size"), config.get("num_channels", usual[0])
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list) else usual[1:]
    return (channels, *sides)


def _preprocessing(folder: Path, channels: int) -> tuple[np.float32, np.ndarray, np.ndarray]:
    """Return scale, mean and standard deviation by channel, [1, channels, 1, 1]. Raises DataError."""
    path = folder / PROCESSOR
    config = read_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}
    scale = config.get("rescale_factor", 1.0) if config.get("do_rescale", True) else 1.0
    known = config if config.get("do_normalize", True) else {}
    try:
        mean, std = (
            np.broadcast_to(np.array(known.get(key, usual), np.float32), channels).reshape(1, channels, 1, 1)
            for key, usual in (("image_mean", 0.0), ("image_std", 1.0))
        )
        return np.float32(scale), mean, std
    except (ValueError, TypeError):
        said = f"{path}: rescale_factor, image_mean and image_std are not numbers for {channels} channels"
        raise DataError(said, hint="check the file") from None
