"""Reads the header of one safetensors file: names, dtypes, shapes and byte offsets. Reads no weights.

The `safetensors` package checks the same but maps the file and does not expose offsets, which positional reads into
reused buffers need. The rules are those of its format page: 8 bytes little-endian header size, JSON, then the data;
ranges start at 0, follow each other without hole or overlap, and end where the file ends.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.quantised import HINT, is_fp8
from flexmerge_cli.checkpoint.remote import RangeFile
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.regular_file import open_file
from flexmerge_cli.text import is_text

# A third of what the format allows, and enough for 200,000 tensors with long names. The header is read into memory
# before it is checked, and its values take up to 25 times its size there.
MAX_HEADER_BYTES = 32 << 20
MAX_AXES = 64  # more than any framework allows
MAX_ITEM_BYTES = max(ITEM_BYTES.values())
BAD_COPY = "get a sound copy of the file"


def read_header(path: Path, remote: RangeFile | None = None) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors by name, in file order of their bytes, and the file's `__metadata__`. Raises DataError.

    remote: the file, if it is not on this disk; `path` is then where it will lie.
    """
    with remote or open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 0 < header_bytes <= min(size - 8, MAX_HEADER_BYTES):
            file.seek(0)
            head = file.read(foreign.HEAD_BYTES)
            if found := foreign.ZIP if head.startswith(b"PK\3\4") else foreign.of_bytes(head):
                raise DataError(f"{path} is {found.what}", hint=found.hint)
        if len(prefix) < 8:
            raise DataError(f"{path} is truncated: {size} bytes, a safetensors file has at least 8", hint=BAD_COPY)
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise DataError(
                f"{path} is truncated or no safetensors file: its header claims {header_bytes:,} bytes, "
                f"the file has {size:,}",
                hint=BAD_COPY,
            )
        text = file.read(header_bytes)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{path}: `__metadata__` is not a map of strings", hint=BAD_COPY)
    data_start = 8 + header_bytes
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda found: (found[0].offset, found[1], found[0].name))
    _check_ranges(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor, _ in tensors}, metadata


def is_shape(shape: Sequence[int]) -> bool:
    """Return whether torch and numpy can have an array of this shape: they bound the product even beside an axis of
    0."""
    return len(shape) <= MAX_AXES and math.prod(filter(None, shape)) * MAX_ITEM_BYTES < 1 << 63


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            raise ValueError("a name occurs twice")
        return seen

    try:
        # Each tensor has an object and two lists, which take at least 50 bytes.
        entries = parse_json(text, bytes_per_list=12, on_object=unique)
    except ValueError as error:
        raise DataError(f"{path}: the header is not valid JSON ({error})", hint=BAD_COPY) from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: the header is not a JSON object", hint=BAD_COPY)
    return entries


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> tuple[StoredTensor, int]:
    """Return a tensor and the number of its bytes."""
    if not is_text(name):
        raise DataError(f"{path}: tensor {name!r} has a name that is not text, or holds a NUL", hint=BAD_COPY)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{path}: tensor `{name}` must have exactly dtype, shape and data_offsets", hint=BAD_COPY)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        if isinstance(dtype, str) and is_fp8(dtype):
            raise DataError(
                f"{path}: tensor `{name}` has dtype {dtype[:40]}, which cannot be merged: it is quantised", hint=HINT
            )
        raise DataError(
            f"{path}: tensor `{name}` has dtype {str(dtype)[:40]}, which cannot be merged",
            hint="save it as BF16, F16 or F32",
        )
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise DataError(f"{path}: tensor `{name}` has an invalid shape {str(shape)[:80]}", hint=BAD_COPY)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise DataError(f"{path}: tensor `{name}` has invalid data_offsets {str(offsets)[:80]}", hint=BAD_COPY)
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise DataError(
            f"{path}: tensor `{name}` is {dtype} {shape}, {num_bytes:,} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]:,}",
            hint=BAD_COPY,
        )
    if not is_shape(shape):
        raise DataError(f"{path}: tensor `{name}` has an invalid shape {str(shape)[:80]}", hint=BAD_COPY)
    tensor = StoredTensor(name=name, dtype=dtype, shape=tuple(shape), path=path, offset=data_start + offsets[0])
    return tensor, num_bytes


def _check_ranges(path: Path, tensors: list[tuple[StoredTensor, int]], data_start: int, size: int) -> None:
    position = data_start
    for tensor, num_bytes in tensors:
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise DataError(f"{path}: tensor `{tensor.name}` {what} (byte {tensor.offset - data_start})", hint=BAD_COPY)
        position += num_bytes
    if position != size:
        what = "truncated" if position > size else "longer than its header says"
        raise DataError(f"{path} is {what}: tensors end at byte {position:,}, the file at {size:,}", hint=BAD_COPY)
