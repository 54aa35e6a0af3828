"""Writes one task's file of a calibration array by array, so that none waits for another, and its header last.

Space is reserved for a header of all arrays that may come; what remains of it is filled with spaces, as safetensors
allows.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np


class ArrayFile:
    """A safetensors file of float32 arrays, open for writing. A context manager that completes the file on exit."""

    def __init__(self, path: Path, names: Iterable[tuple[str, int]]) -> None:
        """Reserve space for the header. names: all arrays that may be written, with their numbers of elements."""
        self.path = path
        largest = list(names)
        end = 4 * sum(count for _, count in largest)
        self._room = len(_header({name: (count, end, end) for name, count in largest})) + 8
        self._room += -self._room % 8
        self._entries: dict[str, tuple[int, int, int]] = {}
        self._end = 0
        self._file = path.open("xb")
        self._file.seek(8 + self._room)

    def add(self, name: str, array: np.ndarray) -> None:
        """Append an array, float32, flat."""
        data = np.ascontiguousarray(array, "<f4")
        self._file.write(data.data)
        self._entries[name] = data.size, self._end, self._end + data.nbytes
        self._end += data.nbytes

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + _header(self._entries).ljust(self._room))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the closed file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _header(entries: dict[str, tuple[int, int, int]]) -> bytes:
    fields = {
        name: {"dtype": "F32", "shape": [count], "data_offsets": [start, stop]}
        for name, (count, start, stop) in entries.items()
    }
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
