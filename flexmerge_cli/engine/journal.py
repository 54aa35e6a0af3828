"""Records what a merge has finished, so that a merge that was killed continues where it was.

`.journal` lies in the folder that is being written. Its first line identifies the merge, and each further line names a
tensor whose parts are written, with their digests and measurements. Each line begins with the digest of its JSON.
Nothing is forced to disk: a part is reused only if its bytes have their digest, and lines count up to the first that is
damaged or incomplete.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.allocation.storage import Part

JOURNAL_NAME = ".journal"
FORMAT = "flexmerge.journal/1"
# A merge of fewer bytes takes seconds, and is repeated.
JOURNALED_BYTES = 64 << 20
MAX_JOURNAL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One tensor whose parts are written."""

    parts: tuple[str, ...]
    """The digest of each part, in the order of its storage."""
    digests: dict[int, str]
    """The digest of what a reader gets, by task."""
    errors: dict[int, float]
    """Σ (θ̂ - θ)², by task."""


@dataclass(slots=True)
class _PartHash:
    """The digest of a part that is written front to back."""

    hash: Any = field(default_factory=xxhash.xxh3_128)
    position: int = 0
    is_whole: bool = True


class Journal:
    """The journal of a folder; a context manager that holds it open. Only one thread may report to it."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read what an earlier run with this key finished. key: stands for everything that decides the bundle's
        bytes."""
        self._path, self._key, self._descriptor = folder / JOURNAL_NAME, key, -1
        self._hashes: dict[Part, _PartHash] = {}
        found = read_journal(folder, key)
        self.found, self._num_bytes = found if isinstance(found, tuple) else (dict[str, Finished](), 0)

    def __enter__(self) -> "Journal":
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        os.ftruncate(self._descriptor, self._num_bytes)
        if not self._num_bytes:
            self._write({"format": FORMAT, "key": self._key})
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)

    def hashed(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Record what was written to a part."""
        found = self._hashes.setdefault(part, _PartHash())
        found.is_whole &= start_byte == found.position
        found.hash.update(data.data)
        found.position += data.size

    def finished(
        self, tensor: str, parts: Sequence[Part], digests: Mapping[int, str], errors: Mapping[int, float]
    ) -> None:
        """Record that all parts of a tensor are written. A part that was not written front to back has no digest, so
        its tensor is not recorded."""
        found = [self._hashes.pop(part, _PartHash()) for part in parts]
        if all(one.is_whole and one.position == part.num_bytes for one, part in zip(found, parts)):
            of_parts = [one.hash.hexdigest() for one in found]
            self._write({"tensor": tensor, "parts": of_parts, "digests": dict(digests), "errors": dict(errors)})

    def _write(self, line: Mapping[str, Any]) -> None:
        data = sealed(line)
        while data:
            data = data[os.write(self._descriptor, data) :]


def sealed(line: Mapping[str, Any]) -> bytes:
    """Return a line of a journal: its digest, a space, and its JSON, which ends the line."""
    text = f"{json.dumps(line)}\n".encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text


def read_journal(folder: Path, key: str) -> tuple[dict[str, Finished], int] | str:
    """Return what was finished, and the length in bytes of the lines that say so; or why the journal is useless. Never
    raises."""
    path, found, num_bytes = folder / JOURNAL_NAME, dict[str, Finished](), 0
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JOURNAL_BYTES:
            return "its journal is not a merge's file"
        for data in path.read_bytes().splitlines(keepends=True):
            digest, _, text = data.partition(b" ")
            if digest != xxhash.xxh3_64_hexdigest(text).encode():
                break
            line = json.loads(text)
            if not num_bytes and line.get("format") != FORMAT:
                return "its journal is of another version"
            if not num_bytes and line["key"] != key:
                return "it was of another plan, request, device or version"
            if num_bytes:
                of_tasks = ({int(task): value for task, value in line[name].items()} for name in ("digests", "errors"))
                digests, errors = of_tasks
                found[line["tensor"]] = Finished(parts=tuple(line["parts"]), digests=digests, errors=errors)
            num_bytes += len(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # no merge wrote this
    return (found, num_bytes) if num_bytes else "its journal cannot be read"


def holds_journal(folder: Path) -> bool:
    """Return whether a folder is what a killed merge left, and can be continued."""
    with contextlib.suppress(OSError):
        return not folder.is_symlink() and (folder / JOURNAL_NAME).is_file()
    return False
