"""Serves tasks whose model has no head: embeddings of texts and images, and images compared with a request's texts.

A text's embedding is what sentence-transformers computes, if modules.json says how, else the mean over its tokens.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.sequences import mean_of_tokens, padded_batch, takes_batches
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.server.refusal import Refusal
from flexmerge_cli.server.tasks import OfImages, Task, TaskTokens, require_finite, require_no_options

POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "lasttoken"}
"""How sentence-transformers names them in its older files, `pooling_mode_…`, and in newer ones."""
MAX_TEXTS = 1000
"""The largest number of texts that one image is compared with."""
TEXTS_AT_ONCE = 32
"""The largest number of those texts that run together, so that memory does not grow with their number."""


class Embeddings(Task):
    """`embedding`: a text in, a vector out."""

    kind = "embedding"

    def __init__(self, name: str, side: Path) -> None:
        super().__init__(name, side)
        self.tokens = TaskTokens(name, side, self.config)
        self.pooling, self.is_normalised, limit = _as_sentence_transformers(name, side)
        self.tokens.longest = min((one for one in (self.tokens.longest, limit) if one is not None), default=None)

    def prepare(self, value: Any, **options: Any) -> Any:
        require_no_options(self, options)
        if not isinstance(value, str):
            raise Refusal("an input is a text", param="inputs")
        return self.tokens.encoded(value)

    def run(self, model: Any, items: Sequence[Any], deliver: Callable[[int, Any], None]) -> None:
        step = len(items) if takes_batches(model, self.tokens.tokenizer) else 1
        for first in range(0, len(items), step):
            rows = self._batch(model, items[first : first + step])
            for number, row in enumerate(rows.tolist(), first):
                deliver(number, {"embedding": row})

    def _batch(self, model: Any, items: Sequence[Any]) -> Tensor:
        inputs = padded_batch(model, self.tokens.tokenizer, list(items))
        states = model(**inputs).last_hidden_state.float()
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, :, None].to(states.dtype)
        found = pooled(states, mask, self.pooling)
        found = normalize(found, dim=-1) if self.is_normalised else found
        require_finite(found.cpu().numpy())
        return found.cpu()


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector for each text.

    states: float32 [batch, tokens, width]. mask: [batch, tokens, 1], 1 for tokens and 0 for padding.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    rows = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[rows, mask[:, :, 0].argmax(1)]
    if pooling == "lasttoken":
        return states[rows, (mask[:, :, 0] * (places + 1)).argmax(1)]
    if pooling == "max":
        return states.masked_fill(mask == 0, -torch.inf).amax(1)
    return mean_of_tokens(states, mask)


def _as_sentence_transformers(name: str, side: Path) -> tuple[str, bool, int | None]:
    """Return how the states of tokens become one vector, whether it is normalised, and the most tokens of a text.

    Raises UsageError if sentence-transformers would compute anything else.
    """
    if not (side / "modules.json").is_file():
        return "mean", False, None
    modules = _read(name, side / "modules.json")
    listed = [one for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UsageError(
            f"task `{name}`: {side}/modules.json lists {', '.join(kinds)[:200]}, which is not served",
            hint="a Transformer, a Pooling and maybe a Normalize are; choose other tasks with --tasks",
        )
    read = _read(name, side / Path(str(listed[1].get("path", ""))).name / "config.json")
    config = read if isinstance(read, dict) else {}
    asked = [word for key, word in POOLINGS.items() if config.get(f"pooling_mode_{key}") is True]
    asked = asked or [word for word in POOLINGS.values() if config.get("pooling_mode") == word]
    if len(asked) != 1:
        raise UsageError(
            f"task `{name}`: its Pooling is not one of {', '.join(POOLINGS.values())}, and no other is served",
            hint="choose other tasks with --tasks",
        )
    _require_no_prompt(name, side / "config_sentence_transformers.json")
    transformer = side / Path(str(listed[0].get("path", ""))).name
    limits = [_limit(name, path) for path in transformer.glob("sentence_*_config.json")]
    return asked[0], len(kinds) > 2, min((one for one in limits if one is not None), default=None)


def _require_no_prompt(name: str, path: Path) -> None:
    """Raise UsageError if sentence-transformers would put a prompt before every text."""
    config = _read(name, path) if path.is_file() else {}
    prompt = config.get("default_prompt_name") if isinstance(config, dict) else None
    prompts = config.get("prompts") if prompt is not None else None
    if prompt is not None and not (isinstance(prompts, dict) and prompts.get(str(prompt)) == ""):
        raise UsageError(
            f"task `{name}`: {path} has the `default_prompt_name` `{str(prompt)[:100]}`, which is not served",
            hint="set it to null in the checkpoint, merge again, and send the prompt with each text; "
            "or leave the task out with --tasks",
        )


def _limit(name: str, path: Path) -> int | None:
    """Return the most tokens of a text, if the config of a Transformer names it."""
    read = _read(name, path)
    config = read if isinstance(read, dict) else {}
    if config.get("do_lower_case"):
        raise UsageError(
            f"task `{name}`: {path} has `do_lower_case`, which is not served",
            hint="set it to false in the checkpoint, merge again, and send texts in lower case; "
            "or leave the task out with --tasks",
        )
    limit: int | None = config.get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UsageError(
            f"task `{name}`: {path} has {str(limit)[:100]!r} as `max_seq_length`, which is not a positive whole number",
            hint="correct the checkpoint and merge again, or leave the task out with --tasks",
        )
    return limit


def _read(name: str, path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        said = f"task `{name}`: {path} cannot be read: {str(error)[:200]}"
        raise UsageError(said, hint="get a sound copy of the file, or leave the task out with --tasks") from None


class ImageEmbeddings(OfImages):
    """`image-embedding`: an image in, its projection by the encoder out, of length 1."""

    kind = "image-embedding"

    def run(self, model: Any, items: Sequence[Any], deliver: Callable[[int, Any], None]) -> None:
        found = normalize(model(pixel_values=self.joined(items, model)).image_embeds.float(), dim=-1).cpu()
        require_finite(found.numpy())
        for number, row in enumerate(found.tolist()):
            deliver(number, {"embedding": row})


class ImagesAndTexts(OfImages):
    """`zero-shot-image-classification`: an image and texts in, the text that fits best out."""

    kind = "zero-shot-image-classification"

    def __init__(self, name: str, side: Path) -> None:
        super().__init__(name, side)
        self.tokens = TaskTokens(name, side, self.config)

    def prepare(self, value: Any, **options: Any) -> Any:
        require_no_options(self, options)
        said = "an input is an object with an `image`, and `texts`, a list of texts that it is compared with"
        if not isinstance(value, dict) or set(value) != {"image", "texts"} or not isinstance(value["texts"], list):
            raise Refusal(said, param="inputs")
        texts = value["texts"]
        if not 1 <= len(texts) <= MAX_TEXTS or not all(isinstance(text, str) for text in texts):
            raise Refusal(f"{said}: 1 to {MAX_TEXTS}", param="inputs")
        return self.pictures.prepared(value["image"]), texts, [self.tokens.encoded(text) for text in texts]

    def pixels(self, item: Any) -> Tensor:
        return super().pixels(item[0])

    def run(self, model: Any, items: Sequence[Any], deliver: Callable[[int, Any], None]) -> None:
        pixels = self.joined(items, model)
        images = normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)
        rows = {tuple(row["input_ids"]): row for item in items for row in item[2]}
        vectors = self._text_vectors(model, sorted(rows.values(), key=lambda row: len(row["input_ids"])))
        for number, (image, (_, own, encoded)) in enumerate(zip(images, items, strict=True)):
            texts = torch.stack([vectors[tuple(row["input_ids"])] for row in encoded])
            logits = (model.logit_scale.exp() * texts @ image).float().cpu()
            require_finite(logits.numpy())
            scores = logits.softmax(-1).tolist()
            best = max(range(len(own)), key=scores.__getitem__)
            deliver(number, {"label": own[best], "index": best, "score": scores[best], "scores": scores})

    def _text_vectors(self, model: Any, rows: Sequence[Any]) -> dict[tuple[int, ...], Tensor]:
        """Return the projection of each text, of length 1, by its tokens."""
        found: dict[tuple[int, ...], Tensor] = {}
        for first in range(0, len(rows), TEXTS_AT_ONCE):
            chunk = rows[first : first + TEXTS_AT_ONCE]
            inputs = dict(self.tokens.tokenizer.pad(chunk, padding=True, return_tensors="pt"))
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            texts = normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)
            found.update(zip((tuple(row["input_ids"]) for row in chunk), texts, strict=True))
        return found
