"""Estimates how much anonymous memory a run needs beyond what Python and torch hold, and cuts the run to fit. Reads no
weights.

Each pass holds what its threads read into and compute with, what waits to be hashed or summed, and what is kept
meanwhile. This module counts it for `plan`, and merge_memory.py for `merge`.
"""

import ctypes
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from flexmerge_cli import native
from flexmerge_cli.checkpoint.change import TILE_ELEMENTS as PRODUCT_TILE
from flexmerge_cli.checkpoint.change import LowRankChange
from flexmerge_cli.checkpoint.digest import PIECE_BYTES
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.pool import AHEAD
from flexmerge_cli.engine.survey_item import (
    CHUNK_ELEMENTS,
    PRODUCT_ELEMENTS,
    TILE_ELEMENTS,
    SurveyItem,
    range_of,
    view_of,
)
from flexmerge_cli.errors import UsageError
from flexmerge_cli.residuals.coding_error import ROW_TASKS, sample_rows
from flexmerge_cli.residuals.row_errors import BLOCK_ELEMENTS as ROW_BLOCK
from flexmerge_cli.residuals.row_errors import FEWEST_COLUMNS

# Python objects, plan, headers, manifest, and what the allocator keeps, measured with some 200 tensors and 8 tasks.
FIXED_BYTES = 14 << 20
RECORD_BYTES = 3 << 10  # for each tensor of each model
SPAN_BYTES = 500  # for each work item
THREAD_BYTES = 1 << 20  # for a thread's stack and its part of the heap

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGE_BYTES = 64 << 10  # at 2 MiB, what a method gathers in pieces stayed in the heap, which tripled the total


def survey_bytes(
    items: Sequence[SurveyItem], threads: int, chunk_elements: int = CHUNK_ELEMENTS, *, signs: bool = False
) -> int:
    """Return the most memory that `plan` takes for these tensors, in bytes. signs: whether their agreement is
    counted."""
    found = Pass()
    records = spans = 0
    for item in items:
        models, k = [tensor for _, tensor in item.tasks] + ([item.base] if item.base else []), len(item.tasks)
        size = models[0].num_elements
        ranges = -(-size // range_of(item, chunk_elements))
        spans += ranges
        records += (k + 1) * RECORD_BYTES + (100 * k * k if item.gram else 0)
        count = chunk = min(size, range_of(item, chunk_elements))
        tile = min(chunk, TILE_ELEMENTS)
        grams = 8 * k * k * -(-count // PRODUCT_ELEMENTS)
        rows, columns = view_of(models[0].shape) if item.codes else (0, 0)
        some = min(rows, count // columns + 1) if columns else 0  # rows of one range
        sampled = min(some, len(sample_rows(item.name, (rows, columns))) * some // max(1, rows) + 1) if some else 0
        count = min(size, count + columns)
        work = max(reading_bytes(tensor, count) for tensor in models)
        turns = min(k, ROW_TASKS)
        is_plain = {tensor.dtype for tensor in models} == {"F32"}
        dtypes = {tensor.dtype for _, tensor in item.tasks}
        in_c = native.lib is not None and len(dtypes) == 1 and dtypes <= set(native.TYPES)
        if item.gram:
            comparing = 16 * k * min(count, PRODUCT_ELEMENTS) + 4 * tile + (0 if is_plain else 4 * k * tile)
            comparing += 6 * k * tile if signs else 0
            work = max(
                work,
                comparing,
                (400 if columns >= FEWEST_COLUMNS else 130) * some
                + (16 * turns + 20) * sampled * columns
                + 80 * min(count, PRODUCT_ELEMENTS) * (some > 0),
            )
        found.add(
            ranges,
            raw=sum(count * tensor.item_bytes + 64 for tensor in models),
            deltas=4 * k * tile if item.gram else 0,
            rows=4 * ((1 if in_c else k) + turns) * sampled * columns + (0 if is_plain or not some else 4 * count),
            codes=0 if native.lib is not None or not some else 16 * max(ROW_BLOCK, min(count, columns)),
            work=max(work, count),  # whether all is finite, an element a byte
            result=grams
            + 32 * some
            + (64 + 48 * turns) * sampled
            + sum(unjoined_bytes(t.item_bytes * chunk) for t in models),
            totals=grams * ranges
            + 400 * (k + 1) * ranges
            + sum(open_bytes(chunk * tensor.item_bytes, tensor.num_bytes) for tensor in models),
        )
    return FIXED_BYTES + records + threads * THREAD_BYTES + SPAN_BYTES * spans + found.bytes(threads)


def survey_chunk(items: Sequence[SurveyItem], threads: int, max_memory: int | None, *, signs: bool = False) -> int:
    """Return the float32 elements of one work item of `plan`. Raises UsageError if even the smallest does not fit."""
    return fitting(
        lambda chunk: survey_bytes(items, threads, chunk, signs=signs),
        CHUNK_ELEMENTS,
        PRODUCT_ELEMENTS,
        max_memory,
        threads,
    )


def unjoined_bytes(num_bytes: int) -> int:
    """Return the bytes of one model's range that its digest must carry because they are not whole pieces."""
    return min(num_bytes, 2 * PIECE_BYTES) if num_bytes % PIECE_BYTES else 0


def open_bytes(range_bytes: int, tensor_bytes: int) -> int:
    """Return the bytes that one model's digest keeps of an incomplete piece while ranges are joined."""
    return min(tensor_bytes, PIECE_BYTES * 9 // 8) if unjoined_bytes(range_bytes) else 0


def reading_bytes(tensor: StoredTensor, count: int) -> int:
    """Return the bytes that reading `count` elements takes beside the buffer, for what an adapter changes and for odd
    strides."""
    change = tensor.change
    if change is None:
        return tensor.item_bytes * count if tensor.strides is not None else 0
    floats = 0 if tensor.dtype in ("F32", "F64") else 4 * count
    if not isinstance(change, LowRankChange):
        return floats + 24 * count
    columns = math.prod(tensor.shape[1:])
    rows = min(tensor.shape[0], count // max(1, columns) + 2)
    return floats + 16 * change.rank * (rows + columns) + 24 * PRODUCT_TILE


def fitting(needed: Callable[[int], int], chunk: int, smallest: int, max_memory: int | None, threads: int) -> int:
    """Return the largest chunk, halved until it needs no more than max_memory. Raises UsageError if none fits."""
    if max_memory is not None:
        _give_back_what_is_freed()
    while max_memory is not None and needed(chunk) > max_memory:
        if chunk <= smallest:
            fewer = " or --threads 1" if threads > 1 else ""
            raise UsageError(
                f"--max-memory {max_memory} bytes is too little: {needed(chunk)} bytes are needed",
                hint=f"--max-memory {needed(chunk)}B{fewer}",
            )
        chunk //= 2
    return chunk


def _give_back_what_is_freed() -> None:
    """Make glibc return large arrays to the system from now on. Otherwise it keeps tens of megabytes per thread to save
    time.

    Its threshold rises to the size of what was freed, up to 32 MiB; setting it fixes it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries lack it
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


class Pass:
    """What one pass takes: the largest of its items, as many as can exist at once."""

    def __init__(self) -> None:
        self._held: dict[str, Counter[int]] = {}
        """For each kind of memory, the number of items by their size in bytes."""
        self._totals = 0

    def add(self, items: int, *, work: int, result: int, totals: int = 0, **buffers: int) -> None:
        """Add `items` items that take the same. All sizes are in bytes.

        work: while a thread computes. result: from when it is made to when the next one is asked for. totals:
        everything that is summed over the items. buffers: what a thread keeps from item to item, by purpose.
        """
        for name, size in {"work": work, "result": result, **buffers}.items():
            self._held.setdefault(name, Counter())[size] += items
        self._totals = max(self._totals, totals)

    def bytes(self, threads: int) -> int:
        """Return the bytes of the pass. A thread has one item at a time, and holds a large buffer only if it had a
        large item."""
        return sum(self.split(threads))

    def split(self, threads: int) -> tuple[int, int]:
        """Return the bytes of what a thread needs for an item and gives back, and of results."""
        waiting = _largest(self._held.get("result", Counter()), threads + AHEAD + 1)
        working = sum(_largest(sizes, threads) for name, sizes in self._held.items() if name != "result")
        return working, waiting + self._totals


def _largest(sizes: Counter[int], count: int) -> int:
    """Return the sum of the `count` largest sizes."""
    found = 0
    for size in sorted(sizes, reverse=True):
        taken = min(count, sizes[size])
        found, count = found + taken * size, count - taken
    return found
