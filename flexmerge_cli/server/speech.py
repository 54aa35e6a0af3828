"""Serves `speech-recognition` with Whisper's architecture: the bytes of a WAV file in, the spoken text out."""

import io
import threading
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.loading import quiet_transformers
from flexmerge_cli.server.generation import LIKELIEST
from flexmerge_cli.server.pictures import bytes_of
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.tasks import Task, TaskTokens, generation_settings
from flexmerge_cli.serving.meeting import pause

PROMPT_TOKENS = 4
"""The number of tokens before those of the text, which give the language and the task."""


@dataclass(slots=True, kw_only=True, eq=False)
class Said:
    """One recording to transcribe."""

    features: Tensor
    """The spectrogram, float32 [1, mels, frames]."""
    max_tokens: int
    is_cancelled: bool = False


class Speech(Task):
    """A recording in, a text out."""

    kind = "speech-recognition"
    has_pauses = True

    def __init__(self, name: str, side: Path, *, max_tokens: int) -> None:
        super().__init__(name, side)
        self.tokens = TaskTokens(name, side, self.config)
        positions = int(self.config.get("max_target_positions", 448))
        self.max_tokens = min(max_tokens, max(1, positions - PROMPT_TOKENS))
        self._lock = threading.Lock()
        transformers = quiet_transformers()
        try:
            self.extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(side, local_files_only=True)
            self.rate, self.seconds = int(self.extractor.sampling_rate), float(self.extractor.chunk_length)
        except Exception as error:  # It comes from transformers, also for a malformed file.
            said = str(error).split("\n")[0][:200]
            raise UsageError(
                f"task `{name}`: {side}/preprocessor_config.json prepares no audio ({said})",
                hint="leave the task out with --tasks",
            ) from None

    def prepare(self, value: Any, **options: Any) -> Said:
        """Prepare a recording. options: max_tokens."""
        wanted = options.get("max_tokens")
        if wanted is not None and wanted > self.max_tokens:
            raise Refusal(f"max_tokens is {wanted}, and the most is {self.max_tokens}", param="max_tokens")
        if not isinstance(value, str):
            raise Refusal("an input is the bytes of a WAV file in base64", param="inputs")
        samples = samples_of(bytes_of(value, "a recording"), self.rate)
        if not 0 < len(samples) <= self.seconds * self.rate:
            said = f"a recording is {len(samples) / self.rate:.1f} seconds long, and task `{self.name}` takes more "
            raise Refusal(said + f"than 0 and at most {self.seconds:g}", param="inputs")
        with self._lock:
            found = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        return Said(features=found["input_features"], max_tokens=wanted or self.max_tokens)

    def meet(self, model: Any) -> None:
        generation_settings(self, model)

    def cancel(self, item: Said) -> None:
        item.is_cancelled = True

    def batches(self, items: Sequence[Said]) -> list[list[Said]]:
        """Return together those that may have the same number of tokens."""
        return [[item for item in items if item.max_tokens == most] for most in sorted({i.max_tokens for i in items})]

    def run(self, model: Any, items: Sequence[Said], deliver: Callable[[int, Any], None]) -> None:
        def has_ended(ids: Tensor, _scores: Tensor, **_more: Any) -> Tensor:
            pause()
            return torch.tensor([item.is_cancelled for item in items], device=ids.device)

        made = model.generate(
            input_features=torch.cat([item.features for item in items]).to(model.device, model.dtype),
            max_new_tokens=items[0].max_tokens,
            return_dict_in_generate=False,
            **LIKELIEST,
            stopping_criteria=[has_ended],
        )
        with self.tokens.lock:
            texts = self.tokens.tokenizer.batch_decode(made, skip_special_tokens=True)
        for number, text in enumerate(texts):
            deliver(number, {"text": text.strip()})


def samples_of(data: bytes, rate: int) -> np.ndarray:
    """Return the samples of a WAV file, float32 [n] in [-1, 1), the mean of its channels. Raises Refusal."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, found_rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError, ZeroDivisionError) as error:
        said = f"a recording is no WAV file of whole-number samples (PCM): {str(error)[:100]}"
        raise Refusal(said, param="inputs") from None
    if width not in (1, 2, 3, 4):
        said = f"a recording has samples of {8 * width} bits, and the task takes 8, 16, 24 or 32: convert it"
        raise Refusal(said, param="inputs")
    if found_rate != rate:
        said = f"a recording has {found_rate} samples a second, and the task takes {rate}: resample it"
        raise Refusal(said, param="inputs")
    frames = frames[: len(frames) - len(frames) % (width * channels)]
    if width == 1:
        values = np.frombuffer(frames, np.uint8).astype(np.float32) - 128
    elif width == 3:
        parts = np.frombuffer(frames, np.uint8).reshape(-1, 3)
        padded = np.concatenate([np.zeros((len(parts), 1), np.uint8), parts], axis=1)
        values = (np.ascontiguousarray(padded).view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        values = np.frombuffer(frames, f"<i{width}").astype(np.float32)
    found: np.ndarray = (values / float(1 << (8 * width - 1))).reshape(-1, channels).mean(1)
    return found.astype(np.float32)
