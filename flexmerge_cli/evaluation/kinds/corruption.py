"""Corrupts images in five severities, such as `gaussian_noise@3`.

The corruptions are those of ImageNet-C (Hendrycks and Dietterich, 2019), computed by the library imagecorruptions-imaug
from 8-bit pixels. Noise is seeded by the spec's seed, the corruption and the position of the image in the data, so that
it is the same for every batch size and all models.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.loading import require

NAMES = ("motion_blur", "impulse_noise", "gaussian_noise", "pixelate", "spatter", "contrast", "jpeg_compression")
SEVERITIES = range(1, 6)
EXTRA = "flexmerge-cli[corrupt]"
LIBRARIES = ("imagecorruptions-imaug", "numpy", "opencv-python", "pillow", "scikit-image", "scipy")


@dataclass(frozen=True, slots=True)
class Corruption:
    """A corruption and its severity."""

    name: str
    severity: int

    def __str__(self) -> str:
        return f"{self.name}@{self.severity}"


def parse_corruptions(words: Sequence[str]) -> tuple[Corruption, ...]:
    """Parse `NAME@SEVERITY`; `NAME` means all its severities, and `all@SEVERITY` all corruptions. Raises UsageError."""
    found: list[Corruption] = []
    for word in words:
        name, at, severity = word.partition("@")
        if (name not in NAMES and name != "all") or (at and severity not in map(str, SEVERITIES)):
            raise UsageError(
                f"`{word}` is not a corruption",
                hint=f"{NAMES[2]}@3, with a severity from 1 to 5: {', '.join(NAMES)}, all",
            )
        severities = [int(severity)] if at else SEVERITIES
        found += [Corruption(one, level) for one in (NAMES if name == "all" else [name]) for level in severities]
    return tuple(dict.fromkeys(found))


def require_library() -> None:
    """Raise UsageError if the library is not installed."""
    require("imagecorruptions", extra=EXTRA)


def library_digest() -> str:
    """Return the versions of the libraries that compute corruptions."""
    return " ".join(f"{name} {version(name)}" for name in LIBRARIES)


def corrupted(pixels: np.ndarray, corruption: Corruption, seed: int, place: int) -> np.ndarray:
    """Corrupt an image. pixels: uint8 [height, width] or [height, width, 3]. place: its position in its data.

    Returns uint8 of the same shape.
    """
    import imagecorruptions.corruptions as library
    from PIL import Image

    drawn = xxhash.xxh32_intdigest(f"{seed} {corruption} {place}".encode())
    # The library cannot blur a picture of one channel. Blurs are the same in every channel.
    as_colours = pixels.ndim == 2 and corruption.name == "motion_blur"
    picture = Image.fromarray(np.stack([pixels] * 3, -1) if as_colours else pixels)
    options: dict[str, Any] = {"seed": drawn} if corruption.name == "impulse_noise" else {}
    with _seeded(drawn):
        found = np.asarray(getattr(library, corruption.name)(picture, corruption.severity, **options), np.float64)
    found = found[..., 0] if as_colours else found
    # A spatter without drops computes 0 / 0.
    clean = np.where(np.isfinite(found), found, pixels)
    return clean.astype(np.uint8)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which the library draws, and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(state)
