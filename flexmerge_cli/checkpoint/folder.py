"""Reads the files of one model by name from a folder on this disk, and guards its links. hub.py does so for the Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.errors import DataError, FlexmergeError, SourceError

MAX_ENTRIES = 200_000  # the most files and folders of one source
WEIGHTS = "weights"  # the folder of a bundle that holds its weights
SHARED_BLOBS_MARKER = ".huggingface-shared-blobs"  # marks the store that the repositories of one Hub cache share


Skip = Callable[[str], bool]
"""Returns whether a folder, by its relative path, is not searched."""


class Folder(Protocol):
    """The place of a checkpoint."""

    @property
    def path(self) -> Path:
        """The absolute path where its files lie, or will lie once they are downloaded."""

    def files(self, skip: "Skip") -> list[str]:
        """List the relative paths of all files below it, sorted; for a folder that is skipped, its path and a slash.

        Raises DataError for a link to a folder elsewhere, and SourceError if there are too many files.
        """

    def is_file(self, name: str) -> bool: ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    def remote(self, name: str) -> RemoteFile | None:
        """Return the file if it is not on this disk; None if it is, at `path / name`. Raises DataError for a link out
        of the folder."""

    def local(self, name: str) -> Path:
        """Return the path of a small file, which is downloaded if necessary."""

    def bring(self, names: list[str]) -> None:
        """Bring many small files to this disk at once."""

    def incomplete(self, message: str) -> FlexmergeError:
        """Return the error for files that should exist but do not."""


class LocalFolder:
    """A folder on this disk."""

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        """Take a folder. follow_links: also follow links out of the folder."""
        self._path, self._follow_links = path, follow_links

    @property
    def path(self) -> Path:
        return self._path

    def _guard(self, path: Path) -> None:
        if not self._follow_links:
            guard(self._path, path)

    def files(self, skip: Skip) -> list[str]:
        found: list[str] = []
        for name in self._walk("", skip, frozenset()):
            found.append(name)
            check_count(len(found), str(self._path))
        return sorted(found)

    def _walk(self, folder: str, skip: Skip, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """Yield the paths below a folder. above: the folders around this one; a link that leads back to one of them is
        not followed."""
        status = (self._path / folder).stat()
        here = (status.st_dev, status.st_ino)
        try:
            names = [(child.name, child.is_dir()) for child in (self._path / folder).iterdir()]
        except PermissionError:
            if not folder:
                raise
            names, above = [], above | {here}
        if here in above:
            yield f"{folder}/"
            return
        for name, is_folder in names:
            path = f"{folder}/{name}" if folder else name
            if not is_folder:
                yield path
            elif skip(path):
                yield f"{path}/"
            else:
                self._guard(self._path / path)
                yield from self._walk(path, skip, above | {here})

    def is_file(self, name: str) -> bool:
        return (self._path / name).is_file()

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def remote(self, name: str) -> RemoteFile | None:
        self.local(name)
        return None

    def local(self, name: str) -> Path:
        self._guard(self._path / name)
        return self._path / name

    def bring(self, names: list[str]) -> None:
        for name in names:
            self.local(name)

    def incomplete(self, message: str) -> FlexmergeError:
        return DataError(message, hint="download the checkpoint again")


class Subfolder:
    """A folder inside another, with the links and files that the other allows."""

    def __init__(self, whole: Folder, name: str) -> None:
        self._whole, self._prefix = whole, f"{name}/"

    @property
    def path(self) -> Path:
        return self._whole.path / self._prefix

    def files(self, skip: Skip) -> list[str]:
        inside = [name for name in self._whole.files(skip) if name.startswith(self._prefix)]
        return [name.removeprefix(self._prefix) for name in inside]

    def is_file(self, name: str) -> bool:
        return self._whole.is_file(self._prefix + name)

    def size(self, name: str) -> int:
        return self._whole.size(self._prefix + name)

    def remote(self, name: str) -> RemoteFile | None:
        return self._whole.remote(self._prefix + name)

    def local(self, name: str) -> Path:
        return self._whole.local(self._prefix + name)

    def bring(self, names: list[str]) -> None:
        self._whole.bring([self._prefix + name for name in names])

    def incomplete(self, message: str) -> FlexmergeError:
        return self._whole.incomplete(message)


def inside(folder: Folder, name: str) -> Folder:
    """Return a subfolder, or the folder itself if the name is empty."""
    return Subfolder(folder, name) if name else folder


def check_count(count: int, source: str) -> None:
    """Raise SourceError if a source has more files than any model has."""
    if count > MAX_ENTRIES:
        raise SourceError(
            f"{source} holds more than {MAX_ENTRIES:,} files, and no checkpoint has as many",
            hint="give the folder that holds the model",
        )


def guard(folder: Path, path: Path) -> None:
    """Raise DataError for a symlink out of the folder, unless it leads into the blobs of the same repository in the
    Hub's cache, or from the folder of a task or of the base in a bundle to the bundle's weights."""
    below = [path, *path.parents]
    if not any(place.is_symlink() for place in below[: len(below) - 1 - len(folder.parents)]):
        return
    target, bundle = path.resolve(), bundle_of(folder)
    allowed = [folder.resolve(), *hub_blobs(folder), *([bundle / WEIGHTS] if bundle is not None else [])]
    if not any(target.is_relative_to(place) for place in allowed):
        raise DataError(
            f"{path} is a link to {target}, outside its folder",
            hint="if it is trusted, as in the store of DVC or git-annex: plan with --follow-links",
        )


def bundle_of(folder: Path) -> Path | None:
    """Return the bundle in which this is the folder of a task or of the base; None for any other folder."""
    place = folder.resolve()
    above = [place.parent.parent] if place.parent.name in ("tasks", "coded") else []
    above += [place.parent] if place.name == "base" else []
    return next((path for path in above if (path / "manifest.json").is_file() and (path / WEIGHTS).is_dir()), None)


def hub_blobs(folder: Path) -> list[Path]:
    """Return where the Hub's cache keeps the files of the snapshot that contains the folder; empty if there is none."""
    home = folder.resolve()
    for place in (home, *home.parents):
        if place.parent.name == "snapshots":
            repository = place.parent.parent
            shared = repository.parent / "blobs"
            return [repository / "blobs"] + ([shared] if (shared / SHARED_BLOBS_MARKER).is_file() else [])
    return []
