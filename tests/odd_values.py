"""Parts of a manifest or plan replaced by odd values, and sealed again as a stranger would who knows the format."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.hostile import sealed

ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, -1e308, 5e-324, "", "x", "a" * 5000,
    "\x1b[2J", "\u202e", "nan", "1e400", "../x", "{a: *b}", "[" * 3000, "ties:K=0.2", "all", "F32", "U8", "tied",
    "base-only", [], [[]], [0], [-1], [10**400], [2**62, 4], {}, {"a": 1}, {"\x1b": 10**400}, "0" * 32,
    "0" * 64, "1:1:1",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part, outer ones first."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def odd_files(data: bytes, key: str, *, seed: int) -> Iterator[tuple[str, bytes]]:
    """What was changed, and the file: for ever, each one drawn anew. key: of the file's own digest."""
    draw = random.Random(seed)
    sound = json.loads(data)
    while True:
        value = copy.deepcopy(sound)
        changes = []
        for _ in range(1 if draw.random() < 0.8 else 2):
            found = list(places(value))
            # A name first, so that a list of a thousand numbers does not hide the fields.
            name = draw.choice(sorted({place for _, place in found if isinstance(place, str)} or {0}))
            holder, place = draw.choice([pair for pair in found if pair[1] == name] if draw.random() < 0.7 else found)
            kind = draw.choice(["replace"] * 6 + ["remove", "double", "swap", "number"])
            odd = draw.choice(ODD)
            if kind == "replace":
                holder[place] = copy.deepcopy(odd)
            elif kind == "remove":
                del holder[place]
            elif kind == "double":
                if isinstance(holder, list):
                    holder.append(copy.deepcopy(holder[place]))
                else:
                    holder[draw.choice(["", "x", "\x1b", str(place) + "2"])] = copy.deepcopy(holder[place])
            elif kind == "swap":
                other, there = draw.choice(found)
                holder[place], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[place])
            elif type(holder[place]) in (int, float):
                holder[place] = draw.choice(
                    [holder[place] + 1, holder[place] - 1, -holder[place], holder[place] * 2**40]
                )
            changes.append(f"{kind} {place!r} {str(odd)[:20]!r}")
        yield ", ".join(changes), sealed(value, key)
