"""Loops in C that go through memory once (native.c), called without the interpreter's lock; `lib` is None without them.

The same bits as of the plain ways come out, but for products and errors of rows, which add up in another order.

They are built where there is a compiler, and everything works without: their callers hold the plain way, too, and a
test holds both against each other. Arguments are addresses of contiguous memory on the CPU, which the caller keeps.
"""

import ctypes
import importlib.machinery
from pathlib import Path

_VERSION = 2  # of the arguments, as in native.c: what an earlier one has built is left alone
_POINTER, _COUNT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "flexmerge_sum": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_average": (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_squares": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _COUNT),
    "flexmerge_merge": (
        _POINTER, _POINTER, _COUNT, _COUNT, _COUNT, ctypes.c_double, ctypes.c_double, _POINTER, _POINTER, _COUNT,
    ),
    "flexmerge_products": (_POINTER, _POINTER, _COUNT, _COUNT, _COUNT, _COUNT, _POINTER),
    "flexmerge_measure_rows": (_POINTER, _COUNT, _COUNT, _POINTER, _POINTER),
    "flexmerge_row_errors": (_POINTER, _COUNT, _COUNT, _COUNT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
}  # fmt: skip


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.is_file():
            try:
                found = ctypes.CDLL(str(path))
                if found.flexmerge_version() != _VERSION:
                    continue
                for name, arguments in _ARGUMENTS.items():
                    function = getattr(found, name)
                    function.argtypes, function.restype = arguments, None
            except (OSError, AttributeError):  # built for another machine, or of another version
                continue
            return found
    return None


MOST_TASKS = 32  # of flexmerge_products

lib = _load()
