"""Keeps the parts of a bundle below its address in an object store until they are joined.

An object is written whole, so a part (parts.py) is made on the disk of its machine, and sent as two objects below
`.flexmerge-parts/KEY/`, where the key stands for all that decides the bundle's bytes:

3-of-16.data     the bytes that the part has written, in the order of the layout's files
3-of-16.journal  its journal, sent last: a part without one is not finished

The join fetches all parts, and goes on like one whose parts lie in a shared folder.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.bundle.parts import share_of
from flexmerge_cli.bundle.publish import partial_bytes, partial_folder
from flexmerge_cli.bundle.store import PARTS, Store, store_errors
from flexmerge_cli.engine.journal import journal_path
from flexmerge_cli.errors import IntegrityError, UsageError
from flexmerge_cli.request.part import Share
from flexmerge_cli.writing import cannot_write, no_space

COPY_BYTES = 8 << 20
JOURNAL = re.compile(r"(\d{1,4})-of-(\d{1,4})\.journal")

OnProgress = Callable[[str, int, int], None]


def has_part(store: Store, key: str, part: Share) -> bool:
    """Return whether a part is finished. Raises UsageError if there are parts of another merge."""
    if others := {name for name in store.parts if not name.startswith(f"{key}/")}:
        raise UsageError(
            f"{store.address} holds {len(others):,} objects of parts of another merge, such as {PARTS}{min(others)}: "
            "it was of another plan, request, device or version",
            hint="choose another address with -o, or remove them",
        )
    return f"{key}/{_name(part)}.journal" in store.parts


def send_part(store: Store, layout: BundleLayout, target: Path, key: str, part: Share, on_progress: OnProgress) -> None:
    """Send what a part has written. Raises SourceError."""
    folder, place = partial_folder(target), f"{store.root}/{PARTS}{key}/{_name(part)}"
    done, total = 0, sum(num_bytes for _, _, num_bytes in _ranges(layout, part))
    with store_errors(store.address, f"has no part {part}", "it is not finished"):
        with store.files.open(f"{place}.data", "wb") as sent:
            for path, offset, num_bytes in _ranges(layout, part):
                with (folder / path).open("rb") as read:
                    read.seek(offset)
                    while num_bytes:
                        data = read.read(min(COPY_BYTES, num_bytes))
                        sent.write(data)
                        num_bytes, done = num_bytes - len(data), done + len(data)
                        on_progress("send", done, total)
        store.files.put_file(str(journal_path(folder, part)), f"{place}.journal")


def fetch_parts(store: Store, layout: BundleLayout, target: Path, key: str, on_progress: OnProgress) -> None:
    """Fetch all finished parts to where the join looks for them.

    Raises UsageError if there are none, IntegrityError if one is not of its size, SourceError, MachineError.
    """
    found = (JOURNAL.fullmatch(name.removeprefix(f"{key}/")) for name in store.parts)
    parts = [Share(int(name[1]), int(name[2])) for name in found if name is not None]
    if not parts:
        raise UsageError(
            f"{store.address} holds no parts of this merge", hint="write them with the same command and --part 1/N, …"
        )
    folder = partial_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    done, total = 0, sum(store.parts.get(f"{key}/{_name(part)}.data", 0) for part in parts)
    if shutil.disk_usage(folder).free + partial_bytes(target) < total:
        raise no_space(folder, total)
    for part in parts:
        place = f"{store.root}/{PARTS}{key}/{_name(part)}"
        ranges, size = [*_ranges(layout, part)], store.parts.get(f"{key}/{_name(part)}.data")
        if size != sum(num_bytes for _, _, num_bytes in ranges):
            raise IntegrityError(
                f"{PARTS}{key}/{_name(part)}.data at {store.address} has {size} bytes, and part {part} has others",
                hint=f"remove {_name(part)}.journal, and run the part again",
            )
        reading = store_errors(store.address, f"gave no part {part}")
        with reading, store.files.open(f"{place}.data", "rb") as read:
            for path, offset, num_bytes in ranges:
                (folder / path).parent.mkdir(exist_ok=True)
                descriptor = os.open(folder / path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    while num_bytes:
                        data = read.read(min(COPY_BYTES, num_bytes))
                        if not data:
                            raise IntegrityError(f"{place}.data ends early", hint="run the command again")
                        _write(descriptor, data, offset, folder / path)
                        offset, num_bytes, done = offset + len(data), num_bytes - len(data), done + len(data)
                        on_progress("fetch", done, total)
                finally:
                    os.close(descriptor)
            store.files.get_file(f"{place}.journal", str(journal_path(folder, part)))


def _write(descriptor: int, data: bytes, offset: int, path: Path) -> None:
    """Write all bytes at their place. Raises MachineError that names the path."""
    left = memoryview(data)
    try:
        while left:
            written = os.pwrite(descriptor, left, offset)
            left, offset = left[written:], offset + written
    except OSError as error:
        raise cannot_write(error, path) from None


def remove_parts(store: Store) -> None:
    """Remove what is no longer needed once the bundle is published. Raises SourceError."""
    with store_errors(store.address, f"is published, but its {PARTS} was not removed", "nothing reads it"):
        for name in sorted(store.parts, reverse=True):
            store.files.rm_file(f"{store.root}/{PARTS}{name}")


def _name(part: Share) -> str:
    return f"{part.number}-of-{part.count}"


def _ranges(layout: BundleLayout, share: Share) -> Iterator[tuple[str, int, int]]:
    """Yield what a part writes: file, first byte, number of bytes."""
    names = share_of(layout, share)
    units = {unit.name for unit in layout.allocation.units if not names.isdisjoint(unit.tensors)}
    for file in layout.files:
        for part, offset in zip(file.parts, file.offsets(), strict=True):
            if part.num_bytes and part.tensor in (units if part.of_unit else names):
                yield file.path, offset, part.num_bytes
