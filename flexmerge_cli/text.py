"""Checks that texts can be written to every file and path: Unicode, without NUL and without lone surrogates.

JSON, YAML and pickles can all contain others, and so can names on a disk; they are refused where they come in.
"""

from pathlib import Path
from typing import Any


def is_text(text: str) -> bool:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return "\0" not in text


def holds_text(value: Any) -> bool:
    """Return whether all texts of a JSON value are valid, including keys. The parser must have bounded its depth."""
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, dict):
        return all(is_text(str(key)) and holds_text(item) for key, item in value.items())
    return not isinstance(value, list) or all(map(holds_text, value))


def json_holds_text(data: bytes, value: Any) -> bool:
    """Return whether the texts of `value`, parsed from `data`, are valid. Plain ASCII without escapes needs no walk
    through it."""
    return (data.isascii() and b"\\u" not in data and b"\0" not in data) or holds_text(value)


def expanded(path: str | Path) -> Path:
    """Expand `~` and `~user` to home folders; if there is no such user, or no home at all, the path stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
