"""Finds and reads the manifest.json of a bundle's folder, and finds the files that it names."""

import hashlib
import os
import re
from pathlib import Path

from pydantic import ValidationError

from flexmerge_cli.checkpoint.folder import hub_blobs
from flexmerge_cli.errors import DataError, FlexmergeError, IntegrityError, SourceError
from flexmerge_cli.formats.manifest import FORMAT, FORMATS, Manifest
from flexmerge_cli.formats.sealed import sha256_without
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.record import Unsound, first_error
from flexmerge_cli.regular_file import check_kind, open_file, read_file
from flexmerge_cli.text import json_holds_text

MANIFEST_NAME = "manifest.json"
# 64 tasks of 1,000 tensors take 5 MB, of 18,867 (128 experts in 48 layers) 60 MB.
MAX_MANIFEST_BYTES = 128 << 20
PIECE_BYTES = 1 << 20
MARKS = [f'"format":"{name}"'.encode() for name in FORMATS]


def is_bundle(path: Path) -> bool:
    """Return whether a folder has the manifest of a bundle. Reads it in pieces: memory does not depend on its size."""
    last = b""
    try:
        with open_file(path / MANIFEST_NAME) as file:
            for _ in range(MAX_MANIFEST_BYTES // PIECE_BYTES):
                piece = file.read(PIECE_BYTES)
                if any(mark in last + piece for mark in MARKS):
                    return True
                if not piece:
                    return False
                last = piece[-len(MARKS[0]) :]
    except (FlexmergeError, OSError):
        pass
    return False


def standing(path: Path) -> Path:
    """Return where the bundle of a path lies: there, or where an interrupted writer has left it.

    Without an atomic exchange of folders, `--force` renames the old bundle to `.{name}.old` and then the new one to its
    place. Between the two, and after a kill there, only the old one is to be had; the next writer puts it back.
    """
    old = path.absolute().with_name(f".{path.absolute().name}.old")
    return old if not os.path.lexists(path) and is_bundle(old) else path


def read_manifest(path: Path) -> Manifest:
    """Read the manifest, and check it against its schema and its own id; every path must lie inside the folder."""
    file = path / MANIFEST_NAME
    check_kind(file)
    if not file.is_file():
        why = (
            f"it has no {MANIFEST_NAME}" if path.is_dir() else "it is a file" if path.exists() else "it does not exist"
        )
        raise SourceError(f"no bundle at {path}: {why}", hint="give the folder that `merge` wrote")
    data = read_file(file, MAX_MANIFEST_BYTES, "a manifest")
    # The id first: a damaged manifest may be no JSON any more, or tell of anything.
    claimed = re.search(rb'"id":"([0-9a-f]{64})"', data)
    ours = any(mark in data for mark in MARKS)
    if claimed is None and not ours:
        raise DataError(f"{file} is not a manifest of {FORMAT}", hint="give the folder that `merge` wrote")
    if claimed is None or (digits := claimed[1].decode()) != sha256_without(data, digits, claimed.start(1)):
        raise IntegrityError(f"{file} was changed: its id does not fit its bytes", hint="fetch the bundle again")
    if not ours:
        raise DataError(f"{file} is not a manifest of {FORMAT}", hint="is this bundle from a newer version?")
    try:
        fields = parse_json(data, is_ours=True)
        if not json_holds_text(data, fields):
            raise DataError(f"{file} holds text that no file can hold", hint="do not use this bundle")
        manifest = Manifest.model_validate(fields)
    except (ValidationError, Unsound) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{file} is not sound: {reason}", hint="fetch the bundle again") from None
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}", hint="fetch the bundle again") from None
    for name in (*manifest.files, *manifest.all_links):
        file_inside(path, name)
    return manifest


def file_inside(folder: Path, name: str) -> Path:
    """Return the file of a manifest's path. Raises DataError if a link leads it out of the folder; no name can."""
    file = folder / name
    try:
        target = file.resolve()
        inside = any(target.is_relative_to(place) for place in (folder.resolve(), *hub_blobs(folder)))
    except (OSError, RuntimeError):  # a link that leads to itself
        inside = False
    if not inside:
        raise DataError(f"{folder}: `{name}` is a link out of the bundle", hint="do not use this bundle")
    return file


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
