"""Parses source strings of the Hub, and says where one file of a repository lies or will lie.

`hf://org/name[@revision][:folder]`; a folder may end in the name of a weight file.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.hub_errors import hub_errors
from flexmerge_cli.checkpoint.ranges import read_range
from flexmerge_cli.errors import UsageError
from flexmerge_cli.text import expanded

PATTERN = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_remote(source: str) -> bool:
    """Return whether the string has a scheme. Without one it is always a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", source) is not None


def is_hub(source: str) -> bool:
    return source.startswith("hf://")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPlace:
    """A parsed source string."""

    repository: str
    revision: str | None
    """A branch, tag or commit. None: the default branch."""
    subfolder: str
    """The folder, or the file if one is named; empty for the whole repository."""

    @staticmethod
    def of(source: str) -> "HubPlace":
        """Parse a source string. Raises UsageError."""
        match = PATTERN.fullmatch(source)
        if match is None or ".." in [*(match[2] or "").split("/"), *(match[3] or "").split("/")]:
            raise UsageError(
                f"`{source}` is not a source that flexmerge supports", hint="write hf://org/name[@revision][:folder]"
            )
        return HubPlace(repository=match[1], revision=match[2], subfolder=(match[3] or "").strip("/"))

    @property
    def source(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{at}{f':{self.subfolder}' if self.subfolder else ''}"

    @property
    def unpinned(self) -> str:
        return replace(self, revision=None).source

    @property
    def is_pinned(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    @property
    def file(self) -> str | None:
        """The weight file that is named instead of a folder."""
        name = self.subfolder.rpartition("/")[2]
        return name if name.endswith(WEIGHT_SUFFIXES) else None

    @property
    def folder(self) -> str:
        return self.subfolder if self.file is None else self.subfolder.rpartition("/")[0]

    @property
    def storage(self) -> Path:
        """The folder of the repository in the Hub's cache."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cache = expanded(constants.HF_HUB_CACHE).absolute()
        return cache / repo_folder_name(repo_id=self.repository, repo_type="model")

    @property
    def snapshot(self) -> Path:
        """The folder where the files of a pinned place lie, or will lie."""
        assert self.revision is not None
        return self.storage / "snapshots" / self.revision / self.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository that is not on this disk."""

    place: HubPlace
    """The place, pinned to a commit."""
    name: str
    """The path in the repository."""
    size: int
    etag: str
    """The name of its blob in the cache: the sha256 for a file in LFS, otherwise git's sha1."""
    path: Path

    def read_range(self, start: int, stop: int) -> bytes:
        with hub_errors(self.place):
            return read_range(self.url(), start, stop)

    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.place.repository, self.name, revision=self.place.revision)


def is_etag(text: object) -> bool:
    """Return whether a text can name a blob of the cache."""
    return isinstance(text, str) and re.fullmatch(r"[\w-]{1,128}", text) is not None
