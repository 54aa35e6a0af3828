"""How much anonymous memory a run needs beyond what Python and torch hold, and how it is cut to fit."""

from flexmerge_cli.engine.survey import CHUNK_ELEMENTS as SURVEY_CHUNK
from flexmerge_cli.engine.survey import PRODUCT_ELEMENTS, TILE_ELEMENTS
from flexmerge_cli.errors import UsageError
from flexmerge_cli.residuals.row_errors import BLOCK_ELEMENTS as ROW_BLOCK

FIXED_BYTES = 48 << 20  # interpreter objects, plan, headers: measured on 200 tensors and 8 tasks, with room
WIDEST_ITEM = 8


def survey_bytes(
    num_tasks: int, threads: int, chunk_elements: int, item_bytes: int = 4, row_elements: int | None = None
) -> int:
    """Raw chunks of base and tasks, and one tile's deltas, base and float64 sums, per thread.

    row_elements: of the longest row that is coded for `auto`; None: nothing is.
    """
    raw = (num_tasks + 1) * (chunk_elements + (row_elements or 0)) * item_bytes
    deltas = (num_tasks + 4) * min(chunk_elements, TILE_ELEMENTS) * 4
    # The average, a base in float32, and what row_errors.py holds; sampled rows are far fewer.
    codes = 0 if row_elements is None else (3 * (chunk_elements + row_elements) + 4 * ROW_BLOCK) * 4
    return FIXED_BYTES + threads * (raw + deltas + codes)


def survey_chunk(num_tasks: int, threads: int, max_memory: int | None, row_elements: int | None = None) -> int:
    """Elements of one work item of `plan`. Raises UsageError if even the smallest does not fit."""
    chunk = SURVEY_CHUNK
    while max_memory is not None and survey_bytes(num_tasks, threads, chunk, 4, row_elements) > max_memory:
        if chunk == PRODUCT_ELEMENTS:
            raise too_little(max_memory, survey_bytes(num_tasks, threads, chunk, 4, row_elements), threads)
        chunk //= 2
    return chunk


def materialise_bytes(
    num_tasks: int, threads: int, chunk_elements: int, item_bytes: int = 4, whole_elements: int = 0
) -> int:
    """Per thread: raw chunks, deltas, float64 sums, and what waits to be hashed.

    whole_elements: of the largest tensor or block that a method must see at once.
    """
    chunk_elements = max(chunk_elements, whole_elements)
    raw = (num_tasks + 1) * chunk_elements * item_bytes
    work = (3 * num_tasks + 8) * chunk_elements * 4
    waiting = (num_tasks + 1) * chunk_elements * item_bytes
    return FIXED_BYTES + threads * (raw + work) + (threads + 1) * waiting


def materialise_chunk(
    num_tasks: int, threads: int, max_memory: int | None, largest: int, whole_elements: int = 0
) -> int:
    """Elements of one work item of `merge`; largest: the most that pays. Raises UsageError as above."""
    chunk = largest
    while max_memory is not None and materialise_bytes(num_tasks, threads, chunk, 4, whole_elements) > max_memory:
        if chunk <= max(1 << 12, whole_elements // 2):
            raise too_little(max_memory, materialise_bytes(num_tasks, threads, chunk, 4, whole_elements), threads)
        chunk //= 2
    return chunk


def too_little(have: int, needed: int, threads: int) -> UsageError:
    fewer = " or --threads 1" if threads > 1 else ""
    return UsageError(
        f"--max-memory {have} bytes is too little: {needed} bytes are needed", hint=f"--max-memory {needed}B{fewer}"
    )
