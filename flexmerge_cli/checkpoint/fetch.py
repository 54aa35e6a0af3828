"""Downloads weight files of the Hub into its normal cache: in parallel, announced first, resumed after interruptions.

A file grows as `blobs/<etag>.incomplete` under the lock that the Hub's own client takes, and is renamed when it is
complete. The next run resumes what a killed run left, since the name identifies the content. The client itself then
links the blob into the snapshot. Files in Xet storage are downloaded by the client.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.hub_errors import hub_errors
from flexmerge_cli.checkpoint.place import HubFile, is_etag
from flexmerge_cli.checkpoint.ranges import patiently, stream_range
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.errors import MachineError, SourceError, UsageError
from flexmerge_cli.writing import sync

FILES_AT_ONCE = 4
SHA256 = re.compile(r"[0-9a-f]{64}")
OnProgress = Callable[[str, int, int], None]


def fetch(
    files: Iterable[RemoteFile], access: Access, on_progress: OnProgress = lambda _what, _done, _total: None
) -> None:
    """Download files to this disk, unless they are streamed. Raises SourceError, or MachineError if they do not fit."""
    named = {file.path: file for file in files}
    if access.stream is not None or not named:
        return
    wanted = [file for file in named.values() if isinstance(file, HubFile)]
    if len(wanted) < len(named):
        other = next(file for file in named.values() if not isinstance(file, HubFile))
        raise UsageError(f"{other.name} can only be streamed, not downloaded", hint="add --stream")
    blobs = {file.path: file.place.storage / "blobs" / file.etag for file in wanted}
    sizes = {blobs[file.path]: file.size for file in wanted}  # equal files share one blob, which is downloaded once
    total = sum(sizes.values())
    left = sum(max(0, size - _bytes_there(blob)) for blob, size in sizes.items())
    cache = wanted[0].place.storage.parent
    _check_disk(cache, left)
    if left:
        parts = f" ({total - left:,} bytes of them are there already)" if left < total else ""
        access.on_message(f"fetching {left:,} bytes in {len(wanted)} files from the Hub into {cache}{parts}")
    counter = _Counter(sum(file.size for file in wanted), on_progress)
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="flexmerge-fetch") as pool, no_bars():
        futures = [pool.submit(_fetch, file, blobs[file.path], counter) for file in wanted]
        try:
            for future in futures:
                future.result()
        except BaseException:
            counter.stop = True
            for future in futures:
                future.cancel()
            raise


class _Counter:
    """Counts the bytes done so far, over all files. Also ends every download if the run is aborted."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total, self._on_progress, self._lock = total, on_progress, threading.Lock()
        self._done = 0
        self.stop = False

    def check(self) -> None:
        """Raise SourceError if the run was aborted."""
        if self.stop:
            raise SourceError("the download of another file failed", hint="run the command again")

    def add(self, count: int) -> None:
        self.check()
        with self._lock:
            self._done += count
            self._on_progress("fetch", self._done, self._total)


def _fetch(file: HubFile, blob: Path, counter: _Counter) -> None:
    """Download a file. blob: where the listing says the bytes are cached. The response headers of the file take
    precedence."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    place, counted = file.place, False
    with hub_errors(place):
        if not blob.exists():
            head = patiently(lambda: get_hf_file_metadata(file.url()))
            if is_etag(head.etag) and not _is_xet(head):
                blob = blob.with_name(str(head.etag))
                lock = place.storage.parent / ".locks" / place.storage.name / f"{head.etag}.lock"
                for folder in (lock.parent, blob.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(lock):
                    if not blob.exists():
                        _download(file, file.size if head.size is None else head.size, blob, counter)
                        counted = True
        hf_hub_download(place.repository, file.name, revision=place.revision)
    if not file.path.is_file():
        raise SourceError(f"{place.source}: {file.name} is not at {file.path}", hint="run the command again")
    if not counted:
        counter.add(file.size)


def _download(file: HubFile, size: int, blob: Path, counter: _Counter) -> None:
    """Download the bytes of a blob, resuming an interrupted download."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as opened:
        if opened.tell() > size:
            opened.truncate(0)
        earlier = opened.seek(0, os.SEEK_END)
        counter.add(earlier)
        digest = _sha256(partial, earlier)

        def write(data: bytes) -> None:
            counter.add(len(data))
            digest.update(data)
            opened.write(data)

        stream_range(file.url(), earlier, size, write, max_passed_bytes=size, before_try=counter.check)
        opened.flush()
        sync(opened.fileno())
    if SHA256.fullmatch(blob.name) and digest.hexdigest() != blob.name:
        # After a power failure a file may have its length but not its bytes.
        partial.unlink()
        raise SourceError(
            f"{file.place.source}: the content of {file.name} differs from the digest that the Hub lists",
            hint="run the command again",
        )
    partial.replace(blob)


def _sha256(path: Path, num_bytes: int) -> Any:
    """Return the hash of the bytes already there, to be continued."""
    if not num_bytes:
        return hashlib.sha256()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _is_xet(metadata: object) -> bool:
    """Return whether the client would download a file from Xet storage."""
    from huggingface_hub import constants

    has = getattr(metadata, "xet_file_data", None) is not None
    return has and find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _bytes_there(blob: Path) -> int:
    for path in (blob, blob.with_name(f"{blob.name}.incomplete")):
        if path.is_file():
            return path.stat().st_size
    return 0


def _check_disk(cache: Path, needed_bytes: int) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise MachineError(
            f"{cache} has {free:,} bytes free, {needed_bytes:,} are to be fetched",
            hint="make room, or set HF_HOME to a larger disk",
        )


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the client's own progress bars while ours are shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
