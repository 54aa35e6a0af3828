"""`2.25x`, `40%`, `600MiB`: how large a bundle may be."""

import math
import re
from dataclasses import dataclass

from flexmerge_cli.errors import UsageError

UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
PATTERN = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*(x|%|[kKMGT]?i?B)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A target. Factors and percentages count tensor data, byte targets every byte on disk."""

    text: str
    max_bytes: float
    on_disk: bool
    """Whether headers, manifest and side files count."""
    all_merges: bool
    """`1x`: the whole order, whatever private tensors add."""


def parse_size(text: str, *, num_tasks: int, one_model_bytes: int) -> Size:
    """Factors of one model in (0, M], percentages of M copies in (0, 100], or bytes with a unit. Raises UsageError."""
    match = PATTERN.fullmatch(text.strip())
    if match is None or (match[2] not in ("x", "%") and match[2] not in UNITS):
        raise UsageError(f"`{text}` is not a size", hint="write 2.25x, 40%, 600MiB, 6GB or 123456B")
    value, unit = float(match[1]), match[2]
    if unit == "x":
        if not 0 < value <= num_tasks:
            raise UsageError(f"size {text} is outside (0x, {num_tasks}x]", hint=f"{num_tasks}x keeps all models apart")
        # Mx is no limit: the mean of models of different sizes is rounded, and M times it may be less than they take.
        max_bytes = math.inf if value == num_tasks else value * one_model_bytes
        return Size(text=text, max_bytes=max_bytes, on_disk=False, all_merges=value == 1)
    if unit == "%":
        if not 0 < value <= 100:
            raise UsageError(f"size {text} is outside (0%, 100%]", hint="100% keeps all models apart")
        max_bytes = math.inf if value == 100 else value / 100 * num_tasks * one_model_bytes
        return Size(text=text, max_bytes=max_bytes, on_disk=False, all_merges=False)
    if value <= 0:
        raise UsageError(f"size {text} is not positive", hint="write 600MiB, 6GB or 123456B")
    return Size(text=text, max_bytes=value * UNITS[unit], on_disk=True, all_merges=False)


def parse_bytes(text: str) -> int:
    """`8GiB` to bytes. Raises UsageError."""
    match = PATTERN.fullmatch(text.strip())
    if match is None or match[2] not in UNITS or not 0 < float(match[1]) < math.inf:
        raise UsageError(f"`{text}` is not an amount of memory", hint="write 8GiB, 500MB")
    return int(float(match[1]) * UNITS[match[2]])
