"""Prepares the images of requests, which are arrays of pixels or picture files in base64, for a task's model."""

import base64
import binascii
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.evaluation.kinds.images import PROCESSOR, image_processor, image_shape, pixels_of, pixels_of_array
from flexmerge_cli.server.refusal import Refusal


class Pictures:
    """Prepares the images of one task. It may be used by several threads."""

    def __init__(self, name: str, side: Path) -> None:
        """Set the task's name, and the folder of its config and preprocessor, side."""
        self.name, self.side = name, side
        self._processor: Any = None
        self._lock = threading.Lock()

    def prepared(self, value: Any) -> torch.Tensor:
        """Return pixels, float32 [1, channels, height, width]. Raises Refusal."""
        pixels = self._of_picture(value) if isinstance(value, str) else self._of_array(value)
        if not bool(torch.isfinite(pixels).all()):
            raise Refusal("an image has numbers that are not finite", param="inputs")
        return pixels

    def _of_array(self, value: Any) -> torch.Tensor:
        try:
            array = np.array(value)
        except (ValueError, OverflowError):  # The lists have different lengths.
            array = np.empty(0)
        if array.ndim != 3 or array.dtype.kind not in "uif" or not array.size:
            raise Refusal("an image is numbers [channels, height, width], or a picture in base64", param="inputs")
        self._require_shape(array.shape)
        found: torch.Tensor = pixels_of_array(array[None], self.side)
        return found

    def _of_picture(self, text: str) -> torch.Tensor:
        data = bytes_of(text, "a picture")
        try:
            with self._lock:
                if self._processor is None:
                    self._processor = self._opened_processor()
            found: torch.Tensor = pixels_of(self._processor, [data])
        except FlexmergeError as error:
            raise Refusal(error.message, param="inputs") from None
        self._require_shape(tuple(found.shape[1:]))
        return found

    def _opened_processor(self) -> Any:
        if not (self.side / PROCESSOR).is_file():
            raise Refusal(f"task `{self.name}` has no {PROCESSOR}: send pixels instead of a picture", param="inputs")
        try:
            return image_processor(self.side)
        except Exception as error:  # It comes from transformers, also for a malformed file.
            said = str(error).split("\n")[0][:200]
            raise Refusal(
                f"the {PROCESSOR} of task `{self.name}` prepares no pictures ({said}): send pixels", param="inputs"
            ) from None

    def _require_shape(self, shape: tuple[int, ...]) -> None:
        if (wanted := image_shape(self.side, shape)) != shape:
            raise Refusal(f"an image of {list(shape)}, and the model takes {list(wanted)}", param="inputs")


def bytes_of(text: str, what: str) -> bytes:
    """Return the bytes of a file that is given in base64 or as a data: URL. Raises Refusal."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(f"{what} is the bytes of a file in base64", param="inputs") from None
