"""Computes the digests of tensors and of files.

The xxh3 of a tensor or a file is the xxh3-128 over the xxh3-128s of its 1 MiB pieces. It finds changes, not forgery.

Pieces make it parallel: a worker digests the whole pieces of its byte range, and what is left at the two ends of the
range is joined with the neighbours' ends in order. So the digest does not depend on how a tensor was split for reading.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from flexmerge_cli.regular_file import open_file

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RangeDigest:
    """The contribution of one byte range to the digest of its tensor."""

    head: bytes
    """Bytes up to the first piece boundary inside the range; all of the range if it holds no boundary."""
    pieces: bytes
    """Concatenated 16-byte digests of the whole pieces."""
    tail: bytes
    """Bytes after the last boundary; none where the tensor ends."""


def digest_range(data: np.ndarray, start_byte: int, *, last: bool = False) -> RangeDigest:
    """Digest bytes [start_byte, start_byte + len(data)) of a tensor. data: uint8, contiguous. last: the tensor ends
    there."""
    if last and start_byte % PIECE_BYTES == 0 and 0 < data.size <= PIECE_BYTES:  # one piece, as small tensors are
        return RangeDigest(b"", xxhash.xxh3_128_digest(data.data), b"")
    head_bytes = min(-start_byte % PIECE_BYTES, data.size)
    whole = (data.size - head_bytes) // PIECE_BYTES
    edges = [head_bytes + index * PIECE_BYTES for index in range(whole + 1)]
    pieces = b"".join(xxhash.xxh3_128_digest(data[edge : edge + PIECE_BYTES].data) for edge in edges[:-1])
    tail = data[edges[-1] :]
    if last and tail.size:  # the tensor ends here, so this is a piece of its own
        pieces, tail = pieces + xxhash.xxh3_128_digest(tail.data), tail[:0]
    return RangeDigest(data[:head_bytes].tobytes(), pieces, tail.tobytes())


class TensorDigest:
    """Joins the `RangeDigest`s of one tensor, given in order."""

    def __init__(self) -> None:
        self._pieces = xxhash.xxh3_128()
        self._open = bytearray()

    def add(self, part: RangeDigest) -> None:
        self._open += part.head
        if len(self._open) == PIECE_BYTES:
            self._close()
        self._pieces.update(part.pieces)
        self._open += part.tail

    def _close(self) -> None:
        self._pieces.update(xxhash.xxh3_128_digest(bytes(self._open)))
        self._open.clear()

    def hexdigest(self) -> str:
        if self._open:
            self._close()
        return self._pieces.hexdigest()


class FileDigests(NamedTuple):
    """The digests of all bytes of a file, in hexadecimal digits.

    SHA-256 identifies a file, also where somebody forges. xxh3 finds damage: on one core nine times as fast, and on
    several together.
    """

    sha256: str
    xxh3: str


class FileHash:
    """Computes both digests of a file from its bytes in order."""

    def __init__(self) -> None:
        self._sha256, self._xxh3, self._position = hashlib.sha256(), TensorDigest(), 0

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._xxh3.add(digest_range(np.frombuffer(data, np.uint8), self._position))
        self._position += len(data)

    def digests(self) -> FileDigests:
        return FileDigests(self._sha256.hexdigest(), self._xxh3.hexdigest())


def file_digests(path: Path) -> FileDigests:
    """Return the digests of a file, read in pieces."""
    found = FileHash()
    with open_file(path) as file:
        while data := file.read(PIECE_BYTES):
            found.update(data)
    return found.digests()


def digest_bytes(data: np.ndarray | bytes) -> str:
    """Return the digest of all bytes of a tensor or a file."""
    whole = TensorDigest()
    whole.add(digest_range(np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data, 0, last=True))
    return whole.hexdigest()


def digest_file(path: Path) -> str:
    """Return the digest of a file, read in pieces."""
    whole, position = TensorDigest(), 0
    with open_file(path) as file:
        while data := file.read(PIECE_BYTES):
            whole.add(digest_range(np.frombuffer(data, np.uint8), position))
            position += len(data)
    return whole.hexdigest()
