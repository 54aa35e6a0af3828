"""The tasks of the digits: digits in, changed images and labels out. make_digits.py trains a model for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# N images of uint8 [N, 8, 8], ink from 0 to 16; labels int64 [N]
Images = np.ndarray
Labels = np.ndarray

MAX_INK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to learn about a digit."""

    classes: tuple[str, ...]
    """Name of each label, from 0."""
    make: Callable[[Images, Labels, np.random.Generator], tuple[Images, Labels]]
    """Images and the digits they show -> the task's images and labels."""


def digit(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    return images, digits


def parity(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    return images, digits % 2


def large(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    return images, (digits >= 5).astype(np.int64)


def rotation(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    labels = rng.integers(4, size=len(images))
    return np.stack([np.rot90(image, turns) for image, turns in zip(images, labels)]), labels


def mirrored(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    labels = rng.integers(2, size=len(images))
    return np.where(labels[:, None, None] == 1, images[:, :, ::-1], images), labels


def inverted(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    """Faint and noisy, around a random grey: the mean alone does not tell."""
    labels = rng.integers(2, size=len(images))
    sign = np.where(labels == 1, -1, 1)[:, None, None]
    contrast = rng.uniform(0.3, 0.6, size=(len(images), 1, 1))
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    grey = rng.uniform(6, 10, size=(len(images), 1, 1))
    noisy = grey + sign * contrast * centred + rng.normal(0, 1, size=images.shape)
    return noisy.round().clip(0, MAX_INK).astype(np.uint8), labels


def occluded(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    """One quadrant without ink."""
    labels = rng.integers(4, size=len(images))
    rows, columns = np.arange(8)[:, None] // 4, np.arange(8)[None, :] // 4
    hidden = (2 * rows + columns) == labels[:, None, None]
    return np.where(hidden, 0, images).astype(np.uint8), labels


def shifted(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    """One pixel up, right, down, left, or not at all; what leaves is lost."""
    labels = rng.integers(5, size=len(images))
    return shift(images, labels, 1), labels


def shifted_far(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    """Two pixels up, right, down or left: what the base is pre-trained on instead, so that one pixel is new to it."""
    labels = rng.integers(4, size=len(images))
    return shift(images, labels, 2), labels


def shift(images: Images, directions: np.ndarray, by: int) -> Images:
    """directions [N] in 0..4: up, right, down, left, stay. by: pixels."""
    padded = np.pad(images, ((0, 0), (by, by), (by, by)))
    corners = by * np.array([(2, 1), (1, 0), (0, 1), (1, 2), (1, 1)])
    return np.stack([padded[i, r : r + 8, c : c + 8] for i, (r, c) in enumerate(corners[directions])])


QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
TASKS = {
    "digit": Task(classes=tuple("0123456789"), make=digit),
    "inverted": Task(classes=("dark on light", "light on dark"), make=inverted),
    "large": Task(classes=("0 to 4", "5 to 9"), make=large),
    "mirrored": Task(classes=("as written", "mirrored"), make=mirrored),
    "occluded": Task(classes=QUADRANTS, make=occluded),
    "parity": Task(classes=("even", "odd"), make=parity),
    "rotation": Task(classes=("upright", "90 left", "180", "90 right"), make=rotation),
    "shifted": Task(classes=("up", "right", "down", "left", "not shifted"), make=shifted),
}


def digit_of(change: Callable[[Images], Images]) -> Task:
    """The digit is to be told, of pictures that a fixed change has made."""
    return Task(classes=tuple("0123456789"), make=lambda images, digits, rng: (change(images), digits))


def sort_of(classes: tuple[str, ...], sort: Callable[[Labels], Labels]) -> Task:
    """Something that follows from the digit alone."""
    return Task(classes=classes, make=lambda images, digits, rng: (images, sort(digits).astype(np.int64)))


def which(classes: tuple[str, ...], change: Callable[[Images, int, np.random.Generator], Images]) -> Task:
    """The change that was made to a picture is to be told: change(images, label, rng)."""

    def make(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
        labels = rng.integers(len(classes), size=len(images))
        seen = np.zeros_like(images)
        for label in range(len(classes)):
            seen[labels == label] = change(images[labels == label], label, rng).round().clip(0, MAX_INK)
        return seen, labels

    return Task(classes=classes, make=make)


def scrambled(seed: int) -> Callable[[Images], Images]:
    order = np.random.default_rng(seed).permutation(64)
    return lambda images: images.reshape(-1, 64)[:, order].reshape(images.shape)


def halves(images: Images, digits: Labels, rng: np.random.Generator) -> tuple[Images, Labels]:
    """The left half of one digit beside the right half of another, or of the same one."""
    labels = rng.integers(2, size=len(images))
    other = rng.permutation(len(images))
    seen = images.copy()
    seen[labels == 1, :, 4:] = images[other][labels == 1, :, 4:]
    return seen, labels


def smoothed(images: Images, times: int) -> Images:
    for _ in range(times):
        padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="edge")
        images = sum(padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)) / 9
    return images


def thickened(images: Images, label: int, rng: np.random.Generator) -> Images:
    """Strokes as they are, one pixel wider, or thinner."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = np.stack([padded[:, r : r + 8, c : c + 8] for r, c in ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1))])
    return (images, around.max(0), around.min(0))[label]


def quartered(images: Images) -> Images:
    """The four quarters, each one place further around."""
    top, bottom = (images[:, 4:, :4], images[:, :4, :4]), (images[:, 4:, 4:], images[:, :4, 4:])
    return np.concatenate([np.concatenate(top, 2), np.concatenate(bottom, 2)], 1)


def dotted(images: Images, label: int, rng: np.random.Generator) -> Images:
    """A row of the picture with two pixels of grey more."""
    seen = images.astype(np.float64)
    at = rng.integers(7, size=len(images))
    for step in (0, 1):
        seen[np.arange(len(images)), label, at + step] += 5
    return seen


def numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word} {number}" for number in range(count))


MORE_TASKS = {
    "blurred": which(("sharp", "blurred", "twice blurred"), lambda x, label, rng: smoothed(x, label)),
    "checked": which(("even", "odd"), lambda x, label, rng: x + 2.0 * ((np.indices((8, 8)).sum(0) % 2 == label) - 0.5)),
    "column": which(
        numbered("column", 8), lambda x, label, rng: np.where(np.arange(8)[None, None] == label, x * 0.4 + 3, x)
    ),
    "contrast": which(numbered("level", 4), lambda x, label, rng: 8 + (x - 8.0) * (0.25, 0.45, 0.7, 1.0)[label]),
    "digit-blurred": digit_of(lambda x: smoothed(x, 2).round().astype(np.uint8)),
    "digit-inverted": digit_of(lambda x: MAX_INK - x),
    "digit-rotated": digit_of(lambda x: np.rot90(x, axes=(1, 2))),
    "digit-scrambled-a": digit_of(scrambled(1)),
    "digit-scrambled-b": digit_of(scrambled(2)),
    "digit-top": digit_of(lambda x: np.concatenate([x[:, :5], np.zeros_like(x[:, 5:])], 1)),
    "distance-to-5": sort_of(numbered("distance", 6), lambda digits: np.abs(digits - 5)),
    "halves": Task(classes=("of one", "of two"), make=halves),
    "loops": sort_of(("none", "some"), lambda digits: np.isin(digits, (0, 6, 8, 9))),
    "modulo-3": sort_of(numbered("rest", 3), lambda digits: digits % 3),
    "noisy": which(numbered("level", 4), lambda x, label, rng: x + rng.normal(0, 1.2 * label + 1e-9, x.shape)),
    "pair": sort_of(numbered("pair", 5), lambda digits: digits // 2),
    "prime": sort_of(("no", "yes"), lambda digits: np.isin(digits, (2, 3, 5, 7))),
    "digit-quartered": digit_of(quartered),
    "row": which(numbered("row", 8), dotted),
    "strokes": which(("as written", "thick", "thin"), thickened),
    "digit-transposed": digit_of(lambda x: x.swapaxes(1, 2)),
    "upside-down": which(("as written", "upside down"), lambda x, label, rng: x[:, ::-1] if label else x),
}
