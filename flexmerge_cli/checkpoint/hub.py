"""Opens sources `hf://org/name[@revision][:folder]`: the files of a Hub repository, cached in the normal Hub cache.

Opening a source pins it to a commit, downloads small files, and reads the headers of weights by range. `fetch`
(fetch.py) downloads the weights. Nothing that the cache holds is requested again.
"""

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.candidates import Candidates
from flexmerge_cli.checkpoint.choose import variants
from flexmerge_cli.checkpoint.contents import Contents, contents_of, is_left
from flexmerge_cli.checkpoint.folder import Folder, LocalFolder, Skip, inside
from flexmerge_cli.checkpoint.hub_errors import hub_errors, offline
from flexmerge_cli.checkpoint.place import COMMIT, HubFile, HubPlace, is_etag, is_hub
from flexmerge_cli.checkpoint.ranges import http_error, patiently
from flexmerge_cli.checkpoint.unclear import inner
from flexmerge_cli.checkpoint.weights import missing_shards
from flexmerge_cli.errors import DataError, FlexmergeError, MachineError, SourceError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.text import is_text
from flexmerge_cli.writing import write_file

FILES_AT_ONCE = 8
METADATA_TIMEOUT = 30  # seconds
# The most entries of one listing. The Hub has 1,000 entries per page; the largest repositories have some 100,000 files.
MAX_ENTRIES = 200_000
MAX_PAGES = 1_000
MAX_PAGE_BYTES = 16 << 20
LISTING_SECONDS = 300
DO_NOT_USE = "do not use this repository; or fetch it with `hf download`, and give its folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPlace:
    """A source that was found."""

    source: str
    """The place, pinned to a commit."""
    folder: Folder
    file: str | None


def is_offline(access: Access) -> bool:
    from huggingface_hub import constants

    return access.offline or bool(constants.HF_HUB_OFFLINE)


def open_hub(source: str, access: Access, needs: Collection[str] | None = None) -> OpenPlace:
    """Find the commit and its files. needs: the side files and the subfolders with weights (path and a slash) that make
    a pinned snapshot on this disk complete."""
    place = HubPlace.of(source)
    with hub_errors(place):
        if is_offline(access):
            return _cached(place, access)
        if place.is_pinned and needs is not None and _suffices(place, needs, access):
            return OpenPlace(source=place.source, folder=CachedFolder(place), file=place.file)
        try:
            pinned = pin(place)
            folder = HubFolder(pinned, list_files(pinned, recursive=True))
            return OpenPlace(source=pinned.source, folder=folder, file=place.file)
        except Exception as error:
            return _or_cached(error, lambda: _cached(place, access), access)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTree:
    """All files below a folder of a repository, at one commit."""

    source: str
    """The place, pinned to a commit."""
    path: Path
    """The local path where the files lie, or will lie."""
    files: dict[str, HubFile]
    """The files by their paths below the folder; empty if the Hub was not asked."""

    def local(self, name: str) -> Path:
        """Return the path of a small file, which is downloaded if necessary."""
        from huggingface_hub import hf_hub_download

        if not (self.path / name).is_file():
            file = self.files[name]
            with hub_errors(file.place):
                hf_hub_download(file.place.repository, file.name, revision=file.place.revision)
        return self.path / name


def checkpoints_in(source: str, access: Access) -> Candidates:
    """List the models in a repository with one folder per model, as pinned sources, and what else there is."""
    tree = open_tree(source, access)
    names = list(tree.files) or [str(path.relative_to(tree.path)) for path in tree.path.rglob("*") if path.is_file()]
    folders: dict[str, list[str]] = {}
    found = Candidates()
    for name in sorted(name for name in names if not name.startswith(".")):
        folder, slash, rest = name.partition("/")
        if slash:
            folders.setdefault(folder, []).append(rest)
        else:
            found.add_file(name)
    for folder, below in folders.items():
        direct = [name for name in below if "/" not in name]
        if contents_of(below, variant=access.variant).weights or variants(direct):
            found.models[folder] = inner(tree.source, folder)
        else:
            found.add_folder(folder, below)
    return found


def list_names(source: str, access: Access) -> list[str]:
    """List the files and folders directly in a folder of a repository; none if the place names a file."""
    place = HubPlace.of(source)
    if place.file is not None:
        return []

    def cached() -> list[str]:
        return [child.name for child in _cached_place(place).snapshot.iterdir()]

    with hub_errors(place):
        if is_offline(access):
            return sorted(cached())
        try:
            pinned = pin(place)
            return sorted(entry.path.rpartition("/")[2] for entry in list_files(pinned))
        except Exception as error:
            return _or_cached(error, cached, access)


def open_tree(source: str, access: Access) -> HubTree:
    """List a repository with all its folders."""
    place = HubPlace.of(source)

    def cached() -> HubTree:
        pinned = _cached_place(place)
        return HubTree(source=pinned.source, path=pinned.snapshot, files={})

    with hub_errors(place):
        if is_offline(access):
            return cached()
        try:
            pinned = pin(place)
            found = [hub_file(pinned, listed) for listed in list_files(pinned, recursive=True) if _is_file(listed)]
        except Exception as error:
            return _or_cached(error, cached, access)
    names = {str(file.path.relative_to(pinned.snapshot)): file for file in found if _is_inside(pinned, file)}
    return HubTree(source=pinned.source, path=pinned.snapshot, files=names)


def pin(place: HubPlace) -> HubPlace:
    """Pin a place to the commit that its revision names now. Raises what the Hub's client raises."""
    from huggingface_hub import HfApi

    if place.is_pinned:
        return place
    info = HfApi().model_info(place.repository, revision=place.revision, timeout=METADATA_TIMEOUT)
    if info.sha is None or not COMMIT.fullmatch(info.sha):
        raise ValueError(f"the response names {info.sha!r}, which is not a commit")
    _remember(place, info.sha)
    return replace(place, revision=info.sha)


def pinned_source(source: str, access: Access) -> str:
    """Pin a Hub source to its current commit; return any other source unchanged."""
    if not is_hub(source):
        return source
    place = HubPlace.of(source)
    with hub_errors(place):
        return _cached_place(place).source if is_offline(access) else pin(place).source


def list_files(place: HubPlace, *, recursive: bool = False) -> list[Any]:
    """List the contents of the folder of a pinned place, as huggingface_hub's RepoFile and RepoFolder.

    Reads page by page like the client itself, but within bounds, and from no other host, which would get the token.
    Raises what the Hub's client raises, and SourceError for an endless listing or one that leads to another host.
    """
    from huggingface_hub import constants
    from huggingface_hub.hf_api import RepoFile, RepoFolder

    folder = f"/{quote(place.folder)}" if place.folder else ""
    tree = f"{constants.ENDPOINT}/api/models/{place.repository}/tree/{place.revision}{folder}"
    url: str | None = f"{tree}?recursive={recursive}&expand=False"
    found: list[Any] = []
    deadline = time.monotonic() + LISTING_SECONDS
    for _ in range(MAX_PAGES):
        if url is None:
            return found
        if urlsplit(url)[:2] != urlsplit(constants.ENDPOINT)[:2]:
            raise SourceError(f"the listing of {place.source} continues at {url}, on another host", hint=DO_NOT_USE)
        entries, url = patiently(partial(_page, url, deadline))
        found += [(RepoFile if entry["type"] == "file" else RepoFolder)(**entry) for entry in entries]
        if len(found) > MAX_ENTRIES or time.monotonic() > deadline:
            break
    raise SourceError(
        f"the listing of {place.source} does not end: {len(found):,} entries in {MAX_PAGES:,} pages",
        hint=DO_NOT_USE,
    )


def _page(url: str, deadline: float) -> tuple[list[dict[str, Any]], str | None]:
    """Read one page of a listing, and the address of the next."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    data = bytearray()
    with http_stream_backoff("GET", url, headers=build_hf_headers(), timeout=METADATA_TIMEOUT) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > MAX_PAGE_BYTES or time.monotonic() > deadline:
                raise SourceError(f"{url}: a page of {len(data):,} bytes or more, that does not end", hint=DO_NOT_USE)
        following = response.links.get("next", {}).get("url")
    entries = parse_json(bytes(data))
    if not isinstance(entries, list):
        raise ValueError("the listing is not a list")
    return entries, urljoin(url, following) if following else None


def hub_file(place: HubPlace, listed: Any) -> HubFile:
    """Describe a file of a listing. listed: a RepoFile from `list_files`."""
    inside = f"{place.folder}/" if place.folder else ""
    etag = listed.lfs.sha256 if listed.lfs is not None else listed.blob_id
    if type(listed.size) is not int or listed.size < 0 or not is_etag(etag):
        raise ValueError(f"the listing of {listed.path[:200]!r} is malformed")
    path = place.snapshot / listed.path.removeprefix(inside)
    return HubFile(place=place, name=listed.path, size=listed.size, etag=etag, path=path)


class HubFolder:
    """A folder of a repository at one commit."""

    def __init__(self, place: HubPlace, listed: list[Any]) -> None:
        inside = f"{place.folder}/" if place.folder else ""
        names = {entry.path.removeprefix(inside): entry for entry in listed}
        unsound = [name for name in names if {"", ".", ".."} & set(name.split("/")) or not is_text(name)]
        if unsound:
            raise DataError(f"{place.source} lists `{unsound[0][:200]!r}`", hint="do not use this repository")
        self._place = place
        self._files = {name: hub_file(place, entry) for name, entry in names.items() if _is_file(entry)}

    @property
    def path(self) -> Path:
        return self._place.snapshot

    def files(self, skip: Skip) -> list[str]:
        return sorted(self._files)

    def is_file(self, name: str) -> bool:
        return name in self._files

    def size(self, name: str) -> int:
        return self._files[name].size

    def remote(self, name: str) -> HubFile | None:
        file = self._files.get(name)
        if file is None:
            raise SourceError(
                f"{self._place.source}: no file `{name}`",
                hint=f"flexmerge inspect {replace(self._place, subfolder='').source}",
            )
        return None if file.path.is_file() else file

    def local(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        file = self._files[name]
        if not file.path.is_file():
            with hub_errors(self._place):
                hf_hub_download(self._place.repository, file.name, revision=self._place.revision)
        return file.path

    def bring(self, names: list[str]) -> None:
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for _ in pool.map(self.local, names):
                pass

    def incomplete(self, message: str) -> FlexmergeError:
        return DataError(message, hint=f"the repository is incomplete: use another revision of {self._place.unpinned}")


class CachedFolder(LocalFolder):
    """The part of a repository that the Hub's cache holds."""

    def __init__(self, place: HubPlace) -> None:
        super().__init__(place.snapshot)
        self._place = place

    def incomplete(self, message: str) -> FlexmergeError:
        return offline(self._place, f"is not whole in the Hub's cache: {message}")


def _cached(place: HubPlace, access: Access) -> OpenPlace:
    """Open a place from the cache alone."""
    pinned = _cached_place(place)
    folder = CachedFolder(pinned)
    if pinned.file is not None and not folder.is_file(pinned.file):
        raise offline(place, "is not in the Hub's cache")
    if pinned.file is None and not _contents(folder, access).weights and not variants(_direct(folder)):
        raise offline(place, "has no weights in the Hub's cache")
    return OpenPlace(source=pinned.source, folder=folder, file=pinned.file)


def _cached_place(place: HubPlace) -> HubPlace:
    """Pin a place to the commit that the cache knows for its revision."""
    pinned = place
    if not place.is_pinned:
        reference = place.storage / "refs" / (place.revision or "main")
        if not reference.is_file():
            raise offline(place, "is not in the Hub's cache")
        pinned = replace(place, revision=reference.read_text().strip())
    if not pinned.is_pinned or not pinned.snapshot.is_dir():
        raise offline(place, "is not in the Hub's cache")
    return pinned


Found = TypeVar("Found", OpenPlace, HubTree, list[str])


def _or_cached(error: Exception, cached: Callable[[], Found], access: Access) -> Found:
    """Fall back to the cache if the Hub cannot be reached; raise any other error."""
    if not _is_unreachable(error):
        raise error
    try:
        found = cached()
    except SourceError:
        raise error from None
    what = "" if isinstance(found, list) else f": {found.source}"
    access.on_message(f"the Hub cannot be reached; what the cache has is used{what}")
    return found


def _is_file(listed: Any) -> bool:
    return hasattr(listed, "blob_id")


def _is_inside(place: HubPlace, file: HubFile) -> bool:
    """Return whether a listed path stays in its folder."""
    return is_text(file.name) and ".." not in file.name.split("/") and file.path.is_relative_to(place.snapshot)


def _suffices(place: HubPlace, needs: Collection[str], access: Access) -> bool:
    """Return whether the snapshot on this disk holds the weights, index and shards, and these files."""
    snapshot = place.snapshot
    if not snapshot.is_dir() or not all((snapshot / name).exists() for name in needs):
        return False
    folder = CachedFolder(place)
    if place.file is not None:
        return folder.is_file(place.file)
    if access.variant is not None and access.variant not in variants(_direct(folder)):
        return False  # the repository may have the variant although the cache does not
    weights = _contents(folder, access).weights
    parts = {name.removesuffix("/") for name in needs if name.endswith("/")}
    places = [(inside(folder, part), file.rpartition("/")[2]) for part, file in weights.items()]
    return bool(weights) and parts <= set(weights) and not any(missing_shards(*place) for place in places)


def _contents(folder: LocalFolder, access: Access) -> Contents:
    names = folder.files(lambda name: is_left(name, access.ignore))
    names = [name for name in names if name.endswith("/") or folder.is_file(name)]  # not links to blobs that are gone
    return contents_of(names, variant=access.variant, ignore=access.ignore)


def _direct(folder: LocalFolder) -> list[str]:
    return [child.name for child in folder.path.iterdir()]


def _remember(place: HubPlace, commit: str) -> None:
    """Record in the cache what a branch names, as the client's own downloads do, so that it is known offline."""
    reference = place.storage / "refs" / (place.revision or "main")
    with suppress(OSError, MachineError):  # a read-only cache may still hold everything needed
        if not (reference.is_file() and reference.read_text() == commit):
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_file(reference, commit)


def _is_unreachable(error: Exception) -> bool:
    """Return whether there was no response at all, or one that says the Hub is down."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500)
    return isinstance(error, (http_error(), OSError)) and not isinstance(error, FlexmergeError)
