"""Prepares images for the kinds: arrays of pixels, or pictures that the task's image processor turns into pixels.

Arrays are scaled and normalised as preprocessor_config.json says, and not resized. Pictures (files, their bytes, or
what `datasets` has) are opened a batch at a time. Corruptions change them before they are normalised or resized.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.weights import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.data import Column, Table, read_table
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, class_labels, label_column
from flexmerge_cli.evaluation.kinds.corruption import (
    Corruption,
    corrupted,
    library_digest,
    parse_corruptions,
    require_library,
)
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples, Place, chosen_metrics
from flexmerge_cli.evaluation.loading import quiet_transformers, read_config, require
from flexmerge_cli.evaluation.readers import DATA_EXTRA, file_digest
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.record import Record

USUAL = ("image", "images", "img", "pixel_values")
PROCESSOR = "preprocessor_config.json"


class ImageColumns(Record):
    image: str | None = None
    label: str | None = None


class ImageTask(TaskSpec):
    """The keys of both kinds of image classification."""

    columns: ImageColumns = ImageColumns()
    labels: tuple[str, ...] | None = None
    corrupt: str | None = None
    """A corruption of the images, `gaussian_noise@3`."""


def image_examples(task: ImageTask, place: Place, classes: int) -> Examples:
    """Return the images and their labels, None for agreement. Raises UsageError, DataError."""
    metrics = chosen_metrics(task, place, CLASS_METRICS, num_classes=classes)
    wanted = {"image": Column(name=task.columns.image, usual=USUAL)}
    if AGREEMENT not in metrics:
        wanted["label"] = label_column(task.columns.label)
    table = read_table(task, place, wanted)
    images, digest = images_of(table, place)
    labels = class_labels(table, task.labels, classes, place) if "label" in wanted else None
    rest: Callable[[], str] = str
    if task.corrupt is not None:
        images, rest = _corrupted(images, task, table, place), library_digest
        digest = xxhash.xxh3_128_hexdigest(f"{digest} {images.corruption} {images.seed}".encode())
    return Examples(items=(images, labels), n=len(table), digest=digest, split=table.split, metrics=metrics, rest=rest)


def _corrupted(images: "Images", task: ImageTask, table: Table, place: Place) -> "Images":
    """Set the corruption of a task's images. Raises UsageError."""
    require_library()
    try:
        (corruption,) = parse_corruptions([str(task.corrupt)])
    except UsageError as error:
        raise place.error("corrupt", error.message, hint=str(error.hint)) from None
    except ValueError:
        raise place.error(
            "corrupt", f"`{task.corrupt}` is several corruptions", hint="name one, with @1 to @5"
        ) from None
    if images.arrays is not None:
        scale = _preprocessing(place.side, images.arrays.shape[1])[0]
        low, high = float(images.arrays.min() * scale), float(images.arrays.max() * scale)
        if images.arrays.shape[1] not in (1, 3) or not (low >= 0 and high <= 1):
            raise place.error(
                "corrupt",
                f"images of {images.arrays.shape[1]} channels, from {low:.4g} to {high:.4g} times rescale_factor",
                hint="corruptions are of 1 or 3 channels from 0 to 1 times the rescale_factor of the preprocessor",
            )
    rows = np.arange(len(table)) if table.rows is None else table.rows
    return replace(images, corruption=corruption, seed=task.seed or 0, rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The n images of one task."""

    arrays: np.ndarray | None = None
    """Numbers, [n, channels, height, width]."""
    pictures: Sequence[Any] = ()
    """Paths, bytes, {bytes, path}, or PIL images, if arrays is None."""
    corruption: Corruption | None = None
    seed: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    """The places of the images in the data, which the noise of a corruption depends on."""

    def pixels(self, start: int, stop: int, side: Path) -> Any:
        """Return a batch as float32 tensor [batch, channels, height, width]. side: folder of
        preprocessor_config.json."""
        if self.arrays is not None:
            batch = self.arrays[start:stop]
            return pixels_of_array(batch if self.corruption is None else self._worse_array(batch, start, side), side)
        processor, pictures = image_processor(side), self.pictures[start:stop]
        return pixels_of(
            processor, pictures if self.corruption is None else self._worse_pictures(pictures, start, processor)
        )

    def _worse_array(self, batch: np.ndarray, start: int, side: Path) -> np.ndarray:
        """Corrupt arrays. Returns float32 in the same range, rounded to 256 levels."""
        assert self.corruption is not None
        scale = _preprocessing(side, batch.shape[1])[0]
        levels = np.rint(batch * scale * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        levels = levels[..., 0] if batch.shape[1] == 1 else levels
        found = [corrupted(one, self.corruption, self.seed, self.rows[n]) for n, one in enumerate(levels, start)]
        worse = np.stack(found).astype(np.float32) / 255 / scale
        return worse[:, None] if batch.shape[1] == 1 else worse.transpose(0, 3, 1, 2)

    def _worse_pictures(self, pictures: Sequence[Any], start: int, processor: Any) -> list[Any]:
        from PIL import Image

        assert self.corruption is not None
        levels = [np.asarray(opened(picture).convert(mode_of(processor))) for picture in pictures]
        return [
            Image.fromarray(corrupted(one, self.corruption, self.seed, self.rows[n]))
            for n, one in enumerate(levels, start)
        ]


def image_processor(side: Path) -> Any:
    return quiet_transformers().AutoImageProcessor.from_pretrained(side, local_files_only=True)


def pixels_of(processor: Any, pictures: Sequence[Any]) -> Any:
    """Return a float32 tensor [batch, channels, height, width]. Raises DataError for anything that is not a picture."""
    batch = [opened(picture).convert(mode_of(processor)) for picture in pictures]
    return processor(images=batch, return_tensors="pt")["pixel_values"].float()


def mode_of(processor: Any) -> str:
    """Return the mode of pictures that a processor takes: of one channel or three."""
    return "L" if len(np.atleast_1d(getattr(processor, "image_mean", None) or [0, 0, 0])) == 1 else "RGB"


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
    pictures, digest = pictures_of(table, place, "image", table.digest)
    return Images(pictures=pictures), digest


def pictures_of(table: Table, place: Place, role: str, digest: str) -> tuple[list[Any], str]:
    """Return the pictures of a column, and a digest of `digest` and of the files it refers to. Raises UsageError."""
    require("PIL", extra=DATA_EXTRA)
    pictures = [_picture(value, table, place, index, role) for index, value in enumerate(table.columns[role])]
    found = xxhash.xxh3_128(digest.encode())
    for picture in pictures:
        if isinstance(picture, Path):
            found.update(file_digest(picture).encode())
    return pictures, found.hexdigest()


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


def _picture(value: Any, table: Table, place: Place, index: int, role: str) -> Any:
    """Return a path that exists, bytes, or a PIL image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = table.folder / value
    if isinstance(value, Path) and not value.is_file():
        raise place.error(f"columns.{role}", f"{table.row(index)}: no picture at {value}", hint="check the path")
    if not isinstance(value, Path | bytes) and not hasattr(value, "convert"):
        raise place.error(
            f"columns.{role}",
            f"`{table.names[role]}` in {table.row(index)} is not a picture: {type(value).__name__}",
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
