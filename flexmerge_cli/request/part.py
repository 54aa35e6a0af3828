"""Defines one of several parts that share the work of a run, such as `--part 3/16`. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from flexmerge_cli.errors import UsageError

MAX_PARTS = 9999


@dataclass(frozen=True, slots=True, order=True)
class Share:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def places(self, sizes: Sequence[int]) -> list[int]:
        """Return the positions of this part's items, which are consecutive. All parts have about the same total size.

        sizes: the size of each item. Each item belongs to exactly one of the `count` parts, and a part may be empty.
        """
        total = max(1, sum(sizes))
        middles = ((2 * end - size) * self.count // (2 * total) for size, end in zip(sizes, accumulate(sizes)))
        return [place for place, middle in enumerate(middles) if min(middle, self.count - 1) == self.number - 1]


def parse_part(text: str) -> Share:
    """Parse `3/16`. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--part {text} is not a part of a whole", hint="write --part 3/16 for the third of 16 parts")
    return Share(int(found[1]), int(found[2]))
