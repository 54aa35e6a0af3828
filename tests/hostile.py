"""Hypothesis strategies that damage files: bytes flipped, cut, doubled; JSON with odd values for sound ones."""

import copy
import hashlib
import json
from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st

# Files go to one folder of the test; every example writes them anew.
SLOW_FILES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "x", "../x", "/etc/passwd", "a/b",
    "\x00", "\ud800", "x" * 300, "all", "F32", "F4", "mergeable", "tied", "private", "constant", "base-only", "BF16",
    "I64", [], [0], [-1], [[]], {}, {"a": 1}, [None], "0" * 32, "0" * 64, "weights/../../x", "tasks/x/y", [2**62, 4],
]  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """1 to 4 damages of a file's bytes."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        start = draw(st.integers(0, max(0, size - 1)))
        length = draw(st.integers(0, 20))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "double", "insert", "zero"]))
        if kind == "flip" and size:
            data = data[:start] + bytes([data[start] ^ (1 << draw(st.integers(0, 7)))]) + data[start + 1 :]
        elif kind == "cut":
            data = data[:start]
        elif kind == "drop":
            data = data[:start] + data[start + length :]
        elif kind == "double":
            data = data[: start + length] + data[start:]
        elif kind == "insert":
            data = data[:start] + draw(st.binary(max_size=20)) + data[start:]
        else:
            data = data[:start] + bytes(min(length, size - start)) + data[start + length :]
    return data


@st.composite
def json_values(draw: st.DrawFn, value: Any, *, changes: int = 3) -> Any:
    """The value after 1 to `changes` changes: a part replaced by an odd value or another part, removed, or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, changes))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(ODD_VALUES))
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "other", "remove", "add", "small"]))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        elif kind == "other":
            other, other_key = draw(st.sampled_from(places))
            holder[key] = json.loads(json.dumps(other[other_key]))
        elif kind == "remove":
            del holder[key]
        elif kind == "small" and type(holder[key]) is int:
            holder[key] += draw(st.integers(-2, 2))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["extra", "a", "names", "../x", ""]))] = copy.deepcopy(holder[key])
        else:
            holder.append(copy.deepcopy(holder[key]))
    return value


def _places(value: Any) -> Any:
    """(container, key) of every part, outer ones first."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def sealed(value: Any, key: str) -> bytes:
    """JSON with its own sha256 right, under `key`: what a stranger would write who knows the format."""
    zero = "0" * 64
    if isinstance(value, dict) and key in value:
        value = value | {key: zero}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text.replace(f'"{key}":"{zero}"', f'"{key}":"{hashlib.sha256(text.encode()).hexdigest()}"', 1).encode()
