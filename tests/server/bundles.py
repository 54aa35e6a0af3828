"""Bundles of tiny models with tokenizers, of every kind that is served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flexmerge_cli import make_plan, merge

from ..evaluation import tiny


def _moved(base: Path, folder: Path, seed: int) -> Path:
    """A copy of a checkpoint whose weights lie a little elsewhere."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(folder / "model.safetensors")
    state = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _bundle(root: Path, base: Path, made: dict[str, Path], **options: Any) -> Path:
    tasks = {name: _moved(path, root / "tasks" / name, seed) for seed, (name, path) in enumerate(made.items(), 1)}
    make_plan(base, tasks, output=root / "plan.json")
    merge(root / "plan.json", root / "bundle", **(options or {"method": "average", "size": "1.5x"}))
    return root / "bundle"


def texts(root: Path) -> Path:
    heads = {"two": tiny.bert(root / "2", 2), "three": tiny.bert(root / "3", 3), "grade": tiny.bert(root / "1", 1)}
    return _bundle(root, heads["two"], heads)


def images(root: Path) -> Path:
    base = tiny.vit(root / "base")
    return _bundle(root, base, {"cats": base, "dogs": base})


def t5(root: Path) -> Path:
    base = tiny.t5(root / "base")
    return _bundle(root, base, {"sums": base, "words": base})


MADE: dict[str, Callable[[Path], Path]] = {"texts": texts, "images": images, "t5": t5}
