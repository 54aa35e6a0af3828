"""Publishes a bundle at the address of an object store, such as s3://bucket/bundle, through fsspec.

Every object appears whole, but a folder cannot be renamed, so the manifest is the commit point: it is sent last, and of
a bundle that is replaced it is removed first. Until then `.flexmerge-push.json` names the manifest that will be there:

manifest  its sha256
files     the names that the push writes or removes
ready     whether every object of these names was written by this push, or has the bytes that it would write

A push that breaks off publishes nothing. The next one of the same bundle sends only what is missing, as far as sizes
tell. Links are not stored: the bundle is read by flexmerge, and `export` writes folders for other libraries.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.card import MAX_CARD_BYTES, is_own_card
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest, sha256_of
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.verify import require_sound
from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.checkpoint.urls import open_store
from flexmerge_cli.errors import DataError, FlexmergeError, SourceError, UsageError
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.json_file import parse_json

MARK = ".flexmerge-push.json"
PARTS = ".flexmerge-parts/"  # of a bundle that is not joined yet (store_parts.py)
FORMAT = "flexmerge.push/1"
WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Store:
    """The objects below an address."""

    address: str
    files: Any
    """The fsspec file system."""
    root: str
    sizes: Mapping[str, int]
    """The bytes of each object, by its name below the address."""
    parts: Mapping[str, int]
    """The same of the parts that are not joined yet, by their names below PARTS."""

    @staticmethod
    def at(address: str, *, offline: bool = False) -> "Store":
        """List an address. Raises SourceError, or UsageError for an address that cannot be written."""
        if address.startswith(WEB):
            raise UsageError(f"{address}: a web server is not written to", hint="hf://org/name or s3://bucket/bundle")
        if address.startswith("file://"):
            raise UsageError(f"{address} is a folder on this disk, not an object store", hint="give its path")
        files, root = open_store(address.rstrip("/"), Access(offline=offline))
        with store_errors(address):
            files.invalidate_cache()
            listed = files.find(root, detail=True)
        prefix = root.strip("/")
        found = {name.strip("/").removeprefix(prefix).lstrip("/"): int(info["size"]) for name, info in listed.items()}
        parts = {name.removeprefix(PARTS): size for name, size in found.items() if name.startswith(PARTS)}
        sizes = {name: size for name, size in found.items() if not name.startswith(PARTS)}
        return Store(address.rstrip("/"), files, root.rstrip("/"), sizes, parts)

    def put(self, file: Path, name: str) -> None:
        """Send a file. It appears when all of it is there."""
        self.files.put_file(str(file), f"{self.root}/{name}")

    def read(self, name: str, most: int) -> bytes:
        """Return the bytes of a small object; empty if it is not there."""
        if name not in self.sizes:
            return b""
        if self.sizes[name] > most:
            raise DataError(f"{self.address}/{name} has more than {most:,} bytes", hint="choose another address")
        with store_errors(self.address):
            return bytes(self.files.cat_file(f"{self.root}/{name}"))

    def manifest(self) -> Manifest | None:
        """Return the manifest that is there; None if there is none, or something else is called so."""
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / MANIFEST_NAME).write_bytes(self.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
            try:
                return read_manifest(Path(scratch))
            except FlexmergeError:
                return None

    def mark(self) -> dict[str, Any]:
        """Return what a push that broke off says about itself; empty if there is none, or something else is called
        so."""
        try:
            found = parse_json(self.read(MARK, MAX_MANIFEST_BYTES) or b"{}")
        except ValueError:
            return {}
        is_mark = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("files"), list)
        return found if is_mark and all(isinstance(name, str) for name in found["files"]) else {}


def check_store(address: str, *, force: bool, offline: bool = False) -> None:
    """Refuse, before a weight is read, an address that holds a bundle, without `force`, or anything else."""
    store = Store.at(address, offline=offline)
    if store.mark() and (force or MANIFEST_NAME not in store.sizes):
        return
    if store.manifest() is None and store.sizes:
        raise UsageError(
            f"{store.address} holds {len(store.sizes):,} objects and no bundle, such as {min(store.sizes)}",
            hint="choose another address, or remove them",
        )
    if store.sizes and not force:
        raise UsageError(f"{store.address} exists", hint="choose another address with -o, or replace it with --force")


def push_to_store(
    folder: Path,
    address: str,
    *,
    dry_run: bool = False,
    offline: bool = False,
    on_compared: Callable[[str], None] = lambda _message: None,
    on_progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> dict[str, Any]:
    """Publish a bundle at an address, and return what was sent: names `changed` and `removed`, and `bytes`.

    Raises IntegrityError for a damaged bundle, UsageError where other files are, SourceError if the store cannot be
    written; then nothing is published.
    """
    bundle = Bundle.open(folder)
    if not dry_run:
        require_sound(bundle)
    check_store(address, force=True, offline=offline)
    store = Store.at(address, offline=offline)
    wanted = {name: (file.bytes, file.sha256) for name, file in bundle.manifest.files.items()}
    card = folder / CARD_NAME
    if card.is_file() and _is_own_card(store):
        wanted[CARD_NAME] = card.stat().st_size, sha256_of(card)
    own, old, mark = sha256_of(folder / MANIFEST_NAME), store.manifest(), store.mark()
    sound = {name for name in wanted if store.sizes.get(name) == wanted[name][0]}
    goes_on = mark.get("manifest") == own and mark.get("ready") is True
    if not goes_on:
        there = {} if old is None else {name: file.sha256 for name, file in old.files.items()}
        sound = {name for name in sound if there.get(name) == wanted[name][1]}
        if CARD_NAME in wanted and store.sizes.get(CARD_NAME) == card.stat().st_size:
            sound |= {CARD_NAME} if store.read(CARD_NAME, MAX_CARD_BYTES) == card.read_bytes() else set()
    written = {*(mark.get("files") or ()), *(old.files if old is not None else ()), *wanted}
    written -= {CARD_NAME} - wanted.keys()  # which may be somebody's own by now
    stale = sorted((written & store.sizes.keys()) - sound)
    changed = sorted(wanted.keys() - sound)
    is_same = store.read(MANIFEST_NAME, MAX_MANIFEST_BYTES) == (folder / MANIFEST_NAME).read_bytes()
    total = sum(wanted[name][0] for name in changed) + (0 if is_same else (folder / MANIFEST_NAME).stat().st_size)
    gone = sorted(set(stale) - set(changed))
    on_compared(f"{store.address}: {total:,} bytes to send, {len(changed)} changed and {len(gone)} removed files")
    if not dry_run and not (is_same and not changed and not stale and not mark):
        with store_errors(store.address):
            new_mark = {"manifest": own, "files": sorted({*wanted, *stale})}
            _send(store, folder, changed, stale, new_mark, goes_on, on_progress)
    return {"changed": changed, "removed": gone, "bytes": total}


def _send(
    store: Store,
    folder: Path,
    changed: list[str],
    stale: list[str],
    mark: dict[str, Any],
    goes_on: bool,
    on_progress: Callable[[str, int, int], None],
) -> None:
    files, root = store.files, store.root

    def write_mark(ready: bool) -> None:
        files.pipe_file(f"{root}/{MARK}", json.dumps({"format": FORMAT, **mark, "ready": ready}).encode())

    if not goes_on:
        write_mark(False)
        for name in [MANIFEST_NAME] * (MANIFEST_NAME in store.sizes) + stale:
            files.rm_file(f"{root}/{name}")
        write_mark(True)
    done, total = 0, sum((folder / name).stat().st_size for name in changed)
    for name in changed:
        on_progress("send", done, total)
        store.put(folder / name, name)
        done += (folder / name).stat().st_size
    on_progress("send", done, total)
    store.put(folder / MANIFEST_NAME, MANIFEST_NAME)
    with store_errors(store.address, f"is published, but its {MARK} was not removed", "the next push removes it"):
        files.rm_file(f"{root}/{MARK}")


def _is_own_card(store: Store) -> bool:
    """Return whether no card is there, or one that flexmerge wrote and nobody has changed."""
    if CARD_NAME not in store.sizes:
        return True
    if store.sizes[CARD_NAME] > MAX_CARD_BYTES:
        return False
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CARD_NAME).write_bytes(store.read(CARD_NAME, MAX_CARD_BYTES))
        return is_own_card(Path(scratch) / CARD_NAME)


@contextmanager
def store_errors(address: str, failed: str = "was not written", then: str = "nothing was published") -> Iterator[None]:
    """Raise SourceError for whatever fails between us and the store. failed, then: what it says about the address, and
    what follows."""
    try:
        yield
    except FlexmergeError:
        raise
    except Exception as error:  # every backend raises its own errors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(
            f"{address} {failed}: {type(error).__name__}: {lines[0][:200]}; {then}",
            hint="check address and credentials, and run the command again: what was sent is not sent twice",
        ) from None
