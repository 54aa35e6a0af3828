"""Handles the parts of a model: the subfolders of a source that hold weights of their own. From names alone; no I/O.

A tensor of a part is named by the part's folder, a slash, and its name in the file there: `2_Dense/linear.weight`.
"""

from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from flexmerge_cli.checkpoint.choose import variants
from flexmerge_cli.checkpoint.contents import MAX_DEPTH, is_portable


def part_of(name: str, parts: Collection[str]) -> tuple[str, str]:
    """Return the folder of a tensor (``""`` for the model itself), and its name in the file there."""
    folder, cut = "", name.find("/")
    for _ in range(MAX_DEPTH):
        if cut < 0:
            break
        folder = name[:cut] if name[:cut] in parts else folder
        cut = name.find("/", cut + 1)
    return folder, name.removeprefix(f"{folder}/") if folder else name


def stem_of(weights: str) -> str:
    """Return the beginning of the names under which the library that wrote a weight file or index looks for
    safetensors."""
    last = PurePosixPath(weights).name
    for variant in variants([last]):
        last = last.replace(f".{variant}", "", 1)
    stem = last.partition(".")[0] if last.endswith(".json") else last.rpartition(".")[0]
    return {"pytorch_model": "model", "open_clip_pytorch_model": "open_clip_model"}.get(stem, stem)


def are_parts(parts: Mapping[str, str]) -> bool:
    """Return whether folders and stems stay inside a folder on every file system; they may come from a hostile file."""
    return all(is_portable(f"{folder}/{stem}") and "/" not in stem for folder, stem in parts.items())
