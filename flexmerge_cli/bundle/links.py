"""Makes and checks the links from a bundle's task folders to its weight files, by whatever the file system offers.

A symbolic link is relative, so it survives copies of the whole bundle. A copy of the bundle may hold hard links or the
files again instead: what counts is that the bytes are those of the weight file.
"""

import os
from collections.abc import Callable
from pathlib import Path

from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.errors import FlexmergeError, MachineError
from flexmerge_cli.formats.manifest_records import FileEntry
from flexmerge_cli.regular_file import check_kind
from flexmerge_cli.writing import NO_LINK

MISSING = "missing"
Linker = Callable[[Path, Path], None]
"""(file, link): makes `link` a link to `file`, both below one folder."""


def linker(folder: Path) -> Linker:
    """Find the kind of link that can be made in a folder, symbolic ones first. Tries it there and leaves nothing.

    Raises MachineError if there is none.
    """
    probe, link = folder / ".probe", folder / ".link"
    probe.touch(exist_ok=False)
    try:
        for make in (_symbolic, os.link):
            try:
                make(probe, link)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
            else:
                link.unlink()
                return make
    finally:
        probe.unlink()
    raise MachineError(f"{folder.parent} has neither symbolic nor hard links", hint="--layout pointer needs none")


def _symbolic(file: Path, link: Path) -> None:
    link.symlink_to(os.path.relpath(file, link.parent))


def link_problem(link: Path, file: Path, entry: FileEntry) -> str | None:
    """Say what is wrong with a link to a weight file, or with the copy in its place; None if the file is missing."""
    try:
        if not os.path.lexists(link):
            return MISSING
        if not file.exists() or (link.exists() and link.samefile(file)):
            return None
        if not link.exists():
            return f"a link that does not lead to {file.name}"
        check_kind(link)
        is_same = link.stat().st_size == entry.bytes and sha256_of(link) == entry.sha256
    except (OSError, FlexmergeError) as error:
        return str(error)
    return None if is_same else f"neither a link to {file.name} nor a copy of it"
