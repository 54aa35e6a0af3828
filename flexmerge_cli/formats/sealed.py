"""Reads and writes files of one JSON record that contains its own SHA-256.

The JSON is canonical: sorted keys, UTF-8, no times.
`sha256` is that of the file's bytes with its 64 digits set to 0; an edited file is refused. A file is written under
another name and renamed, so it is either complete or not there.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from flexmerge_cli.errors import UsageError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.record import NO_SHA256, Record, Unsound, first_error
from flexmerge_cli.regular_file import read_file
from flexmerge_cli.text import json_holds_text
from flexmerge_cli.writing import has_start, write_file

Sealed = TypeVar("Sealed", bound=Record)


def sealed(kind: type[Sealed], fields: Mapping[str, Any]) -> Sealed:
    """Check a record's fields and fill in its SHA-256, which is that of the file that `save_sealed` writes.

    It is computed from the checked record: `fields` may leave out defaults, or write a number in another way. Records
    among them are checked already, and all texts hold Unicode (text.py). Raises ValidationError.
    """
    record = kind.model_validate(dict(fields) | {"sha256": NO_SHA256})
    return record.model_copy(update={"sha256": _canonical(record)[1]})


def save_sealed(record: Record, path: Path) -> None:
    """Write the record, replacing what is there. Raises MachineError, and then leaves the existing file unchanged."""
    write_file(path, _canonical(record)[0])


def _canonical(record: Record) -> tuple[bytes, str]:
    """Return the bytes of a record's file, including their SHA-256, and that SHA-256."""
    fields = record.model_dump(mode="json", by_alias=True) | {"sha256": NO_SHA256}
    empty = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = hashlib.sha256(empty).hexdigest()
    return empty.replace(f'"sha256":"{NO_SHA256}"'.encode(), f'"sha256":"{digest}"'.encode(), 1), digest


def sha256_without(data: bytes, digits: str, start: int) -> str:
    """Return the SHA-256 of data with the digits that begin at `start` set to 0. Takes no copy of data."""
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(NO_SHA256.encode())
    digest.update(memoryview(data)[start + len(digits) :])
    return digest.hexdigest()


def is_sealed(path: Path, format_: str, max_bytes: int) -> bool:
    """Return whether a file has, or once had, this format, so that a new one may replace it."""
    try:
        return (
            path.is_file()
            and has_start(path, b"{")
            and path.stat().st_size <= max_bytes
            and f'"format":"{format_}"'.encode() in path.read_bytes()
        )
    except OSError:
        return False


def read_sealed(kind: type[Sealed], path: Path, format_: str, what: str, again: str, max_bytes: int) -> Sealed:
    """Read a file. what: the word for it in errors, such as `plan`. again: the hint that says how to make it.

    Raises UsageError if it is not such a file, was edited, or is inconsistent.
    """
    if path.is_file() and path.stat().st_size > max_bytes:
        raise UsageError(f"{path} is too large for a {what}", hint=again)
    data = read_file(path, max_bytes, f"a {what}")
    try:
        fields = parse_json(data, is_ours=True)
        if not isinstance(fields, dict) or fields.get("format") != format_:
            raise UsageError(f"{path} is not a {what} ({format_})", hint=again)
        claimed = str(fields.get("sha256"))
        if sha256_without(data, claimed, data.find(f'"sha256":"{claimed}"'.encode()) + len('"sha256":"')) != claimed:
            raise UsageError(f"{path} was edited: its sha256 does not fit its bytes", hint=again)
        if not json_holds_text(data, fields):
            raise UsageError(f"{path} holds text that no file can hold", hint=again)
        return kind.model_validate(fields)
    except (ValidationError, Unsound) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise UsageError(f"{path} is not a sound {what}: {reason}", hint=again) from None
    except ValueError as error:
        raise UsageError(f"{path} is not a {what}: {error}", hint=again) from None
