"""Reads one range of several models side by side; if their bits have one form, they are the rows of one matrix."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.pool import ALIGNMENT, Buffers


def read_models(
    tensors: Sequence[StoredTensor],
    ranges: Sequence[tuple[int, int]],
    reader: Reader,
    buffers: Buffers,
    key: object = "raw",
    on_read: Callable[[StoredTensor, np.ndarray], None] = lambda _tensor, _data: None,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Read elements [low, high) of each tensor, uint8, into one buffer of this thread under `key`, valid until it reads
    again.

    The second value holds all of them, one after another, if they have one dtype and length; otherwise None. One
    operation on all models takes a third of the time of one for each.
    """
    sizes = [(high - low) * tensor.item_bytes for tensor, (low, high) in zip(tensors, ranges, strict=True)]
    starts = [0, *accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes[:-1])]
    buffer = buffers.get(key, starts[-1] + sizes[-1])
    found = []
    for tensor, (low, high), start, size in zip(tensors, ranges, starts, sizes):
        found.append(reader.read(tensor, low, high, buffer[start : start + size]))
        on_read(tensor, found[-1])
    one_form = len({tensor.dtype for tensor in tensors}) == 1 and len(set(sizes)) == 1 and sizes[0] > 0
    one_form = one_form and sizes[0] % ALIGNMENT == 0
    return found, buffer[: starts[-1] + sizes[-1]] if one_form else None
