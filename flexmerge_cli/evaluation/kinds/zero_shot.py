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
class Classes:
    """The texts that images are compared with, embedded on first use."""

    checkpoint: Checkpoint
    access: Access
    """Access to the whole CLIP model that texts are embedded with."""
    prompts: list[list[str]]
    """The prompts of each class."""
    tokenizer: Any
    _model: TaskModel | None = None
    _found: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)

    @property
    def model(self) -> TaskModel:
        """The text model. Opening it reads its weights once, for their digest."""
        if self._model is None:
            self._model = checkpoint_model("text model", fetched(self.checkpoint, self.access))
        return self._model

    def digest(self) -> str:
        """Return the digest of everything that the embeddings depend on."""
        return f"{self.model.digest} {side_digest(self.checkpoint.path)} {self.prompts}"

    def embedded(self, run: Run) -> tuple[Any, Any, Any]:
        """Return embeddings [classes, d] float32, the scale of the logits, and the text model's projection of
        images."""
        if run.device not in self._found:
            self._found[run.device] = _embedded(self, run)
        return self._found[run.device]


def prepare(task: ZeroShot, place: Place) -> Examples:
    encoder = architecture_of(read_config(place.side))
    if encoder not in ENCODERS:
        raise place.error(
            "kind",
            f"{place.side}/config.json names {encoder}, which is not an image encoder of CLIP",
            hint=f"one of: {', '.join(ENCODERS)}",
        )
    examples, classes = image_examples(task, place, len(task.labels)), _classes(task, place)
    return replace(examples, items=(*examples.items, classes), rest=lambda: f"{classes.digest()} {examples.rest()}")


def score(model: TaskModel, task: ZeroShot, examples: Examples, run: Run) -> Sequence[Scored]:
    import torch

    images, labels, classes = examples.items
    texts, scale, projection = classes.embedded(run)  # The encoder is built later: one model at a time.
    built = build_model(model, run.dtype, run.device, on_built=run.on_built)
    found = []
    with torch.inference_mode():
        for start, stop in run.batches(examples.n):
            pixels = images.pixels(start, stop, model.folder).to(built.device, built.dtype)
            embedded = torch.nn.functional.normalize(_image_embeddings(built, pixels, projection).float(), dim=-1)
            found.append((scale * embedded @ texts.T).cpu().numpy())
    return class_scores(np.concatenate(found), labels, examples.metrics)


def _classes(task: ZeroShot, place: Place) -> Classes:
    """Check text model, templates and tokenizer. Reads only headers of the text model's weights."""
    written = task.text_model or (place.document.value.get("base") if isinstance(place.document.value, dict) else None)
    if written is None:
        raise place.error("", "no text model", hint="text_model: path/of/a/CLIP, or `base:` of the spec")
    checkpoint = open_checkpoint(written, relative_to=place.folder, access=place.access)
    folder = checkpoint.path
    key = "text_model" if task.text_model else "kind"
    architecture = architecture_of(read_config(folder))
    if architecture != "CLIPModel":
        said = f"{folder}/config.json names {architecture}: no text tower"
        raise place.error(key, said, hint="text_model: a whole CLIPModel")
    templates = task.templates or _templates(folder, place)
    wrong = next((text for text in templates if text.count("{}") != 1), None)
    if wrong is not None:
        raise place.error("templates", f"{wrong[:60]!r} must contain {{}} exactly once", hint="a photo of a {}.")
    prompts = [[template.replace("{}", label) for template in templates] for label in task.labels]
    tokenizer = open_tokenizer(folder, place)
    return Classes(checkpoint=checkpoint, access=place.access, prompts=prompts, tokenizer=tokenizer)


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

    built = build_model(classes.model, "float32", run.device)
    normalised = torch.nn.functional.normalize
    rows = []
    with torch.inference_mode():
        for prompts in classes.prompts:
            longest = min(classes.tokenizer.model_max_length, built.config.text_config.max_position_embeddings)
            inputs = classes.tokenizer(
                prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(built.device)
            output = built.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            each = normalised(built.text_projection(output.pooler_output), dim=-1)
            rows.append(normalised(each.mean(0), dim=-1))
        scale = built.logit_scale.exp()
    return torch.stack(rows), scale, built.visual_projection


def _image_embeddings(built: Any, pixels: Any, projection: Any) -> Any:
    """Return image embeddings [batch, d], with the encoder's own projection if it has one."""
    name = type(built).__name__
    if name == "CLIPVisionModelWithProjection":
        return built(pixel_values=pixels).image_embeds
    if name == "CLIPModel":
        return built.visual_projection(built.vision_model(pixel_values=pixels).pooler_output)
    return projection(built(pixel_values=pixels).pooler_output.float())


KIND = Kind(
    name="zero-shot-image-classification",
    schema=ZeroShot,
    metrics=CLASS_METRICS,
    prepare=prepare,
    score=score,
    batch_size=64,
)
