"""Writes a task's model as an ordinary checkpoint folder for tools that read one; removed at the end of the block."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexmerge_cli.allocation.files import safetensors_header
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.dtypes import FROM_TORCH, ITEM_BYTES
from flexmerge_cli.evaluation.scored import TaskModel


@contextmanager
def materialised(model: TaskModel) -> Iterator[Path]:
    """Give a folder with the side files and model.safetensors, written one tensor at a time."""
    import torch

    with tempfile.TemporaryDirectory(prefix="flexmerge-") as name:
        folder = Path(name) / model.task
        folder.mkdir()
        for path in sorted(model.folder.iterdir()):
            if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        forms = {}
        for own, tensor in model.weights.items():
            dtype = FROM_TORCH[str(tensor.dtype).removeprefix("torch.")]
            forms[own] = (dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())
        names = sorted(forms, key=lambda own: (-ITEM_BYTES[forms[own][0]], own))
        with (folder / "model.safetensors").open("xb") as file:
            file.write(safetensors_header({own: forms[own] for own in names}, {"format": "pt"}))
            for own in names:
                file.write(model.weights[own].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        yield folder
