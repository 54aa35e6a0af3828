"""Chooses the weights among the files of one folder; contents.py says what the other files are. No I/O.

The names that libraries write are tried in order: safetensors before pickles, one file before shards. Failing these, a
variant (`model.fp16.safetensors`) is taken if there is exactly one, otherwise a single weight file of any name, as
`save_model` and training scripts write. An ambiguous choice is never guessed.
"""

import re
from collections.abc import Sequence

from flexmerge_cli.checkpoint.foreign import shards

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# In order of preference: transformers and timm, open_clip, diffusers, last peft; one file, or an index of shards.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "open_clip_pytorch_model.bin",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
ADAPTER_FILES = WEIGHT_FILES[-2:]
# Files that training leaves beside a model: the state of the optimiser, not weights.
NOT_WEIGHTS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|random_states|rng_state|openvino_model)[^/]*")
VARIANT = re.compile(r"(?!.*-of-\d+\Z)[A-Za-z0-9_-]+")  # not the number of a shard
INDEX = re.compile(r".*\.index(\.[\w-]+)?\.json")
NO_VARIANTS = ("index", "safetensors", "bin", "json", "pt")  # parts of file names that are not variants


def choose_weights(names: Sequence[str], variant: str | None = None) -> str | None:
    """Return the weight file or index among the files of a folder; None if there is none or the choice is unclear.

    variant: taken if it is there; otherwise the plain weights are.
    """
    found = variants(names)
    if variant is not None and variant in found:
        return found[variant][0]
    plain = [name for name in WEIGHT_FILES if name in names]
    if "adapter_config.json" in names and plain and plain[-1] in ADAPTER_FILES:
        return next(name for name in plain if name in ADAPTER_FILES)
    if plain:
        return plain[0]
    if found:
        return next(iter(found.values()))[0] if len(found) == 1 and variant is None else None
    for suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        lone = [name for name in weight_files(names) if name.endswith(suffix)]
        if len(lone) == 1 and "adapter" not in lone[0] and shards(lone) is None:
            return lone[0]
    return None


def variants(names: Sequence[str]) -> dict[str, list[str]]:
    """Map each variant to its weight files and indices, in order of preference.

    Variants have a known name with one more part between dots: `model.fp16.safetensors`,
    `model.safetensors.index.fp16.json`.
    """
    found: dict[str, list[tuple[int, str]]] = {}
    for name in sorted(names):
        parts = name.split(".")
        for place in range(1, len(parts) - 1):
            rest = ".".join(parts[:place] + parts[place + 1 :])
            if rest in WEIGHT_FILES and VARIANT.fullmatch(parts[place]) and parts[place] not in NO_VARIANTS:
                found.setdefault(parts[place], []).append((WEIGHT_FILES.index(rest), name))
    return {variant: [name for _, name in sorted(files)] for variant, files in sorted(found.items())}


def weight_files(names: Sequence[str]) -> list[str]:
    """Return all files that, by their names, hold weights."""
    return [name for name in names if name.endswith(WEIGHT_SUFFIXES) and not NOT_WEIGHTS.fullmatch(name)]
