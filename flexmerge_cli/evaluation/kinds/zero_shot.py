"""Scores `zero-shot-image-classification`: CLIP with the task's image encoder and the base's text tower and templates.

columns     image, label (numbers, or names)
labels      names of the classes, in their order, which fill the templates
templates   texts with `{}`; by default templates.json (a list) of the base, else `a photo of a {}.`
text_model  a whole CLIP checkpoint, for its text tower and tokenizer; by default the spec's `base`
A class's embedding is the mean of its templates' normalised embeddings, normalised. Classes are embedded once, in
float32. The image encoder is a whole CLIP model, a CLIPVisionModelWithProjection, or a CLIPVisionModel, which is
projected by the text model's own projection.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from flexmerge_cli.evaluation.kinds.classes import CLASS_METRICS, architecture_of, class_scores
from flexmerge_cli.evaluation.kinds.images import ImageTask, image_examples
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run
from flexmerge_cli.evaluation.kinds.tokens import open_tokenizer
from flexmerge_cli.evaluation.loading import build_model, read_config
from flexmerge_cli.evaluation.models import checkpoint_model, fetched
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.side_files import side_digest

TEMPLATES = ("a photo of a {}.",)
ENCODERS = ("CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel")


class ZeroShot(ImageTask):
    kind: Literal["zero-shot-image-classification"]
    labels: tuple[str, ...] = Field(min_length=1)
    templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    text_model: str | None = None


@dataclass(slots=True, kw_only=True)
class TextTower:
    """A whole CLIP model that texts are embedded with."""

    checkpoint: Checkpoint
    access: Access
    tokenizer: Any
    _model: TaskModel | None = None

    @property
    def model(self) -> TaskModel:
        """The model. Opening it reads its weights once, for their digest."""
        if self._model is None:
            self._model = checkpoint_model("text model", fetched(self.checkpoint, self.access))
        return self._model

    def digest(self) -> str:
        """Return the digest of everything that embeddings depend on besides the texts."""
        return f"{self.model.digest} {side_digest(self.checkpoint.path)}"


@dataclass(slots=True, kw_only=True)
class Classes:
    """The texts that images are compared with, embedded on first use."""

    tower: TextTower
    prompts: list[list[str]]
    """The prompts of each class."""
    _found: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)

    def digest(self) -> str:
        return f"{self.tower.digest()} {self.prompts}"

    def embedded(self, run: Run) -> tuple[Any, Any, Any]:
        """Return embeddings [classes, d] float32, the scale of the logits, and the text model's projection of
        images."""
        if run.device not in self._found:
            self._found[run.device] = _embedded(self, run)
        return self._found[run.device]


def prepare(task: ZeroShot, place: Place) -> Examples:
    require_encoder(place)
    examples, classes = image_examples(task, place, len(task.labels)), _classes(task, place)
    return replace(examples, items=(*examples.items, classes), rest=lambda: f"{classes.digest()} {examples.rest()}")


def require_encoder(place: Place) -> str:
    """Return the architecture of an image encoder of CLIP. Raises UsageError if the task's config names another."""
    encoder = architecture_of(read_config(place.side))
    if encoder not in ENCODERS:
        raise place.error(
            "kind",
            f"{place.side}/config.json names {encoder}, which is not an image encoder of CLIP",
            hint=f"one of: {', '.join(ENCODERS)}",
        )
    return encoder


def score(model: TaskModel, task: ZeroShot, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    images, labels, classes = examples.items
    texts, scale, projection = classes.embedded(run)  # The encoder is built later: one model at a time.
    built = build_model(model, run.dtype, run.device, on_built=run.on_built)
    found = []
    with torch.inference_mode():
        for start, stop in run.batches(examples.n):
            pixels = images.pixels(start, stop, model.folder).to(built.device, built.dtype)
            embedded = image_embeddings(built, pixels, projection)
            found.append((scale * embedded @ texts.T).cpu().numpy())
    return class_scores(np.concatenate(found), labels, examples.metrics)


def _classes(task: ZeroShot, place: Place) -> Classes:
    """Check text model, templates and tokenizer. Reads only headers of the text model's weights."""
    tower = text_tower(task.text_model, place)
    templates = task.templates or _templates(tower.checkpoint.path, place)
    wrong = next((text for text in templates if text.count("{}") != 1), None)
    if wrong is not None:
        raise place.error("templates", f"{wrong[:60]!r} must contain {{}} exactly once", hint="a photo of a {}.")
    prompts = [[template.replace("{}", label) for template in templates] for label in task.labels]
    return Classes(tower=tower, prompts=prompts)


def text_tower(written: str | None, place: Place) -> TextTower:
    """Open a whole CLIP checkpoint, by default the spec's `base`. Reads only headers of weights.

    written: the key `text_model`. Raises UsageError, SourceError, DataError.
    """
    key = "text_model" if written else "kind"
    written = written or (place.document.value.get("base") if isinstance(place.document.value, dict) else None)
    if written is None:
        raise place.error("", "no text model", hint="text_model: path/of/a/CLIP, or `base:` of the spec")
    checkpoint = open_checkpoint(written, relative_to=place.folder, access=place.access)
    folder = checkpoint.path
    architecture = architecture_of(read_config(folder))
    if architecture != "CLIPModel":
        said = f"{folder}/config.json names {architecture}: no text tower"
        raise place.error(key, said, hint="text_model: a whole CLIPModel")
    return TextTower(checkpoint=checkpoint, access=place.access, tokenizer=open_tokenizer(folder, place))


def _templates(folder: Path, place: Place) -> Sequence[str]:
    path = folder / "templates.json"
    if not path.is_file():
        return TEMPLATES
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise place.error("kind", f"{path} is not a list of texts", hint="correct the file, or give `templates`")
    return found


def _embedded(classes: Classes, run: Run) -> tuple[Any, Any, Any]:
    import torch

    built = build_model(classes.tower.model, "float32", run.device)
    normalised = torch.nn.functional.normalize
    with torch.inference_mode():
        each = (text_embeddings(built, classes.tower.tokenizer, prompts) for prompts in classes.prompts)
        rows = [normalised(embeddings.mean(0), dim=-1) for embeddings in each]
        scale = built.logit_scale.exp()
    return torch.stack(rows), scale, built.visual_projection


def text_embeddings(built: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    """Embed texts with a whole CLIP model: normalised, [n, d]. Texts that are too long are cut."""
    import torch

    longest = min(tokenizer.model_max_length, built.config.text_config.max_position_embeddings)
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    inputs = inputs.to(built.device)
    output = built.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return torch.nn.functional.normalize(built.text_projection(output.pooler_output), dim=-1)


def image_embeddings(built: Any, pixels: Any, projection: Any) -> Any:
    """Embed images: normalised, float32 [n, d]. projection: used if the encoder has none of its own."""
    import torch

    name = type(built).__name__
    if name == "CLIPVisionModelWithProjection":
        found = built(pixel_values=pixels).image_embeds
    elif name == "CLIPModel":
        found = built.visual_projection(built.vision_model(pixel_values=pixels).pooler_output)
    else:
        found = projection(built(pixel_values=pixels).pooler_output.float())
    return torch.nn.functional.normalize(found.float(), dim=-1)


KIND = Kind(
    name="zero-shot-image-classification",
    schema=ZeroShot,
    metrics=CLASS_METRICS,
    prepare=prepare,
    score=score,
    batch_size=64,
)
