"""Records what a merge has finished, so that a merge that was killed continues where it was.

`.journal`, or `.journal-3-of-16` of a part (bundle/parts.py), lies in the folder that is being written. Its first line
identifies the merge, and each further line names a tensor whose parts are written, with their digests and measurements.
Each line begins with the digest of its JSON. Nothing is forced to disk: a part is reused only if its bytes have their
digest, and lines count up to the first that is damaged or incomplete.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.allocation.storage import Part
from flexmerge_cli.errors import MachineError
from flexmerge_cli.request.part import Share

JOURNAL_NAME = ".journal"
NAME_OF_SHARE = re.compile(r"\.journal-(\d{1,4})-of-(\d{1,4})")
FORMAT = "flexmerge.journal/1"
UNREADABLE = "its journal cannot be read"
LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# A merge of fewer bytes takes seconds, and is repeated.
JOURNALED_BYTES = 64 << 20
MAX_JOURNAL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One tensor whose parts are written."""

    parts: tuple[str, ...]
    """The digest of each part, in the order of its storage."""
    digests: dict[int, str]
    """The digest of what a reader gets, by task."""
    errors: dict[int, float]
    """Σ (θ̂ - θ)², by task."""


@dataclass(slots=True)
class _PartHash:
    """The digest of a part that is written front to back."""

    hash: Any = field(default_factory=xxhash.xxh3_128)
    position: int = 0
    is_whole: bool = True


class Journal:
    """The journal of a folder; a context manager that holds it open. Only one thread may use it."""

    def __init__(self, folder: Path, key: str, share: Share | None = None) -> None:
        """Read what earlier runs of this key finished. key: stands for all that decides the bundle's bytes.

        share: the part of the merge that is written; each part has a journal of its own.
        """
        self._path, self._key, self._share, self._descriptor = journal_path(folder, share), key, share, -1
        self._hashes: dict[Part, _PartHash] = {}
        own = _read(self._path, key)
        self.found, self._num_bytes = read_journals(folder, key).found, 0 if isinstance(own, str) else own[1]

    def __enter__(self) -> "Journal":
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED:
                os.close(self._descriptor)
                raise MachineError(
                    f"part {self._share} is being written by another process", hint="wait for it"
                ) from None
        os.ftruncate(self._descriptor, self._num_bytes)
        if not self._num_bytes:
            self._write({"format": FORMAT, "key": self._key})
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)

    def hashed(self, part: Part, start_byte: int, data: np.ndarray) -> None:
        """Record what was written to a part."""
        found = self._hashes.setdefault(part, _PartHash())
        found.is_whole &= start_byte == found.position
        found.hash.update(data.data)
        found.position += data.size

    def finished(
        self, tensor: str, parts: Sequence[Part], digests: Mapping[int, str], errors: Mapping[int, float]
    ) -> None:
        """Record that all parts of a tensor are written. A part that was not written front to back has no digest, so
        its tensor is not recorded."""
        found = [self._hashes.pop(part, _PartHash()) for part in parts]
        if all(one.is_whole and one.position == part.num_bytes for one, part in zip(found, parts)):
            of_parts = [one.hash.hexdigest() for one in found]
            self._write({"tensor": tensor, "parts": of_parts, "digests": dict(digests), "errors": dict(errors)})

    def _write(self, line: Mapping[str, Any]) -> None:
        data = sealed(line)
        while data:
            data = data[os.write(self._descriptor, data) :]


def sealed(line: Mapping[str, Any]) -> bytes:
    """Return a line of a journal: its digest, a space, and its JSON, which ends the line."""
    text = f"{json.dumps(line)}\n".encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text


@dataclass(frozen=True, slots=True)
class Journals:
    """The combined contents of all journals of a folder."""

    found: dict[str, Finished]
    """Maps each tensor to what was finished of it; a NUL and the name of a unit map to the arrays of the unit."""
    useless: str
    """The reason why one of them cannot be continued; empty if all can."""
    of_another: bool
    """Whether one belongs to another merge, and is not just damaged."""


def read_journals(folder: Path, key: str) -> Journals:
    """Read all journals of a folder. Never raises."""
    read = [_read(path, key) for path in journals_of(folder)]
    reasons = [one for one in read if isinstance(one, str)]
    others = [reason for reason in reasons if reason != UNREADABLE]
    found = {name: done for one in read if not isinstance(one, str) for name, done in one[0].items()}
    useless = [*others, *(reasons if len(reasons) == len(read) else ())]
    return Journals(found, useless[0] if useless else "" if read else UNREADABLE, bool(others))


def _read(path: Path, key: str) -> tuple[dict[str, Finished], int] | str:
    """Return what was finished and the journal's length up to there, or why the journal is useless. Never raises."""
    found, num_bytes = dict[str, Finished](), 0
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JOURNAL_BYTES:
            return "its journal is not a merge's file"
        for data in path.read_bytes().splitlines(keepends=True):
            digest, _, text = data.partition(b" ")
            if digest != xxhash.xxh3_64_hexdigest(text).encode():
                break
            line = json.loads(text)
            if not num_bytes and line.get("format") != FORMAT:
                return "its journal is of another version"
            if not num_bytes and line["key"] != key:
                return "it was of another plan, request, device or version"
            if num_bytes:
                of_tasks = ({int(task): value for task, value in line[name].items()} for name in ("digests", "errors"))
                digests, errors = of_tasks
                found[line["tensor"]] = Finished(parts=tuple(line["parts"]), digests=digests, errors=errors)
            num_bytes += len(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # no merge wrote this
    return (found, num_bytes) if num_bytes else UNREADABLE


def holds_journal(folder: Path) -> bool:
    """Return whether a folder was left by a killed merge, or a part of one, and can be continued."""
    return bool(journals_of(folder))


def journals_of(folder: Path) -> list[Path]:
    """Return the journals of a folder. Never raises."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            return sorted(path for path in folder.glob(f"{JOURNAL_NAME}*") if path.is_file() and not path.is_symlink())
    return []


def shares_of(folder: Path) -> set[Share]:
    """Return the parts of a merge that have a journal in a folder."""
    names = (NAME_OF_SHARE.fullmatch(path.name) for path in journals_of(folder))
    return {Share(int(name[1]), int(name[2])) for name in names if name is not None}


def journal_path(folder: Path, share: Share | None) -> Path:
    """Return where the journal of a merge, or of a part of one, lies."""
    return folder / (JOURNAL_NAME if share is None else f"{JOURNAL_NAME}-{share.number}-of-{share.count}")
