"""Defines what decodes one tensor of one task, in any stored form. Each form implements `Stored`. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError

if TYPE_CHECKING:
    from flexmerge_cli.stored.packed import JoinedRows, Packed

ALL = slice(None)

Read = Callable[[StoredTensor, slice], np.ndarray]
"""Maps a part, and a slice of its elements, to their bits, one axis."""


class RouteParts(dict[str, StoredTensor]):
    """Maps part names to where they lie, for all files that one task reads. Looking up a missing part raises
    DataError."""

    def __init__(self, path: Path, task: str) -> None:
        """Begin empty. path: the path of the bundle, for errors."""
        self.path, self.task = path, task

    def __missing__(self, name: str) -> StoredTensor:
        raise DataError(f"{self.path}: `{name}` is on no file of task `{self.task}`", hint="fetch the bundle again")


class Stored(Protocol):
    """One tensor of one task, as it is stored."""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is the bits of one part, unchanged, so that a view of them can stand for it."""

    def fits(self, parts: RouteParts) -> bool:
        """Return whether its parts have the dtypes and sizes that decoding needs. Raises DataError if one is
        missing."""

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        """Decode to bits in the task's own dtype and shape. Raises DataError if the parts cannot be decoded."""


class Packable(Stored, Protocol):
    """A stored tensor any rows of which can be decoded alone."""

    @property
    def matrix(self) -> tuple[int, int]:
        """The number of rows, and of elements in each."""

    def pieces(self, parts: RouteParts) -> "dict[str, tuple[StoredTensor, int]]":
        """Map each role to its part, and the bytes that `packed` holds of it."""

    def packed(self, parts: RouteParts, read: Read) -> "Packed | JoinedRows":
        """Return the tensor in its stored bytes. Raises DataError if they cannot be decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a manifest says about how one tensor of one task is stored."""

    tensor: str
    """Its aligned name, with which the names of its parts begin."""
    unit: str
    task: str
    shape: tuple[int, ...]
    tasks: tuple[str, ...]
    """All tasks of the group."""
    dtypes: tuple[str, ...]
    """The dtype of the tensor in each of them."""
    bits: Mapping[str, float] | None
    """Bits per element for each task, if each has its own."""
    method: tuple[str, str] | None
    """The name, and the arguments as JSON."""

    @property
    def dtype(self) -> str:
        return self.dtypes[self.tasks.index(self.task)]
