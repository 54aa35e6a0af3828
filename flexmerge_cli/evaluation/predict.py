"""Answers inputs whose task is unknown: the bundle's router chooses the task, and that task's model answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.router import Router
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.classes import label_names
from flexmerge_cli.evaluation.kinds.images import image_processor, pixels_of, pixels_of_array
from flexmerge_cli.evaluation.kinds.sequences import encodings, padded_batch, takes_batches
from flexmerge_cli.evaluation.kinds.tokens import max_length, read_tokenizer
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.router import pooled
from flexmerge_cli.serving.runtime import Runtime

PICTURES = (bytes, Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The answer to one input."""

    task: str
    """The task that the router chose."""
    probability: float
    """The router's probability of that task."""
    outputs: np.ndarray
    """The outputs of the task's head, float32 [outputs]."""
    label: str | None
    """The name of the largest output; None if the head has one output, or its labels have no names."""


class Predictor:
    """A bundle with a router, ready to answer. Models are loaded when they are first used."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        weights: Literal["dense", "packed"] = "dense",
        batch_size: int = 32,
    ) -> None:
        """Read the router. The arguments are those of `OpenBundle.runtime`, and batch_size, the most inputs at once.

        Raises UsageError if the bundle has no router.
        """
        self._bundle, self._router, self._batch_size = bundle, Router.of(bundle), batch_size
        assert bundle.manifest.router is not None
        self._entry = bundle.manifest.router
        self._runtime = Runtime(bundle, device=device, weights=weights)
        self._tokenizers: dict[str, Any] = {}

    def probabilities(self, inputs: Sequence[Any]) -> np.ndarray:
        """Return the probability of each task for each input, float64 [n, tasks]. inputs: as in `predict`."""
        import torch

        task, found = self._entry.features, []
        model = self._runtime.model(task)
        with torch.inference_mode():
            for batch in self._batches(task, model, inputs):
                found.append(self._router.probabilities(pooled(model, batch)))
        return np.concatenate(found) if found else np.empty((0, len(self._entry.tasks)))

    def predict(self, inputs: Sequence[Any]) -> list[Prediction]:
        """Route each input to its task, and return the answers in order.

        inputs: texts, pairs of texts, or images: arrays [channels, height, width], paths, bytes, or PIL images. Raises
        UsageError for an input that the models do not accept.
        """
        import torch

        chances = self.probabilities(inputs)
        found: dict[int, Prediction] = {}
        for number, task in enumerate(self._entry.tasks):
            own = np.flatnonzero(chances.argmax(axis=1) == number)
            if not len(own):
                continue
            model, logits = self._runtime.model(task), []
            with torch.inference_mode():
                for batch in self._batches(task, model, [inputs[index] for index in own.tolist()]):
                    logits.append(model(**batch).logits.float().cpu().numpy())
            labels = label_names(read_config(self._bundle.config_folder(task)))
            for index, row in zip(own.tolist(), np.concatenate(logits)):
                label = labels[int(row.argmax())] if 1 < len(row) == len(labels) else None
                found[index] = Prediction(
                    task=task, probability=float(chances[index, number]), outputs=row, label=label
                )
        return [found[index] for index in range(len(inputs))]

    def _batches(self, task: str, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Prepare inputs for the model of a task."""
        size = self._batch_size
        if any(isinstance(value, str) or _is_pair(value) for value in inputs):
            tokenizer, rows = self._rows(task, inputs)
            size = size if takes_batches(model, tokenizer) else 1
            return [padded_batch(model, tokenizer, rows[at : at + size]) for at in range(0, len(rows), size)]
        import torch

        pixels = [self._pixels(task, value) for value in inputs]
        if len({tuple(one.shape) for one in pixels}) > 1:
            size = 1
        groups = [torch.cat(pixels[at : at + size]) for at in range(0, len(pixels), size)]
        return [{"pixel_values": group.to(model.device, model.dtype)} for group in groups]

    def _rows(self, task: str, inputs: Sequence[Any]) -> tuple[Any, list[dict[str, list[int]]]]:
        side = self._bundle.config_folder(task)
        if task not in self._tokenizers:
            self._tokenizers[task] = read_tokenizer(side)
        tokenizer, rows = self._tokenizers[task], []
        length = max_length(tokenizer, side, None)
        for value in inputs:
            texts = [value] if isinstance(value, str) else list(value) if _is_pair(value) else []
            if not texts:
                raise UsageError(f"an input is {type(value).__name__}, and others are texts", hint="ask for one kind")
            rows += encodings(tokenizer, *([text] for text in texts), truncation=length is not None, max_length=length)
        return tokenizer, rows

    def _pixels(self, task: str, value: Any) -> Any:
        side = self._bundle.config_folder(task)
        if isinstance(value, PICTURES) or hasattr(value, "convert"):
            return pixels_of(image_processor(side), [value])
        array = np.asarray(value)
        if array.ndim != 3 or array.dtype.kind not in "uif":
            raise UsageError(
                f"an input is {type(value).__name__}, which is neither a text nor an image",
                hint="texts, pairs of texts, numbers [channels, height, width], or pictures",
            )
        return pixels_of_array(array[None], side)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(text, str) for text in value)
