"""Parses JSON that comes from outside, with bounds on its depth, and on lists and objects relative to its size.

Python's values take more memory than their text; a list of 3 bytes takes 64 times as much. Text that is denser in lists
than any file written for a purpose is refused by counting brackets, before it is parsed.
"""

import json
from collections.abc import Callable
from typing import Any

FREE_LISTS = 1000
Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(data: bytes, *, bytes_per_list: int = 5, on_object: Pairs | None = None, is_ours: bool = False) -> Any:
    """Parse JSON. bytes_per_list: the fewest bytes that a list or object takes on average, with its separator.

    is_ours: a plan or manifest, whose integers have 64 bits and whose numbers are finite. Raises ValueError.
    """
    num_lists = data.count(b"[") + data.count(b"{")
    if num_lists > FREE_LISTS + len(data) // bytes_per_list:
        raise ValueError(f"{num_lists:,} lists and objects in {len(data):,} bytes")
    ours: dict[str, Any] = {"parse_int": _of_64_bits, "parse_constant": _refused} if is_ours else {}
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=on_object, **ours)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _of_64_bits(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {text[:30]} has more than 64 bits")
    return int(text)


def _refused(text: str) -> None:
    raise ValueError(f"{text} is not a number")
