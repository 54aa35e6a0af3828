"""Says how each library names the weight files in a model's folder, and whether it reads more than one. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LibraryName = Literal["transformers", "diffusers", "open_clip", "timm", "peft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """How a library loads a folder."""

    stem: str
    """The beginning of the weight files' names."""
    reads_shards: bool
    """Whether it reads several files by an index."""


LIBRARIES: Mapping[LibraryName, Library] = {
    "transformers": Library(stem="model", reads_shards=True),
    "diffusers": Library(stem="diffusion_pytorch_model", reads_shards=True),
    "open_clip": Library(stem="open_clip_model", reads_shards=False),
    "timm": Library(stem="model", reads_shards=False),
    "peft": Library(stem="adapter_model", reads_shards=False),
}
STEMS = tuple(dict.fromkeys(library.stem for library in LIBRARIES.values()))


def library_of(config: Mapping[str, Any], names: Collection[str]) -> LibraryName:
    """Return the library that saved a model, judged by its config.json (empty if there is none) and the names of its
    side files."""
    if "_diffusers_version" in config:
        return "diffusers"
    if not config and "open_clip_config.json" in names:
        return "open_clip"
    if "architecture" in config and "pretrained_cfg" in config:
        return "timm"
    return "transformers"


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of `count` weight files; a single one has no number."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"
