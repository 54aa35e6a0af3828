"""Opens sources `s3://`, `gs://`, `https://` and any other that fsspec supports, and reads their weights in place.

Small files are copied into a folder that is removed when the process ends; weights are never stored. The backends of
the schemes are optional dependencies (`pip install 'flexmerge-cli[stream]'`).
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.choose import WEIGHT_FILES, WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.contents import COMPOSITES, MODULES, PIPELINE, is_portable
from flexmerge_cli.checkpoint.folder import Skip
from flexmerge_cli.checkpoint.ranges import TRIES, WAIT_SECONDS, allowed_seconds
from flexmerge_cli.checkpoint.web_answers import bounded_response
from flexmerge_cli.errors import DataError, FlexmergeError, SourceError, UsageError, without_secrets
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.text import is_text
from flexmerge_cli.writing import write_file

MAX_SMALL_BYTES = 256 << 20  # of a file other than weights
COPY_BYTES = 32 << 20  # of one request
MAX_ENTRIES = 200_000
MAX_FOLDERS = 32  # that are searched on a server without listings
LISTING_SECONDS = 300.0
METADATA_SECONDS = 30.0

# The side files to look for on a web server that does not list folders.
USUAL_NAMES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "bpe.codes", "scheduler_config.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "README.md", "LICENSE",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlFile:
    """A file that fsspec can reach."""

    name: str
    """The address of the file."""
    size: int
    path: Path
    files: Any
    """The fsspec file system."""

    def read_range(self, start: int, stop: int) -> bytes:
        data = read_bytes(self.files, self.name, start, stop)
        if len(data) != stop - start:
            raise SourceError(
                f"{self.name} does not answer requests for a range: {stop - start:,} bytes were asked for, "
                f"{len(data):,} came",
                hint="copy the checkpoint to this disk, and give its folder",
            )
        return data


def read_bytes(files: Any, url: str, start: int, stop: int) -> bytes:
    """Read bytes [start, stop), or as many of them as there are, in a time that is linear in their number.

    A broken connection is retried. Raises SourceError.
    """
    tries, seconds = 0, allowed_seconds(stop - start)
    deadline = time.monotonic() + seconds
    while True:
        try:
            return bytes(files.cat_file(url, start=start, end=stop, **_within(files, deadline - time.monotonic())))
        except FlexmergeError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise url_error(url, error) from None
        except Exception as error:  # every backend raises its own errors
            if time.monotonic() >= deadline:
                raise SourceError(
                    f"{url} sends too slowly: {stop - start:,} bytes did not come in {seconds:,.0f} s",
                    hint="try again, or copy the checkpoint to this disk",
                ) from None
            tries += 1
            if tries >= TRIES:
                raise url_error(url, error) from None
            time.sleep(WAIT_SECONDS * 2 ** (tries - 1))


def _within(files: Any, seconds: float) -> dict[str, float]:
    """Return the argument that bounds the seconds of a call, for the file systems that take it: all that use a
    network."""
    return {"timeout": max(seconds, 0.001)} if getattr(files, "async_impl", False) else {}


class UrlFolder:
    """The files at an address."""

    def __init__(self, url: str, files: Any) -> None:
        self._url, self._files = url.rstrip("/"), files
        scheme, _, rest = self._url.partition("://")
        segments = [part for part in re.split(r"[/\\]", rest) if part not in ("", ".", "..")]
        self._path = Path(_temporary().name, scheme, *segments)
        self._sizes: dict[str, int | None] = {}
        """The files known to exist, with their sizes; None if the size is not known yet."""
        self._listed: set[str] | None = None

    @property
    def path(self) -> Path:
        return self._path

    def files(self, skip: Skip) -> list[str]:
        if self._listed is None:
            self._listed = set()
            deadline = time.monotonic() + LISTING_SECONDS
            with url_errors(self._url):
                self._list("", skip, deadline)
                if not self._listed:
                    self._look_around()
        return sorted(self._listed)

    def is_file(self, name: str) -> bool:
        return name in self._sizes or self._look(name)

    def size(self, name: str) -> int:
        size = self._reported(name)
        if size is None:
            raise SourceError(
                f"{self._url}/{name}: the server does not report its size", hint="copy the checkpoint to this disk"
            )
        return size

    def remote(self, name: str) -> UrlFile:
        if not self.is_file(name):
            raise SourceError(f"{self._url}: no file `{name}`", hint="check the address")
        return UrlFile(name=f"{self._url}/{name}", size=self.size(name), path=self._path / name, files=self._files)

    def local(self, name: str) -> Path:
        path = self._path / name
        if not path.is_file():
            # A server may send more than it reported, without end; many answer a range request for an empty file with
            # an error.
            size = self._reported(name)
            most = MAX_SMALL_BYTES if size is None else min(size, MAX_SMALL_BYTES)
            data = read_bytes(self._files, f"{self._url}/{name}", 0, most + 1) if size != 0 else b""
            if len(data) > MAX_SMALL_BYTES:
                raise DataError(
                    f"{self._url}/{name} has more than {MAX_SMALL_BYTES:,} bytes, which is too much beside weights",
                    hint="copy the checkpoint to this disk, without that file",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
        return path

    def bring(self, names: list[str]) -> None:
        for name in names:
            self.local(name)

    def copy(self, name: str, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Copy a large file to this disk, in pieces."""
        remote = self.remote(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, remote.size, COPY_BYTES):
                data = remote.read_range(start, min(start + COPY_BYTES, remote.size))
                file.write(data)
                on_bytes(len(data))

    def incomplete(self, message: str) -> FlexmergeError:
        return DataError(message, hint=f"the checkpoint at {self._url} is incomplete: upload it again")

    def _reported(self, name: str) -> int | None:
        """Return the size of a file, if the server reports it."""
        size = self._sizes.get(name)
        return self._sizes[name] if size is None and self._look(name) else size

    def _list(self, folder: str, skip: Skip, deadline: float) -> None:
        """List a folder and those in it. An address without a listing is not an error."""
        assert self._listed is not None
        try:
            seconds = _within(self._files, deadline - time.monotonic())
            found = self._files.ls(f"{self._url}/{folder}".rstrip("/"), detail=True, **seconds)
        except (FileNotFoundError, NotADirectoryError):
            found = []
        if len(self._listed) + len(found) > MAX_ENTRIES:
            raise SourceError(
                f"{self._url} lists {len(self._listed) + len(found):,} files, and no checkpoint has more than "
                f"{MAX_ENTRIES:,}",
                hint="give the folder that holds the model",
            )
        for entry in found:
            last = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if not is_text(last) or set(last) & set("\\?#") or last in ("", ".", ".."):
                continue
            name = f"{folder}/{last}" if folder else last
            if entry.get("type") != "directory":
                self._sizes[name] = entry.get("size")
                self._listed.add(name)
            elif skip(name):
                self._listed.add(f"{name}/")
            else:
                self._list(name, skip, deadline)

    def _look_around(self) -> None:
        """Look for the usual files of models, on a server without listings."""
        assert self._listed is not None
        names = [name for name in (*WEIGHT_FILES, *USUAL_NAMES, *COMPOSITES) if self._look(name)]
        folders: list[str] = []
        if MODULES in names:
            modules = _json(self.local(MODULES), list)
            folders += [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
        if PIPELINE in names:
            folders += [name for name in _json(self.local(PIPELINE), dict) if not name.startswith("_")]
        for folder in dict.fromkeys(folders[:MAX_FOLDERS]):
            if is_portable(folder):
                names += [f for name in (*WEIGHT_FILES, *USUAL_NAMES) if self._look(f := f"{folder}/{name}")]
        self._listed |= set(names)

    def _look(self, name: str) -> bool:
        """Return whether a file exists that no listing has shown."""
        try:
            with url_errors(f"{self._url}/{name}", missing=FileNotFoundError):
                info = self._files.info(f"{self._url}/{name}", **_within(self._files, METADATA_SECONDS))
        except FileNotFoundError:
            return False
        if info.get("type") == "directory":
            return False
        if info.get("partial") is False:
            raise SourceError(
                f"{self._url}/{name}: the server does not support range requests", hint="copy it to this disk"
            )
        self._sizes[name] = info.get("size")
        return True


def open_url(source: str, access: Access) -> tuple[UrlFolder, str | None]:
    """Return the folder and the named weight file, if any. Raises SourceError, or UsageError for an unknown scheme."""
    files, _ = open_store(source, access)
    name = source.rstrip("/").rpartition("/")[2]
    if name.endswith(WEIGHT_SUFFIXES):
        return UrlFolder(source.rstrip("/").rpartition("/")[0], files), name
    return UrlFolder(source, files), None


def open_store(source: str, access: Access) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it. Raises like `open_url`."""
    if access.offline:
        raise SourceError(
            f"{source} is not on this disk, and --offline forbids network access", hint="leave out --offline"
        )
    if not is_text(source):
        raise UsageError(f"{source!r} is not an address", hint="write s3://bucket/folder")
    if without_secrets(source) != source:
        raise UsageError(
            f"{source}: the address that was given has a user, a password or a query in it, which a plan would keep",
            hint="put credentials into ~/.netrc or the environment, or copy the checkpoint to this disk",
        )
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    scheme = source.partition("://")[0]
    try:
        options = {}
        if scheme in ("http", "https"):
            options["client_kwargs"] = conf.get(scheme, {}).get("client_kwargs", {}) | {
                "response_class": bounded_response()
            }
        files, path = url_to_fs(source, **options)
    except ImportError as error:
        raise SourceError(f"{source}: {error}", hint="pip install 'flexmerge-cli[stream]'") from None
    except ValueError as error:
        raise UsageError(
            f"`{source}` is not a source that flexmerge supports: {error}",
            hint="write hf://org/name[@revision][:folder]",
        ) from None
    except Exception as error:  # a backend that finds no credentials, or no such host
        raise url_error(source, error) from None
    return files, str(path)


def _json(path: Path, kind: type) -> Any:
    """Return the value of a small JSON file; empty if it is not of this kind."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError:
        return kind()
    return value if isinstance(value, kind) else kind()


@contextmanager
def url_errors(url: str, missing: type[Exception] | None = None) -> Iterator[None]:
    """Turn any error of a backend into SourceError, except `missing`."""
    try:
        yield
    except FlexmergeError:
        raise
    except Exception as error:  # every backend raises its own errors
        if missing is not None and isinstance(error, missing):
            raise
        raise url_error(url, error) from None


def url_error(url: str, error: Exception) -> SourceError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, FileNotFoundError):
        return SourceError(f"nothing at {url}", hint="check the address")
    hint = "check address and credentials" if isinstance(error, PermissionError) else "check the connection, try again"
    return SourceError(f"{url} cannot be read: {type(error).__name__}: {lines[0][:200]}", hint=hint)


def new_folder() -> Path:
    """Make an empty folder, which is removed when the process ends."""
    return Path(mkdtemp(dir=_temporary().name))


@cache
def _temporary() -> "TemporaryDirectory[str]":
    """Return a folder for small files, which is removed when the process ends."""
    return TemporaryDirectory(prefix="flexmerge-")
