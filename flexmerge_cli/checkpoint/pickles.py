"""Header of one `.bin` or `.pt` file that `torch.save` wrote: names, dtypes, shapes and where the bytes lie.

Weights-only unpickling, under fake tensors: no code of the file runs, and no weight is read. What comes out are offsets
into the file, so that the engine reads these files as it reads safetensors.
"""

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.dtypes import FROM_TORCH
from flexmerge_cli.checkpoint.quantised import HINT, is_fp8
from flexmerge_cli.checkpoint.remote import RangeFile
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.text import is_text

CONVERT = "convert it: torch.save(torch.load(path, weights_only=True), path)"
LOCAL_HEADER_BYTES = 30  # of a record, before its name
MAX_WRAPPERS = 3  # {"model": {"state_dict": …}}
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which frameworks keep the weights


def read_pickle(path: Path, remote: RangeFile | None = None) -> dict[str, StoredTensor]:
    """Tensors by name, in file order of their bytes. Raises DataError.

    remote: the file, where it is not on this disk; `path` is then where it will lie.
    """
    with remote or path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise DataError(
                f"{path} is truncated, or saved by torch older than 1.6: it cannot be memory-mapped",
                hint=f"get a sound copy, or {CONVERT}",
            )
        records = _records(path, file)
        file.seek(0)
        state = _unwrap(path, _load(path, file if remote is not None else path))
    tensors = [_locate(path, name, tensor, records) for name, tensor in state.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes, tensor.name))
    return {tensor.name: tensor for tensor in tensors}


def _records(path: Path, file: Any) -> dict[int, int]:
    """First byte -> bytes of every record of the archive.

    torch stores them as they are, in the machine's byte order. What another tool has compressed, torch.load reads too,
    but its weights cannot be read where they lie.
    """
    records = {}
    try:
        with zipfile.ZipFile(file) as archive:
            if isinstance(file, RangeFile):
                heads = [record.header_offset for record in archive.infolist()]
                file.prefetch((start, start + LOCAL_HEADER_BYTES) for start in heads)
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise DataError(f"{path} is compressed: it cannot be memory-mapped", hint=CONVERT)
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise DataError(f"{path} was saved on a big-endian machine", hint=CONVERT)
                file.seek(record.header_offset)
                name_bytes, extra_bytes = struct.unpack("<26x2H", file.read(LOCAL_HEADER_BYTES))
                records[record.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes] = record.file_size
    except (zipfile.BadZipFile, struct.error, ValueError, RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged: {str(error)[:200]}", hint="get a sound copy of the file") from None
    return records


def _load(path: Path, file: Any) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of odd pickles is for those who write them
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a pickle of weights"
        raise DataError(
            f"{path} is more than weights, and loading it would run code of the file: {reason[:200]}",
            hint="convert it to safetensors where it is trusted",
        ) from None
    except SourceError:
        raise
    except Exception as error:  # whatever a damaged or hostile archive raises inside torch
        raise DataError(
            f"{path} cannot be read as a torch checkpoint: {type(error).__name__}: {str(error)[:200]}",
            hint="get a sound copy of the file",
        ) from None


def _unwrap(path: Path, loaded: Any) -> Mapping[str, Any]:
    """The state dict, which frameworks wrap in a dict of their own and prefix with `module.`."""
    for _ in range(MAX_WRAPPERS):
        keys = [key for key in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)]
        if not keys:
            break
        loaded = loaded[keys[0]]
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


def _locate(path: Path, name: str, tensor: Any, records: Mapping[int, int]) -> StoredTensor:
    if not is_text(name):
        raise DataError(f"{path}: tensor {name!r} has a name that is not text, or holds a NUL", hint="rename it")
    if is_fp8(str(tensor.dtype)):
        raise DataError(
            f"{path}: tensor `{name}` has dtype {tensor.dtype}, which cannot be merged: it is quantised", hint=HINT
        )
    dtype = FROM_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout is not _strided():
        raise DataError(
            f"{path}: tensor `{name}` has dtype {tensor.dtype}, layout {tensor.layout}, which cannot be merged",
            hint="dequantise the checkpoint to bfloat16, float16 or float32 first",
        )
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or start not in records:
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
    if located.offset + reach * located.item_bytes > start + records[start]:
        raise DataError(
            f"{path} is truncated: tensor `{name}` ends after its record", hint="get a sound copy of the file"
        )
    if located.num_bytes > max(located.item_bytes, records[start]):
        # An expanded tensor: a few bytes of file can claim more than any disk holds.
        raise DataError(
            f"{path}: tensor `{name}` {list(located.shape)} repeats what is stored once",
            hint="save it as `tensor.contiguous()`",
        )
    return located


def _strided() -> Any:
    import torch

    return torch.strided
