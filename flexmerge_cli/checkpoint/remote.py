"""Reads a file that is not on this disk by ranges: exactly the bytes requested, and none twice.

Used for headers. Independent of the server (place.py, urls.py) and of the format of the file.
"""

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

REQUESTS_AT_ONCE = 8
# Ranges closer than this share a request: the gap is smaller than the headers of a request.
MAX_GAP_BYTES = 1 << 9


class RemoteFile(Protocol):
    """A file that is not on this disk."""

    @property
    def path(self) -> Path:
        """The local path that it has once it is downloaded."""

    @property
    def name(self) -> str:
        """Its path or address, for messages."""

    @property
    def size(self) -> int: ...

    def read_range(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop). Thread-safe. Raises SourceError."""


class RangeFile(io.RawIOBase):
    """A remote file as a seekable file object. Caches what was read."""

    def __init__(self, remote: RemoteFile) -> None:
        super().__init__()
        self._remote, self._position = remote, 0
        self._kept: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._remote.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek before the start of {self._remote.path}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._position, min(self._position + len(view), self._remote.size)
        if stop <= start:
            return 0
        data = self._have(start, stop)
        if data is None:
            data = self._remote.read_range(start, stop)
            self._kept.append((start, data))
        view[: len(data)] = data
        self._position = stop
        return len(data)

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Read many small ranges [start, stop) at once; neighbours share a request."""
        wanted = coalesce([(a, min(b, self._remote.size)) for a, b in ranges if self._have(a, b) is None])
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = list(pool.map(lambda pair: self._remote.read_range(*pair), wanted))
        self._kept += [(start, data) for (start, _), data in zip(wanted, found)]

    def _have(self, start: int, stop: int) -> bytes | None:
        for low, data in self._kept:
            if low <= start and stop <= low + len(data):
                return data[start - low : stop - low]
        return None


def coalesce(ranges: Iterable[tuple[int, int]], max_gap_bytes: int = MAX_GAP_BYTES) -> list[tuple[int, int]]:
    """Return the fewest ranges that cover all of these, in order, bridging gaps of at most max_gap_bytes."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in ranges if pair[0] < pair[1]):
        if merged and start <= merged[-1][1] + max_gap_bytes:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
