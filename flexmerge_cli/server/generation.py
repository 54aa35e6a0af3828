"""Generates texts with one model in one batch, each with its own options. Knows neither HTTP nor bundles.

transformers' `generate` runs the model, so that every architecture and its cache work. Each row picks its tokens with
its own random generator, so that its text does not depend on the others of its batch, and ends on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexmerge_cli.evaluation.kinds.tokens import padded
from flexmerge_cli.serving.meeting import pause

CONTEXT = 8
"""Tokens of the prompt that are decoded with the first new ones, because these may begin with a space or not."""
LIKELIEST: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
}  # fmt: skip
"""Options of transformers' `generate` that take the likeliest tokens, whatever a generation_config.json says."""


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """One text to generate, and what has been generated of it."""

    prompt: Sequence[int]
    max_tokens: int
    """At least 1."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """The part of the probability that tokens are drawn from, in (0, 1]."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    seed: int | None = None
    on_text: Callable[[str], None] = field(default=lambda _text: None)
    """Called with each piece of the text once it is certain."""
    is_cancelled: bool = False
    """Set by whoever no longer wants the rest."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    """`stop`, `length` or `cancelled` at the end."""
    _sent: str = ""

    def take(self, token: int, tokenizer: Any, ends: frozenset[int], *, continues: bool) -> None:
        """Add a token. ends: tokens that end a text. continues: whether the text continues where the prompt ends."""
        self.tokens.append(token)
        if token in ends:
            self.finish = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish = "length"
        context = list(self.prompt[-CONTEXT:]) if continues else []
        before = tokenizer.decode(context, skip_special_tokens=True) if context else ""
        self.text = tokenizer.decode(context + self.tokens, skip_special_tokens=True)[len(before) :]
        if places := [place for word in self.stop if (place := self.text.find(word)) >= 0]:
            self.text, self.finish = self.text[: min(places)], "stop"
        if self.is_cancelled:
            self.finish = "cancelled"
        certain = self.text if self.finish else _certain(self.text, self.stop)
        if certain.startswith(self._sent) and certain != self._sent:
            self.on_text(certain[len(self._sent) :])
            self._sent = certain


def generate(model: Any, tokenizer: Any, choices: Sequence[Choice], on_end: Callable[[int], None]) -> None:
    """Generate all texts in one batch. on_end: called with the number of each text that ends."""
    continues = not model.config.is_encoder_decoder
    ids, mask = padded([choice.prompt for choice in choices], 0, left=continues)
    ends = _ends(model)
    generators = [_generator(choice) for choice in choices]

    def pick(_ids: Tensor, scores: Tensor) -> Tensor:
        for row, (choice, generator) in enumerate(zip(choices, generators)):
            if generator is not None and not choice.finish:
                token = _drawn(scores[row], choice, generator)
                scores[row] = -torch.inf
                scores[row, token] = 0
        return scores

    def has_ended(ids: Tensor, _scores: Tensor, **_more: Any) -> Tensor:
        for number, (choice, token) in enumerate(zip(choices, ids[:, -1].tolist())):
            if not choice.finish:
                choice.take(token, tokenizer, ends, continues=continues)
                if choice.finish:
                    on_end(number)
        if not all(choice.finish for choice in choices):
            pause()
        return torch.tensor([bool(choice.finish) for choice in choices], device=ids.device)

    model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(choice.max_tokens for choice in choices),
        **LIKELIEST,
        pad_token_id=_padding(model, ends),
        logits_processor=[pick],
        stopping_criteria=[has_ended],
    )
    for number, choice in enumerate(choices):
        if not choice.finish:  # the model's generation_config.json may have its own limit
            choice.finish = "length"
            on_end(number)


def _certain(text: str, stop: Sequence[str]) -> str:
    """Return the text without an end that may yet become another character, or one of `stop`."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    held = max((size for word in stop for size in range(1, len(word)) if text.endswith(word[:size])), default=0)
    return text[: len(text) - held]


def _drawn(scores: Tensor, choice: Choice, generator: torch.Generator) -> int:
    """Draw a token by its probability."""
    scores = scores.double().cpu()  # in float32 a temperature may be 0
    chances = torch.softmax((scores - scores.max()) / choice.temperature, dim=-1).float()
    if choice.top_p < 1:
        ordered, tokens = chances.sort(descending=True, stable=True)
        chances[tokens[ordered.cumsum(0) - ordered >= choice.top_p]] = 0  # keeps the first
    return int(torch.multinomial(chances, 1, generator=generator))


def _generator(choice: Choice) -> torch.Generator | None:
    """Make the generator of a choice; None if it draws nothing."""
    if choice.temperature == 0:
        return None
    generator = torch.Generator()
    if choice.seed is None:
        generator.seed()
    else:
        generator.manual_seed(choice.seed)
    return generator


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _padding(model: Any, ends: frozenset[int]) -> int:
    padding = model.generation_config.pad_token_id
    return padding if padding is not None and padding >= 0 else min(ends, default=0)  # some say -1 for none
