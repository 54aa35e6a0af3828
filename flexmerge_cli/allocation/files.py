"""Decides which part lies in which weight file, in what order, and the exact bytes of every header. Pure.

A part lies in the file of exactly the set of tasks that read it. In a file, parts with larger items come first, then by
name, so that every part is aligned; headers are padded to 8 bytes. A header names no plan and no version, so equal
parts make equal files; its mark tells `export --force` that a linked file is flexmerge's. Files with more than
SHARD_BYTES of data are split.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.storage import Part
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.errors import DataError

SHARD_BYTES = 5_000_000_000  # the size at which the Hub and transformers split files
MAX_STEM_BYTES = 100  # most file systems allow 255; an export or a partial file adds to it


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightFile:
    """One safetensors file of a bundle."""

    path: str
    """The path relative to the bundle."""
    readers: Tasks
    parts: tuple[Part, ...]
    """The parts in the order of their bytes."""
    header: bytes
    """The header with its length prefix."""

    @cached_property
    def num_bytes(self) -> int:
        return len(self.header) + sum(part.num_bytes for part in self.parts)

    def offsets(self) -> list[int]:
        """Return the position in the file of every part's first byte."""
        positions, position = [], len(self.header)
        for part in self.parts:
            positions.append(position)
            position += part.num_bytes
        return positions


def file_stem(readers: Tasks, task_names: Sequence[str]) -> str:
    """Return `all`, the names joined by +, or, where that is too long, their count and a hash of them."""
    if len(readers) == len(task_names):
        return "all"
    stem = "+".join(task_names[task] for task in readers)
    if len(stem.encode()) <= MAX_STEM_BYTES:
        return stem
    return f"{len(readers)}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"


def weight_files(readers: Tasks, parts: Sequence[Part], task_names: Sequence[str]) -> list[WeightFile]:
    """Make the file of one set of readers, or several if it exceeds SHARD_BYTES."""
    ordered = sorted(parts, key=lambda part: (-ITEM_BYTES[part.array.dtype], part.name))
    names = [part.name for part in ordered]
    if len(set(names)) < len(names) or "__metadata__" in names:
        twice = next((name for name in names if names.count(name) > 1), "__metadata__")
        raise DataError(f"two stored arrays would be called `{twice}`", hint="rename the tensor in the checkpoints")
    shards: list[list[Part]] = [[]]
    size = 0
    for part in ordered:
        if shards[-1] and size + part.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.num_bytes
    stem = file_stem(readers, task_names)
    return [
        WeightFile(
            path=f"weights/{stem}.safetensors"
            if len(shards) == 1
            else f"weights/{stem}-{number:05d}-of-{len(shards):05d}.safetensors",
            readers=readers,
            parts=tuple(shard),
            header=safetensors_header(
                {part.name: (part.array.dtype, part.array.shape, part.num_bytes) for part in shard},
                {"flexmerge": "bundle", "format": "pt"},
            ),
        )
        for number, shard in enumerate(shards, 1)
    ]


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Return the length prefix and JSON of a file that holds `tensors` (name -> dtype, shape, bytes), in this order."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
