"""Adds a file to a bundle that was fitted to it: arrays that belong to no tensor, and their entry in the manifest."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.allocation.files import safetensors_header
from flexmerge_cli.allocation.manifest_bytes import amended
from flexmerge_cli.bundle.card import is_own_card
from flexmerge_cli.bundle.export import copy_file
from flexmerge_cli.bundle.links import linker
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME
from flexmerge_cli.bundle.publish import bundle_files, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.digest import file_digests
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import IntegrityError
from flexmerge_cli.formats.folders import ADDED
from flexmerge_cli.writing import NO_LINK


def read_arrays(bundle: Bundle, path: str) -> dict[str, np.ndarray]:
    """Return the float32 arrays of a file of a bundle by name, after its digest was compared. Raises IntegrityError."""
    data = b"".join(map(bytes, bundle.chunks(path)))  # This also checks the digest.
    return {
        name: np.frombuffer(data, np.float32, tensor.num_elements, tensor.offset).reshape(tensor.shape)
        for name, tensor in read_header(bundle.path / path)[0].items()
        if tensor.dtype == "F32"
    }


def write_added(
    bundle: Bundle,
    path: str,
    arrays: Mapping[str, np.ndarray],
    target: Path,
    *,
    key: str,
    entry: Mapping[str, Any],
    card: Callable[[Path], str] | None = None,
    force: bool = False,
) -> None:
    """Write a copy of a bundle that has this file, too. Its other files are hard links if possible, else copies.

    path: that of the file in the bundle. arrays: its float32 arrays, in order. key, entry: what the manifest says of
    it, and where. card: makes the card of the new folder anew, if nobody has changed the old one.
    Raises IntegrityError if a file of the bundle is damaged, UsageError if the target exists.
    """
    for task in bundle.tasks:
        bundle.check_files(task)
    for other in ADDED.values():  # No task reads these.
        if other in bundle.manifest.files and other != path:
            read_arrays(bundle, other)
    header = safetensors_header(
        {name: ("F32", array.shape, array.nbytes) for name, array in arrays.items()}, {"format": "np"}
    )
    manifest = bundle.manifest
    with publish(target, force=force, ours=bundle_files, needed_bytes=bundle.total_bytes) as folder:
        for name in (*(name for name in manifest.files if name != path), path):
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == path:
                place.write_bytes(header + b"".join(array.astype("<f4").tobytes() for array in arrays.values()))
                continue
            try:
                os.link((bundle.path / name).resolve(), place)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                copy_file(bundle, name, place)
        link = linker(folder) if manifest.all_links else None
        for name, weights in manifest.all_links.items():
            assert link is not None
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link(folder / weights, folder / name)
        added = folder / path
        file = {"bytes": added.stat().st_size, **file_digests(added)._asdict(), "tasks": []}

        def change(fields: dict[str, object]) -> None:
            assert isinstance(fields["files"], dict)
            fields["files"][path] = file
            fields[key] = entry

        data = (bundle.path / MANIFEST_NAME).read_bytes()
        if f'"id":"{manifest.id}"'.encode() not in data:
            raise IntegrityError(f"{bundle.path} was replaced meanwhile", hint="run the command again")
        (folder / MANIFEST_NAME).write_bytes(amended(data, change))
        if card is not None and is_own_card(bundle.path / CARD_NAME):
            (folder / CARD_NAME).write_text(card(folder))
        elif (bundle.path / CARD_NAME).is_file():
            shutil.copyfile(bundle.path / CARD_NAME, folder / CARD_NAME)
        read_arrays(Bundle.open(folder), path)
