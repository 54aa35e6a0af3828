"""Streams weights: turns the engine's small reads, in order, into few large requests, in bounded memory.

A file is cut into pieces of about one request: a large tensor has pieces of its own, and small neighbours share one. A
piece stays in memory until others need its space, so that each is fetched once if files are read front to back. Pieces
that will be read soon are prefetched. Independent of the server (remote.py).
"""

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from flexmerge_cli.checkpoint.remote import RemoteFile

MAX_BYTES = 512 << 20
MAX_REQUEST_BYTES = 8 << 20  # larger requests to the Hub are no faster, and a broken one costs more
MIN_REQUEST_BYTES = 1 << 18
PIECES_PER_MODEL = 4  # being read by the threads, to be read next, and in transit
REQUESTS_AT_ONCE = 16


class StreamPool:
    """The pieces of remote files that are in memory, at most max_bytes in all. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.most_bytes = 0
        """The most bytes held at one time."""
        self._models = 0
        self._held: OrderedDict[tuple[StreamedFile, int], Future[bytes]] = OrderedDict()
        self._readers: Counter[tuple[StreamedFile, int]] = Counter()
        """The number of readers of each piece; a piece that is being read is not dropped."""
        self._bytes, self._lock = 0, threading.Condition()
        self._threads = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="flexmerge-stream")

    def __reduce__(self) -> tuple[type["StreamPool"], tuple[int]]:
        """Become an empty pool of the same size in another process."""
        return StreamPool, (self.max_bytes,)

    @staticmethod
    def within(max_memory: int | None) -> "StreamPool":
        """Return a pool with a third of --max-memory; the rest is the engine's."""
        return StreamPool(MAX_BYTES if max_memory is None else min(MAX_BYTES, max_memory // 3))

    def add(self, files: Iterable["StreamedFile"]) -> None:
        """Register one more model that is read at the same time as the others."""
        with self._lock:
            self._models += 1
        for file in files:
            file.pool = self

    @property
    def request_bytes(self) -> int:
        """The size of one request in bytes, chosen so that every model has its pieces."""
        share = self.max_bytes // (PIECES_PER_MODEL * max(1, self._models))
        return max(MIN_REQUEST_BYTES, min(MAX_REQUEST_BYTES, share))

    @contextmanager
    def piece(self, file: "StreamedFile", piece: int) -> Iterator[bytes]:
        """Give the bytes of a piece, once there is room. A thread that holds one must ask for no other. Raises
        SourceError."""
        key = (file, piece)
        with self._lock:
            while key not in self._held and not self._make_room(file.piece_bytes(piece)) and self._held:
                self._lock.wait()  # for a piece in transit, or one that is being read
            found = self._submit(file, piece)
            self._readers[key] += 1
        try:
            yield found.result()
        finally:
            with self._lock:
                self._readers[key] -= 1
                self._lock.notify_all()

    def will_need(self, file: "StreamedFile", piece: int) -> None:
        """Prefetch a piece if there is room for it."""
        with self._lock:
            if (file, piece) not in self._held and self._make_room(file.piece_bytes(piece)):
                self._submit(file, piece)

    def _submit(self, file: "StreamedFile", piece: int) -> "Future[bytes]":
        key = (file, piece)
        found = self._held.get(key)
        if found is not None and not (found.done() and found.exception() is not None):
            self._held.move_to_end(key)
            return found
        if found is None:
            self._bytes += file.piece_bytes(piece)
            self.most_bytes = max(self.most_bytes, self._bytes)
        self._held[key] = self._threads.submit(file.fetch, piece)
        self._held[key].add_done_callback(self._arrived)
        return self._held[key]

    def _arrived(self, _found: "Future[bytes]") -> None:
        with self._lock:
            self._lock.notify_all()

    def _make_room(self, num_bytes: int) -> bool:
        """Drop the least recently used pieces, none in transit or being read. Returns whether num_bytes fit."""
        for key in [key for key, found in self._held.items() if found.done() and not self._readers[key]]:
            if self._bytes + num_bytes <= self.max_bytes:
                break
            del self._held[key], self._readers[key]
            self._bytes -= key[0].piece_bytes(key[1])
        return self._bytes + num_bytes <= self.max_bytes


class StreamedFile:
    """A remote file of weights, in pieces."""

    def __init__(self, remote: RemoteFile, extents: Iterable[tuple[int, int]]) -> None:
        """Take a remote file. extents: [start, stop) of its tensors."""
        self.remote = remote
        self.pool: StreamPool | None = None
        self._extents = sorted(set(extents))
        self._bounds: list[int] | None = None
        self._lock = threading.Lock()

    def read_into(self, start: int, stop: int, view: memoryview) -> None:
        """Read bytes [start, stop), which lie in tensors. Raises SourceError."""
        assert self.pool is not None
        first, last = self._pieces(start, stop)
        for piece in range(first + 1, last + 1):
            self.pool.will_need(self, piece)  # those that fit arrive at the same time
        for piece in range(first, last + 1):
            with self.pool.piece(self, piece) as data:
                low = self.bounds[piece]
                begin, end = max(start, low), min(stop, low + len(data))
                view[begin - start : end - start] = data[begin - low : end - low]

    def will_need(self, start: int, stop: int) -> None:
        assert self.pool is not None
        if start < stop:
            first, last = self._pieces(start, stop)
            for piece in range(first, last + 1):
                self.pool.will_need(self, piece)

    @property
    def bounds(self) -> list[int]:
        """The first byte of each piece, and the end of the last."""
        with self._lock:
            if self._bounds is None:
                assert self.pool is not None
                self._bounds = cut(self._extents, self.pool.request_bytes)
            return self._bounds

    def piece_bytes(self, piece: int) -> int:
        return self.bounds[piece + 1] - self.bounds[piece]

    def fetch(self, piece: int) -> bytes:
        return self.remote.read_range(self.bounds[piece], self.bounds[piece + 1])

    def _pieces(self, start: int, stop: int) -> tuple[int, int]:
        return bisect_right(self.bounds, start) - 1, bisect_right(self.bounds, stop - 1) - 1


def cut(extents: Iterable[tuple[int, int]], request_bytes: int) -> list[int]:
    """Return the bounds of pieces of at most request_bytes. No piece ends in a small tensor; a large one has pieces of
    its own.

    extents: [start, stop) of tensors, sorted by start; they may share bytes, and have gaps, which belong to the piece
    before them.
    """
    bounds: list[int] = []
    end, is_whole = 0, True
    for start, stop in extents:
        if stop <= end or start == stop:
            continue  # shares the storage of an earlier tensor
        start = max(start, end)
        if is_whole or stop - start > request_bytes or stop - bounds[-1] > request_bytes:
            count = -(-(stop - start) // request_bytes)
            bounds += range(start, stop, -(-(stop - start) // count))
            is_whole = count > 1
        end = stop
    return [*bounds, end] if bounds else [0, 0]
