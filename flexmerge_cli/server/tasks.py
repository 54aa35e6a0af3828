"""Defines how the tasks of a bundle answer: how inputs become rows, how rows run in a batch, and what comes out.

The code of `eval`'s kinds prepares inputs and reads outputs, so that an answer is what `eval` scores. Knows no HTTP;
raises Refusal for bad input of a client.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.classes import label_count, label_names
from flexmerge_cli.evaluation.kinds.sequences import encodings, head_batch, takes_batches
from flexmerge_cli.evaluation.kinds.tokens import FILES, max_length, num_positions, read_tokenizer
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.server.generation import Choice, generate
from flexmerge_cli.server.pictures import Pictures
from flexmerge_cli.server.refusal import Refusal

UNSERVED = ("constraints", "dola_layers", "force_words_ids", "penalty_alpha", "stop_strings", "token_healing")
"""Settings of generation_config.json with which transformers generates in other ways, or ends a text in one."""
ADJUSTMENTS: dict[str, Any] = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1, "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "guidance_scale": 1, "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "repetition_penalty": 1, "sequence_bias": None, "watermarking_config": None,
}  # fmt: skip
"""Settings with which it changes scores by the tokens of a row or its length, each with a value that has no effect."""


class Task(ABC):
    """One task. Reads its side files when it is made, and no weights."""

    kind: str
    has_pauses = False
    """Whether others may join its runs before they end."""

    def __init__(self, name: str, side: Path) -> None:
        """Read the config. side: the folder of config, and tokenizer or processor. Raises FlexmergeError."""
        self.name, self.side, self.config = name, side, read_config(side)

    @abstractmethod
    def prepare(self, value: Any, **options: Any) -> Any:
        """Turn one input into a row. Raises Refusal. Several threads may call it."""

    def meet(self, model: Any) -> None:
        """See the task's model before any input comes. Raises UsageError if it can't be served."""
        del model

    def batches(self, items: Sequence[Any]) -> list[list[Any]]:
        """Split rows into those that may run as one batch."""
        return [list(items)]

    @abstractmethod
    def run(self, model: Any, items: Sequence[Any], deliver: Callable[[int, Any], None]) -> None:
        """Run one batch. deliver: called once for each row, with its number and answer, as soon as it is known."""

    def cancel(self, item: Any) -> None:
        """End a running row as soon as possible. A single forward pass, the default, runs to its end."""
        del item


class _Classes(Task):
    """A task whose model has a head of classes, and that answers a batch at once."""

    def __init__(self, name: str, side: Path) -> None:
        super().__init__(name, side)
        count = label_count(self.config)
        known = label_names(self.config)
        self.labels = known if len(known) == count else [f"LABEL_{number}" for number in range(count)]
        self.is_multi_label = self.config.get("problem_type") == "multi_label_classification"

    def _outputs(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """Turn logits, [n, classes] float32, into answers."""
        require_finite(logits)
        values = torch.from_numpy(logits)
        scores = values.sigmoid() if self.is_multi_label else values.softmax(-1)
        return [
            {"label": self.labels[best], "index": best, "score": own[best], "scores": own}
            for best, own in zip(logits.argmax(-1).tolist(), scores.tolist())
        ]

    def run(self, model: Any, items: Sequence[Any], deliver: Callable[[int, Any], None]) -> None:
        for number, answer in enumerate(self.answers(model, items)):
            deliver(number, answer)

    @abstractmethod
    def answers(self, model: Any, items: Sequence[Any]) -> list[Any]:
        """Return the model's answers to one batch, in order."""


class Texts(_Classes):
    """`text-classification` or `regression`: takes a text, or a pair of texts."""

    def __init__(self, name: str, side: Path) -> None:
        super().__init__(name, side)
        self.kind = "regression" if len(self.labels) == 1 else "text-classification"
        self.tokens = TaskTokens(name, side, self.config)

    def prepare(self, value: Any, **options: Any) -> Any:
        require_no_options(self, options)
        pair = value if isinstance(value, list) else [value]
        if not 1 <= len(pair) <= 2 or not all(isinstance(text, str) for text in pair):
            raise Refusal("an input is a text, or a list of two texts", param="inputs")
        return self.tokens.encoded(*pair)

    def answers(self, model: Any, items: Sequence[Any]) -> list[Any]:
        step = len(items) if takes_batches(model, self.tokens.tokenizer) else 1
        found = [head_batch(model, self.tokens.tokenizer, items[at : at + step]) for at in range(0, len(items), step)]
        logits = np.concatenate(found)
        if self.kind == "regression":
            require_finite(logits)
            return [{"value": value} for value in logits[:, 0].tolist()]
        return self._outputs(logits)


class OfImages(Task):
    """A task that takes images of any shape that its model accepts, and runs those of one shape at once."""

    def __init__(self, name: str, side: Path) -> None:
        super().__init__(name, side)
        self.pictures = Pictures(name, side)

    def prepare(self, value: Any, **options: Any) -> Any:
        require_no_options(self, options)
        return self.pictures.prepared(value)

    def batches(self, items: Sequence[Any]) -> list[list[Any]]:
        shapes = {tuple(self.pixels(item).shape) for item in items}
        return [[item for item in items if tuple(self.pixels(item).shape) == shape] for shape in sorted(shapes)]

    def pixels(self, item: Any) -> torch.Tensor:
        """Return the pixels of a row, [1, channels, height, width]."""
        found: torch.Tensor = item
        return found

    def joined(self, items: Sequence[Any], model: Any) -> torch.Tensor:
        """Return the pixels of a batch, where and as the model computes."""
        return torch.cat([self.pixels(item) for item in items]).to(model.device, model.dtype)


class ImageClasses(OfImages, _Classes):
    """`image-classification`: takes an array of pixels, or the bytes of a picture."""

    kind = "image-classification"

    def answers(self, model: Any, items: Sequence[Any]) -> list[Any]:
        return self._outputs(model(pixel_values=self.joined(items, model)).logits.float().cpu().numpy())


class Generated(Task):
    """`text2text` or `causal-lm`: takes a text and gives one."""

    has_pauses = True
    is_plain = True
    """Whether nothing but the model's scores decides on a token, so that padding and the length of others do not."""

    def __init__(self, name: str, side: Path, *, max_tokens: int) -> None:
        """Read the tokenizer. max_tokens: the most tokens of a generated text."""
        super().__init__(name, side)
        self.tokens, self.max_tokens = TaskTokens(name, side, self.config), max_tokens
        self.positions = num_positions(side)

    def meet(self, model: Any) -> None:
        settings = generation_settings(self, model)
        self.is_plain = all(settings.get(key) in (None, neutral) for key, neutral in ADJUSTMENTS.items())

    def batches(self, items: Sequence[Choice]) -> list[list[Choice]]:
        """Split rows into batches. What adjusts scores sees padding, and the longest row: such rows are of one size."""
        found: list[list[Choice]] = []
        for item in items:
            for batch in found:
                if self.fits(batch, item):
                    batch.append(item)
                    break
            else:
                found.append([item])
        return found

    def fits(self, batch: Sequence[Choice], item: Choice) -> bool:
        """Return whether a row may run in a batch."""
        sizes = {(len(one.prompt), one.max_tokens) for one in (*batch, item)}
        return self.is_plain or len(sizes) == 1

    def run(self, model: Any, items: Sequence[Choice], deliver: Callable[[int, Any], None]) -> None:
        generate(model, self.tokens.tokenizer, items, lambda number: deliver(number, items[number]))

    def cancel(self, item: Choice) -> None:
        item.is_cancelled = True

    def allowed(self, wanted: int | None, usual: int, most: int | None) -> int:
        """Return how many tokens to generate. wanted: as requested. most: as many as the model has positions for."""
        if wanted is not None and wanted > self.max_tokens:
            raise Refusal(f"max_tokens is {wanted}, and the server's limit {self.max_tokens}", param="max_tokens")
        if most is not None and most < (wanted or 1):
            said = f"the input leaves {most} of the model's {self.positions} tokens, and max_tokens is {wanted or 1}"
            raise Refusal(said, param="max_tokens", code="context_length_exceeded")
        return wanted or min(usual, self.max_tokens, *([] if most is None else [most]))


class Text2TextTask(Generated):
    kind = "text2text"

    def prepare(self, value: Any, **options: Any) -> Choice:
        """Turn one input into a row. options: max_tokens."""
        if not isinstance(value, str):
            raise Refusal("an input is a text", param="inputs")
        prompt = self.tokens.encoded(value)["input_ids"]
        return Choice(prompt=prompt, max_tokens=self.allowed(options.get("max_tokens"), 32, self.positions))


class CausalLM(Generated):
    kind = "causal-lm"

    def prepare(self, value: Any, **options: Any) -> Choice:
        raise Refusal(f"task `{self.name}` is a language model: use /v1/completions or /v1/chat/completions")

    def prompt(self, value: str | list[int]) -> list[int]:
        """Return the tokens of a text, or the tokens themselves. Raises Refusal."""
        if isinstance(value, str):
            return self.tokens.encoded(value)["input_ids"]
        self.tokens.require_sound(value)
        return value

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins. Raises Refusal."""
        tokenizer = self.tokens.tokenizer
        if not tokenizer.chat_template:
            raise Refusal(f"task `{self.name}` has no chat template: use /v1/completions", param="messages")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # from jinja and the template itself, for conversations that it rejects
            said = f"the chat template of task `{self.name}` refuses the messages: {str(error)[:200]}"
            raise Refusal(said, param="messages") from None
        return self.tokens.encoded(text, add_special_tokens=False)["input_ids"]  # the template has them

    def choices(
        self, prompt: list[int], count: int, *, max_tokens: int | None, usual: int, **options: Any
    ) -> list[Choice]:
        """Make the texts to generate after a prompt. max_tokens: None for `usual`, if left. options: those of a
        Choice."""
        most = None if self.positions is None else self.positions - len(prompt)
        allowed = self.allowed(max_tokens, usual, most)
        return [Choice(prompt=prompt, max_tokens=allowed, **options) for _ in range(count)]

    def fits(self, batch: Sequence[Choice], item: Choice) -> bool:
        """Return whether a row may run in a batch: a finished one goes on until its batch ends, and needs positions."""
        rows = (*batch, item)
        needed = max(len(one.prompt) for one in rows) + max(one.max_tokens for one in rows)
        return super().fits(batch, item) and (self.positions is None or needed <= self.positions)


class TaskTokens:
    """A task's tokenizer, which one thread at a time uses."""

    def __init__(self, name: str, side: Path, config: Mapping[str, Any]) -> None:
        if not any((side / file).is_file() for file in FILES):
            raise UsageError(f"task `{name}` has no tokenizer in {side}", hint="leave the task out with --tasks")
        self.name, self.tokenizer, self.lock = name, read_tokenizer(side), threading.Lock()
        self.longest = max_length(self.tokenizer, side, None)
        of_text = config if "vocab_size" in config else config.get("text_config")
        known = of_text.get("vocab_size") if isinstance(of_text, Mapping) else None
        self.vocabulary = known if isinstance(known, int) else len(self.tokenizer)

    def encoded(self, *texts: str, **options: Any) -> dict[str, list[int]]:
        """Return the model's inputs. options: of the tokenizer. Raises like `require_sound`."""
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise Refusal("a text contains half of a surrogate pair, which is not a character") from None
        try:
            with self.lock:
                row = encodings(self.tokenizer, *([text] for text in texts), **options)[0]
        except Exception as error:  # from tokenizers, for texts that cannot be encoded
            raise Refusal(f"the tokenizer refuses the text: {str(error)[:200]}") from None
        self.require_sound(row["input_ids"])
        return row

    def require_sound(self, ids: Sequence[int]) -> None:
        """Raise Refusal for no token, more than the model takes, or one that is not in its vocabulary."""
        outside = next((token for token in ids if token >= self.vocabulary), None)
        if outside is not None:
            raise Refusal(f"token {outside} is not one of the model's {self.vocabulary}")
        if not ids:
            raise Refusal("an input has no tokens")
        if self.longest is not None and len(ids) > self.longest:
            said = f"an input has {len(ids)} tokens, and task `{self.name}` takes {self.longest}"
            raise Refusal(said, code="context_length_exceeded")


def generation_settings(task: Task, model: Any) -> dict[str, Any]:
    """Return the settings of a model's generation_config.json. Raises UsageError if one of them is not served."""
    settings: dict[str, Any] = model.generation_config.to_dict()
    if unserved := [key for key in UNSERVED if settings.get(key)]:
        raise UsageError(
            f"task `{task.name}`: its generation_config.json has `{unserved[0]}`, which is not served",
            hint="remove it from the checkpoint and merge again, or leave the task out with --tasks",
        )
    return settings


def require_no_options(task: Task, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            raise Refusal(f"task `{task.name}` is {task.kind}, which has no `{name}`", param=name)


def require_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ArithmeticError("the model's outputs are not finite")
