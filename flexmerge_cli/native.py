"""Calls loops in C that go through memory once (native.c, decode.c), without the interpreter's lock.

`lib` and `decoding` are None without them. They give the same bits as the plain Python code, except for products and
errors of rows, which are summed in another order.

They are built if there is a compiler, and everything works without: their callers also contain the plain code, and a
test compares both. Arguments are addresses of contiguous memory on the CPU, which the caller keeps.
"""

import ctypes
import importlib.machinery
from collections.abc import Mapping
from pathlib import Path

_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "flexmerge_sum": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_squares": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _COUNT),
    "flexmerge_merge": (
        _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _COUNT, ctypes.c_double, ctypes.c_double, _POINTER,
        _POINTER, ctypes.c_uint64, _COUNT, _POINTER, _POINTER, _POINTER, _COUNT,
    ),
    "flexmerge_deltas": (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_elect": (
        _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _COUNT,
        _POINTER, _COUNT, _POINTER, _COUNT,
    ),
    "flexmerge_products": (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_trim": (
        _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, ctypes.c_uint64, _COUNT, _COUNT, _POINTER,
    ),
    "flexmerge_agree": (_POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER),
    "flexmerge_count": (_POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER),
    "flexmerge_find": (_POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_sizes": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER),
    "flexmerge_masked": (
        _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _COUNT,
        _POINTER, _COUNT,
    ),
    "flexmerge_row_errors": (
        _POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
    ),
    "flexmerge_sample": (
        _POINTER, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _POINTER,
    ),
}  # fmt: skip


_DECODE_ARGUMENTS = {
    "flexmerge_decode": (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_product": (_POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER, _COUNT),
    "flexmerge_product_of_rows": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _COUNT, _POINTER),
}


class Codes(ctypes.Structure):
    """Mirrors the struct in decode.c: rows of codes, which `table` and a scale decode."""

    _fields_ = [
        ("codes", _POINTER), ("row_bytes", _COUNT), ("bits", _COUNT), ("table", _POINTER), ("scale", _POINTER),
        ("scale_step", _COUNT),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    """Mirrors the struct in decode.c: rows of n elements, each the sum of those of these parts that are present."""

    _fields_ = [
        ("n", _COUNT), ("dense", _POINTER), ("unified", _POINTER), ("dense_type", _COUNT), ("unified_type", _COUNT),
        ("mask", _POINTER), ("gamma", ctypes.c_double), ("codes", Codes * 2),
    ]  # fmt: skip


def _load(name: str, version: int, functions: Mapping[str, tuple[object, ...]]) -> ctypes.CDLL | None:
    """Load a library. version: that of the arguments, as in the source; what an earlier version has built is
    ignored."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"{name}{suffix}")
        if path.is_file():
            try:
                found = ctypes.CDLL(str(path))
                if found.flexmerge_version() != version:
                    continue
                for function_name, arguments in functions.items():
                    function = getattr(found, function_name)
                    function.argtypes, function.restype = arguments, None
            except (OSError, AttributeError):  # built for another machine, or another version
                continue
            return found
    return None


def address(held: ctypes.Structure) -> int:
    return ctypes.addressof(held)


MOST_TASKS = 32  # the limit of flexmerge_products
TYPES = {"F32": 1, "BF16": 2}  # as in decode.c and native.c

lib = _load("_native", 7, _ARGUMENTS)
decoding = _load("_decode", 2, _DECODE_ARGUMENTS)
