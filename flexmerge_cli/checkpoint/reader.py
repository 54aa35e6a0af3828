"""Reads ranges of tensors by position into the caller's buffers. Thread-safe; keeps the files open.

Streamed tensors are read over the network (stream.py) into the same buffers.
"""

import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np

from flexmerge_cli.checkpoint.change import LowRankChange, add_product, multiply
from flexmerge_cli.checkpoint.dtypes import NUMPY, from_float32, to_float32
from flexmerge_cli.checkpoint.open_files import open_one_more
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, SourceError, hint_of, machine_failure
from flexmerge_cli.regular_file import open_descriptor, open_file

AHEAD_BYTES = 4 << 20  # bytes per call of fadvise
NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # read only what is in the page cache
MAX_ADVICES = 8  # per range of picked rows, which may consist of thousands of runs


def strided(tensor: StoredTensor, mapped: np.ndarray) -> np.ndarray:
    """Return a view of a tensor's bits (`NUMPY[dtype]`), in its shape, in its mapped file (uint8). Copies nothing.

    Raises DataError unless all of it is within the file: numpy checks what `as_strided` would not.
    """
    steps = None if tensor.strides is None else [stride * tensor.item_bytes for stride in tensor.strides]
    try:
        return np.ndarray(tensor.shape, NUMPY[tensor.dtype], mapped, tensor.offset, steps)
    except (ValueError, TypeError, OverflowError):
        raise DataError(
            f"{tensor.path} ends at byte {mapped.size:,}, within or before tensor `{tensor.name}`",
            hint="the file was changed or truncated meanwhile: get a sound copy",
        ) from None


class Reader:
    """Reads the files of one or more checkpoints, which it keeps open; a context manager.

    opened: returns the descriptor of a file, and keeps it; by default the reader opens files itself, and closes them.
    """

    def __init__(self, opened: Callable[[Path], int] | None = None) -> None:
        self._opened = opened
        self._files: dict[Path, int] = {}
        self._advised: dict[Path, tuple[int, int]] = {}
        """The byte range of each file for which the kernel was last advised."""
        self._cold: set[Path] = set()
        """Files for which the kernel is advised about the next reads. Advice costs time per page, so not for cached
        files."""
        self._lock = threading.Lock()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, tensor: StoredTensor, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Read elements [start, stop) in C order into `buffer` (uint8, large enough). Returns the part that was
        filled."""
        if tensor.change is not None:
            return self._changed(tensor, start, stop, buffer)
        filled = buffer[: (stop - start) * tensor.item_bytes]
        if tensor.fill is not None:
            one = from_float32(np.full(1, tensor.fill, np.float32), tensor.dtype)
            filled.view(NUMPY[tensor.dtype])[:] = one[0]
            return filled
        if tensor.pieces:
            done = 0
            for piece, low, high in tensor.pieces_of(start, stop):
                done += self.read(piece, low, high, filled[done:]).size
            return filled
        if tensor.selection is not None:
            done = 0
            for low, high in tensor.selection.ranges(start, stop):
                done += self.read(tensor.selection.of, low, high, filled[done:]).size
            return filled
        if tensor.strides is not None:
            if self._opened is not None and len(
                filled
            ):  # a matrix of an adapter: small, and it must be read from the file that is already open
                num_elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
                plain = replace(tensor, shape=(num_elements,), strides=None)
                whole = self.read(plain, 0, num_elements, np.empty(plain.num_bytes, np.uint8))
                filled.view(NUMPY[tensor.dtype])[:] = strided(replace(tensor, offset=0), whole).flat[start:stop]
                return filled
            # Only a .bin can hold a tensor that is not row-major; the map reads the pages of this range alone.
            with open_file(tensor.path) as file:
                mapped = np.memmap(file, np.uint8, mode="r")
            filled.view(NUMPY[tensor.dtype])[:] = strided(tensor, mapped).flat[start:stop]
            return filled
        if tensor.stream is not None:
            first = tensor.offset + start * tensor.item_bytes
            tensor.stream.read_into(first, first + len(filled), filled.data)
            return filled
        descriptor = self._open(tensor.path)
        view, position = filled.data, tensor.offset + start * tensor.item_bytes
        while len(view):
            count = self._pread(tensor.path, descriptor, view, position)
            if count == 0:
                raise DataError(
                    f"{tensor.path} ended at byte {position:,} while tensor `{tensor.name}` was read",
                    hint="the file was changed or truncated meanwhile: get a sound copy",
                )
            view, position = view[count:], position + count
        return filled

    def _pread(self, path: Path, descriptor: int, view: memoryview, position: int) -> int:
        """Read once. Notes when a file's bytes are not in the kernel's cache."""
        if path not in self._cold:
            try:
                count = os.preadv(descriptor, [view], position, NOWAIT)
            except OSError:  # EAGAIN, or a file system that does not support this
                count = 0
            if count == len(view):
                return count
            self._cold.add(path)
            if count:
                return count
        return os.preadv(descriptor, [view], position)

    def _changed(self, tensor: StoredTensor, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Read a range of the base and apply the adapter: float32, rounded once. Also needs memory for the factors."""
        filled = self.read(replace(tensor, change=None), start, stop, buffer)
        change, bits = tensor.change, filled.view(NUMPY[tensor.dtype])
        values = bits if tensor.dtype == "F64" else to_float32(bits, tensor.dtype)
        columns = math.prod(tensor.shape[1:])
        if not len(values):
            return filled
        if isinstance(change, LowRankChange):
            left = self._floats(change.left, start // columns, -(-stop // columns))
            right = self._floats(change.right, 0, change.right.shape[0])
            add_product(values, start, columns, left.astype(np.float64), right.astype(np.float64), change.scale)
        elif change is not None:
            multiply(values, start, columns, self._floats(change.vector, 0, 1)[0], change.axis)
        if values is not bits:
            bits[:] = from_float32(values, tensor.dtype)
        return filled

    def _floats(self, factor: StoredTensor, first: int, stop: int) -> np.ndarray:
        """Read rows [first, stop) of a matrix, as float32."""
        width = factor.shape[1]
        if factor.strides is not None and factor.stream is not None:  # a transposed factor is read whole
            plain = replace(factor, shape=factor.shape[::-1], strides=None)
            return np.ascontiguousarray(self._floats(plain, 0, width).T[first:stop])
        buffer = np.empty((stop - first) * width * factor.item_bytes, np.uint8)
        bits = self.read(factor, first * width, stop * width, buffer).view(NUMPY[factor.dtype])
        return to_float32(bits, factor.dtype).reshape(stop - first, width)

    def will_need(self, tensor: StoredTensor, start: int, stop: int) -> None:
        """Advise the kernel that these elements will be read soon, so that the disk or network works during
        computation."""
        if tensor.fill is not None or (
            tensor.path not in self._cold and tensor.is_contiguous and tensor.stream is None
        ):
            return
        if tensor.pieces:
            for piece, low, high in islice(tensor.pieces_of(start, stop), MAX_ADVICES):
                self.will_need(piece, low, high)
            return
        if tensor.selection is not None:
            for low, high in islice(tensor.selection.ranges(start, stop), MAX_ADVICES):
                self.will_need(tensor.selection.of, low, high)
            return
        low, high = tensor.offset + start * tensor.item_bytes, tensor.offset + stop * tensor.item_bytes
        if tensor.stream is not None:
            tensor.stream.will_need(low, high)
            return
        if tensor.strides is not None or tensor.path not in self._cold or not hasattr(os, "posix_fadvise"):
            return
        advised = self._advised.get(tensor.path, (0, 0))
        if not (advised[0] <= low and high <= advised[1]):
            high = max(high, low + AHEAD_BYTES)
            self._advised[tensor.path] = (low, high)  # two threads may advise twice, which does no harm
            os.posix_fadvise(self._open(tensor.path), low, high - low, os.POSIX_FADV_WILLNEED)

    def _open(self, path: Path) -> int:
        if self._opened is not None:
            return self._opened(path)
        descriptor = self._files.get(path)
        if descriptor is None:
            with self._lock:
                descriptor = self._files.get(path)
                if descriptor is None:
                    try:
                        descriptor = open_one_more(open_descriptor, path)
                    except OSError as error:
                        missing = SourceError(f"{path} cannot be read: {error.strerror}", hint=hint_of(error))
                        raise machine_failure(error) or missing from None
                    self._files[path] = descriptor
        return descriptor
