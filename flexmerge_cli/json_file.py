"""Parses JSON that comes from outside, with bounds on its depth, and on lists and objects relative to its size.

Python's values take more memory than their text; a list of 3 bytes takes 64 times as much. Text that is denser in lists
than any file written for a purpose is refused by counting brackets, before it is parsed. Plans, manifests and
calibrations become records, which take more: the memory for them is bounded by counting their objects and values.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

FREE_LISTS = 1000
MEMORY_RATIO = 10  # Those of two tasks take 10 to 12 times their size, of eight 7, of sixty-four 3.
FREE_BYTES = 256 << 20
Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(data: bytes, *, bytes_per_list: int = 5, on_object: Pairs | None = None, is_ours: bool = False) -> Any:
    """Parse JSON. bytes_per_list: the fewest bytes that a list or object takes on average, with its separator.

    is_ours: a plan, manifest or calibration, whose integers have 64 bits and whose numbers are finite. Raises
    ValueError.
    """
    num_lists = data.count(b"[") + data.count(b"{")
    if num_lists > FREE_LISTS + len(data) // bytes_per_list:
        raise ValueError(f"{num_lists:,} lists and objects in {len(data):,} bytes")
    text = data.decode("utf-8-sig")
    if is_ours:
        require_memory(data, text)
    ours: dict[str, Any] = {"parse_int": _of_64_bits, "parse_constant": _refused} if is_ours else {}
    try:
        return json.loads(text, object_pairs_hook=on_object, **ours)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def require_memory(data: bytes, text: str) -> None:
    """Raise ValueError for a file of ours that would take more than MEMORY_RATIO times its size and FREE_BYTES."""
    num_bytes = memory_bound(data, text)
    if num_bytes > MEMORY_RATIO * len(data) + FREE_BYTES:
        raise ValueError(f"its {len(data):,} bytes would take up to {num_bytes:,} bytes of memory")


def memory_bound(data: bytes, text: str) -> int:
    """Return the bytes of memory that a file of ours takes at most while it is read: data, text, values and records."""
    # Bytes for each object (as a record), list, entry, item and string, above what any file was measured to take.
    marks = {b"{": 500, b"[": 90, b":": 60, b",": 55, b'"': 25}
    return len(data) + 2 * sys.getsizeof(text) + sum(cost * data.count(mark) for mark, cost in marks.items())


def _of_64_bits(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {text[:30]} has more than 64 bits")
    return int(text)


def _refused(text: str) -> None:
    raise ValueError(f"{text} is not a number")
