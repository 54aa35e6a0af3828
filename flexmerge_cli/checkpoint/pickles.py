"""Header of one `.bin` or `.pt` file that `torch.save` wrote: names, dtypes, shapes and where the bytes lie.

Weights-only unpickling, under fake tensors: no code of the file runs, and no weight is read. What comes out are offsets
into the file, so that the engine reads these files as it reads safetensors.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.dtypes import FROM_TORCH
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which frameworks keep the weights


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name, in file order of their bytes. Raises DataError."""
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is truncated, or saved by torch older than 1.6: it cannot be memory-mapped",
            hint="get a sound copy, or convert it: torch.save(torch.load(path, weights_only=True), path)",
        )
    state = _unwrap(path, _load(path))
    size = path.stat().st_size
    tensors = [_locate(path, name, tensor, size) for name, tensor in state.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes, tensor.name))
    return {tensor.name: tensor for tensor in tensors}


def _load(path: Path) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a pickle of weights"
        raise DataError(
            f"{path} is more than weights, and loading it would run code of the file: {reason[:200]}",
            hint="convert it to safetensors where it is trusted",
        ) from None
    except Exception as error:  # whatever a damaged or hostile archive raises inside torch
        raise DataError(
            f"{path} cannot be read as a torch checkpoint: {type(error).__name__}: {str(error)[:200]}",
            hint="get a sound copy of the file",
        ) from None


def _unwrap(path: Path, loaded: Any) -> Mapping[str, Any]:
    """The state dict, which frameworks wrap in a dict of their own and prefix with `module.`."""
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    names = list(loaded) if isinstance(loaded, Mapping) else []
    if not names or not all(isinstance(name, str) and _is_tensor(loaded[name]) for name in names):
        raise DataError(
            f"{path} holds no state dict (a map of names to tensors)",
            hint=f"save `model.state_dict()` alone, or under one of {', '.join(WRAPPERS)}",
        )
    if all(name.startswith("module.") for name in names):
        return {name.removeprefix("module."): loaded[name] for name in names}
    return loaded


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _locate(path: Path, name: str, tensor: Any, size: int) -> StoredTensor:
    dtype = FROM_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout is not _strided():
        raise DataError(
            f"{path}: tensor `{name}` has dtype {tensor.dtype}, layout {tensor.layout}, which cannot be merged",
            hint="dequantise the checkpoint to bfloat16, float16 or float32 first",
        )
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise DataError(f"{path}: tensor `{name}` has no bytes in the file", hint="get a sound copy of the file")
    located = StoredTensor(
        name=name,
        dtype=dtype,
        shape=tuple(tensor.shape),
        path=path,
        offset=start + tensor.storage_offset() * tensor.element_size(),
        strides=None if tensor.is_contiguous() else tuple(tensor.stride()),
    )
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    if located.offset + reach * located.item_bytes > size:
        raise DataError(
            f"{path} is truncated: tensor `{name}` ends after the file", hint="get a sound copy of the file"
        )
    return located


def _strided() -> Any:
    import torch

    return torch.strided
