"""Reads the licence that a model's card, the README.md beside its weights, names in its front matter."""

from pathlib import Path
from typing import Any

import yaml

from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.regular_file import open_file
from flexmerge_cli.text import is_text
from flexmerge_cli.yaml_file import load_bounded

CARD_NAME = "README.md"
MAX_FRONT_BYTES = 1 << 20
MAX_LICENSE = 100  # characters; the Hub's own identifiers have 30 at most


def read_license(card: Path) -> str | None:
    """Return the identifier on one line, or the name of an `other` licence. None if there is no card or no sound
    licence in it."""
    try:
        with open_file(card) as file:
            text = file.read(MAX_FRONT_BYTES).decode("utf-8-sig", errors="replace")
        front = _front_matter(text)
        fields = load_bounded(front) if front is not None else None
    except (FlexmergeError, OSError, yaml.YAMLError):
        return None
    if not isinstance(fields, dict):
        return None
    named = _words(fields.get("license"))
    own_name = _words(fields.get("license_name"))
    found = own_name if own_name and named in ([], ["other"]) else named
    text = ", ".join(found)
    return text if 0 < len(text) <= MAX_LICENSE and text.isprintable() and is_text(text) else None


def _front_matter(text: str) -> str | None:
    lines = text.split("\n")
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"][:2]
    return "\n".join(lines[1 : ends[1]]) if len(ends) == 2 and ends[0] == 0 else None


def _words(value: Any) -> list[str]:
    """Return a text, or a list of texts, each on one line."""
    values = value if isinstance(value, list) else [value]
    return [" ".join(one.split()) for one in values if isinstance(one, str) and one.strip()]
