"""The files of one model by name: a folder on this disk, with links guarded. The Hub's is in hub.py."""

from pathlib import Path
from typing import Protocol

from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.errors import DataError, FlexmergeError

SHARED_BLOBS_MARKER = ".huggingface-shared-blobs"  # of the store that repositories of one Hub cache share


class Folder(Protocol):
    """The place of a checkpoint."""

    @property
    def path(self) -> Path:
        """The absolute path where its files lie, or will lie once they are downloaded."""

    def entries(self) -> list[str]:
        """Names of the files and folders directly in it, sorted."""

    def is_file(self, name: str) -> bool: ...

    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    def remote(self, name: str) -> RemoteFile | None:
        """The file if it is not on this disk; None if it is, at `path / name`. Raises DataError for a link out of the
        folder."""

    def local(self, name: str) -> Path:
        """The path of a small file, downloaded if necessary."""

    def bring(self, names: list[str]) -> None:
        """The paths of many small files at once."""

    def incomplete(self, message: str) -> FlexmergeError:
        """The error for files that should exist."""


class LocalFolder:
    """A folder on this disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    def entries(self) -> list[str]:
        return sorted(child.name for child in self._path.iterdir())

    def is_file(self, name: str) -> bool:
        return (self._path / name).is_file()

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def remote(self, name: str) -> RemoteFile | None:
        self.local(name)
        return None

    def local(self, name: str) -> Path:
        guard(self._path, self._path / name)
        return self._path / name

    def bring(self, names: list[str]) -> None:
        for name in names:
            self.local(name)

    def incomplete(self, message: str) -> FlexmergeError:
        return DataError(message, hint="download the checkpoint again")


def guard(folder: Path, path: Path) -> None:
    """Refuse symlinks out of the folder, except into the blobs of the same repository in the Hub's cache."""
    if not path.is_symlink():
        return
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in [folder.resolve(), *hub_blobs(folder)]):
        raise DataError(
            f"{path} is a link to {target}, outside its folder", hint="copy the file into the folder if it is trusted"
        )


def hub_blobs(folder: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of the snapshot that contains the folder; empty if there is none."""
    home = folder.resolve()
    for place in (home, *home.parents):
        if place.parent.name == "snapshots":
            repository = place.parent.parent
            shared = repository.parent / "blobs"
            return [repository / "blobs"] + ([shared] if (shared / SHARED_BLOBS_MARKER).is_file() else [])
    return []
