"""Parses `2.25x`, `40%` and `600MiB`: how large a bundle may be. Text in, a size out; no plan is needed."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from flexmerge_cli.errors import UsageError

UNITS = {
    "B": 1, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
PATTERN = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*(x|%|[kKMGT]?i?B)", re.IGNORECASE)
SPELLED = {unit.lower(): unit for unit in ("x", "%", *UNITS)}
MAX_SIZES = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """A size as a number of bytes of one family's bundle."""

    text: str
    """The size as it was written."""
    max_bytes: float
    """The upper bound; infinite if every model may be kept apart."""
    on_disk: bool
    """Whether every file counts, including headers, manifest and side files; otherwise only tensor data counts."""
    all_merges: bool
    """Whether the size is `1x`: the whole order is merged, whatever private tensors add."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size as the user asked for it."""

    text: str
    value: float
    unit: str
    """`x`: models of mean size; `%` of all copies; or a unit of bytes on disk."""

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole number of models."""
        return self.unit == "x" and self.value == int(self.value)

    def target(self, *, num_tasks: int, one_model_bytes: int) -> Target:
        """Return the size for a family of num_tasks models of one_model_bytes of tensor data on average.

        Raises UsageError if it exceeds the number of models.
        """
        if self.unit == "x":
            if self.value > num_tasks:
                raise UsageError(
                    f"size {self.text} is outside (0x, {num_tasks}x]", hint=f"{num_tasks}x keeps all models apart"
                )
            # Mx is no limit: the mean of models of different sizes is rounded, and M times it may be too little.
            most = math.inf if self.value == num_tasks else self.value * one_model_bytes
            return Target(self.text, most, on_disk=False, all_merges=self.value == 1)
        if self.unit == "%":
            most = math.inf if self.value == 100 else self.value / 100 * num_tasks * one_model_bytes
            return Target(self.text, most, on_disk=False, all_merges=False)
        return Target(self.text, self.value * UNITS[self.unit], on_disk=True, all_merges=False)


def parse_size(text: str) -> Size:
    """Parse a factor of one model above 0, a percentage of all copies in (0, 100], or bytes with a unit.

    Raises UsageError.
    """
    match = PATTERN.fullmatch(text.strip())
    unit = SPELLED.get(match[2].lower()) if match is not None else None
    if match is None or unit is None:
        raise UsageError(f"`{text}` is not a size", hint="write 2.25x, 40%, 600MiB, 6GB or 123456B")
    value, text = float(match[1]), text if unit == match[2] else f"{match[1]}{unit}"
    if unit == "%" and not 0 < value <= 100:
        raise UsageError(f"size {text} is outside (0%, 100%]", hint="100% keeps all models apart")
    if not 0 < value < math.inf:
        raise UsageError(f"size {text} is not positive", hint="write 2.25x, 40%, 600MiB, 6GB or 123456B")
    return Size(text, value, unit)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse sizes separated by commas, each a size or FROM:TO:STEP with both ends: `0.75x:8x:0.25x,600MiB`.

    Raises UsageError.
    """
    found: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        found += _range(item) if ":" in item else [item]
    if not found:
        raise UsageError(f"--sizes `{text}` names no size", hint="--sizes 1x:8x:1x, or 1x,1.5x,2x")
    return tuple(map(parse_size, dict.fromkeys(found)))


def parse_bytes(text: str) -> int:
    """Parse an amount of memory, such as `8GiB`, to bytes. Raises UsageError."""
    match = PATTERN.fullmatch(text.strip())
    unit = SPELLED.get(match[2].lower(), "") if match is not None else ""
    if match is None or unit not in UNITS or not 0 < float(match[1]) < math.inf:
        raise UsageError(f"`{text}` is not an amount of memory", hint="write 8GiB, 500MB")
    return int(float(match[1]) * UNITS[unit])


def _range(text: str) -> list[str]:
    matches = [PATTERN.fullmatch(end.strip()) for end in text.split(":")]
    if len(matches) != 3 or None in matches or len({match[2].lower() for match in matches if match}) != 1:
        raise UsageError(f"`{text}` is not a range of sizes", hint="write FROM:TO:STEP in one unit: 0.75x:8x:0.25x")
    first, last, step = (Decimal(match[1]) for match in matches if match)
    unit = next(match[2] for match in matches if match)
    if step <= 0 or last < first or (last - first) / step >= MAX_SIZES:
        raise UsageError(
            f"`{text}` steps from {first} to {last} by {step}", hint=f"go upwards, in at most {MAX_SIZES} steps"
        )
    count = int((last - first) / step) + 1
    return [f"{_plain(first + number * step)}{unit}" for number in range(count)]


def _plain(value: Decimal) -> str:
    return re.sub(r"\.?0+$", "", f"{value:f}") if "." in f"{value:f}" else f"{value:f}"
