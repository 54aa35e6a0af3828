"""Chooses how each task is served, from the architecture that its config names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.classes import architecture_of
from flexmerge_cli.evaluation.kinds.tokens import FILES
from flexmerge_cli.evaluation.loading import quiet_transformers, read_config
from flexmerge_cli.server.encoders import Embeddings, ImageEmbeddings, ImagesAndTexts
from flexmerge_cli.server.speech import Speech
from flexmerge_cli.server.tasks import CausalLM, ImageClasses, Task, Text2TextTask, Texts

Make = Callable[[str, Path, int], Task]
"""Makes a task from its name, the folder of its side files, and the most tokens of a generated text."""


def tasks_of(bundle: Bundle, names: Sequence[str], *, max_tokens: int) -> dict[str, Task]:
    """Return the tasks that are served, by name.

    Raises UsageError for one that cannot be served, FlexmergeError for unsound side files.
    """
    found: dict[str, Task] = {}
    for name in names:
        bundle.check_files(name, weights=False)
        side = bundle.config_folder(name)
        found[name] = _kind_of(name, side)(name, side, max_tokens)
    return found


def _kind_of(name: str, side: Path) -> Make:
    quiet_transformers()
    from transformers.models.auto import modeling_auto as auto

    config = read_config(side)
    architecture = architecture_of(config)
    kinds: list[tuple[Any, Make]] = [
        ({"": ("WhisperForConditionalGeneration",)}, lambda name, side, n: Speech(name, side, max_tokens=n)),
        ({"": ("CLIPModel",)}, lambda name, side, _: ImagesAndTexts(name, side)),
        ({"": ("CLIPVisionModelWithProjection",)}, lambda name, side, _: ImageEmbeddings(name, side)),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, lambda name, side, _: Texts(name, side)),
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, lambda name, side, _: ImageClasses(name, side)),
        (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            lambda name, side, n: Text2TextTask(name, side, max_tokens=n),
        ),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, lambda name, side, n: CausalLM(name, side, max_tokens=n)),
    ]
    if not config.get("is_encoder_decoder") and any((side / file).is_file() for file in FILES):
        kinds.append((auto.MODEL_MAPPING_NAMES, lambda name, side, _: Embeddings(name, side)))
    for table, make in kinds:
        if architecture in {
            each for names in table.values() for each in ([names] if isinstance(names, str) else names)
        }:
            return make
    raise UsageError(
        f"task `{name}`: {side}/config.json names {architecture}, which is not served",
        hint="classification of texts and images, regression, text2text, causal language models, encoders of texts, "
        "CLIP and Whisper are; choose such tasks with --tasks",
    )
