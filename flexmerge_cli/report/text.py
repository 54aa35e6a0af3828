"""Formats numbers and names as text."""

from collections.abc import Mapping
from typing import Any


def merges_words(allocation: Mapping[str, Any], before: str) -> str:
    """Say how many merges of the order an allocation made, after `before`; empty if it has none, as for `auto`."""
    merges, undone = allocation["merges"], allocation["undone"]
    return f"{before}{merges} merges ({undone} undone)" if merges or undone else ""


def human_bytes(count: float) -> str:
    """Format bytes for people, `1.3 GB`, in powers of ten like disks and the Hub."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def printable(text: str) -> str:
    """Return text on one line, with control and direction marks and line breaks spelled out, as in `\\x1b`.

    Names come from strangers: a terminal must not obey an escape sequence in one.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """Do the same as `printable`, but keep line breaks and tabs."""
    return text if text.isprintable() else "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def tail(name: str, characters: int) -> str:
    """Return the end of a dotted name, if possible from a dot on: `…layers.3.mlp`."""
    if len(name) <= characters:
        return name
    end = name[-(characters - 1) :]
    dot = end.find(".")
    return "…" + (end[dot + 1 :] if 0 <= dot < len(end) // 2 else end)
