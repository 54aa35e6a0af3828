"""Defines what every stored form answers about one tensor of one task. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flexmerge_cli.checkpoint.rows import Runs
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


class LowRankSum(NamedTuple):
    """A tensor as a dense part plus the product of two thin matrices."""

    centre: StoredTensor
    rank: int = 0
    """0 if nothing is added."""
    factors: tuple[StoredTensor, StoredTensor] | None = None
    """Left [m, r] and right [r, n]; None if nothing is added, or they lie in a kept adapter's own files."""


class Experts(NamedTuple):
    """The weight of a layer that computes centre · x + Σ left_k · right_k · x over the experts that a gate chooses."""

    centre: StoredTensor
    factors: tuple[tuple[StoredTensor, StoredTensor], ...]
    """Left [m, r] and right [r, n] of each task of the group."""
    top: int
    """The number of experts that are added."""


class Stored(ABC):
    """One tensor of one task, as it is stored. A form overrides what holds for it."""

    __slots__ = ()

    decodes_on_devices: bool = False
    """Whether a device that uses the tensor can decode what `packed` gives."""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is the bits of one part, unchanged, so that a view of them can stand for it."""
        return False

    def experts(self, parts: RouteParts) -> Experts | None:
        """Return the experts of a layer that no tensor stands for, since a gate chooses among them for each input; None
        for any other tensor. What `decode` gives is then the centre with the task's own expert."""
        return None

    @property
    def dense(self) -> StoredTensor | None:
        """The task's own part that holds the tensor as it is, or in a wider dtype."""
        return None

    @property
    def base(self) -> StoredTensor | None:
        """The part with the base's own bits, if it is known to be one."""
        return None

    @property
    def packable(self) -> "Packable | None":
        """The tensor if any of its rows can be decoded alone."""
        return None

    def low_rank_sum(self, parts: RouteParts) -> LowRankSum | None:
        """Return the tensor as a sum that an engine of LoRAs can serve; None if it is no such sum."""
        return None

    @abstractmethod
    def fits(self, parts: RouteParts) -> bool:
        """Return whether its parts have the dtypes and sizes that decoding needs. Raises DataError if one is
        missing."""

    @abstractmethod
    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        """Decode to bits in the task's own dtype and shape. Raises DataError if the parts cannot be decoded."""


class Packable(Stored):
    """A stored tensor any rows of which can be decoded alone."""

    __slots__ = ()

    @property
    def packable(self) -> "Packable | None":
        return self

    @property
    @abstractmethod
    def matrix(self) -> tuple[int, int]:
        """The number of rows, and of elements in each."""

    @abstractmethod
    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        """Map each role to its part, and the bytes that `packed` holds of it."""

    @abstractmethod
    def packed(self, parts: RouteParts, read: Read) -> "Packed | JoinedRows":
        """Return the tensor in its stored bytes. Raises DataError if they cannot be decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a manifest says about how one tensor of one task is stored."""

    form: str
    """The word of its form."""
    tensor: str
    """Its aligned name, with which the names of its parts begin."""
    task: str
    shape: tuple[int, ...]
    tasks: tuple[str, ...]
    """All tasks of the group."""
    dtypes: tuple[str, ...]
    """The dtype of the tensor in each of them."""
    dense: StoredTensor | None = None
    """The part on the task's route that has the tensor's own name."""
    unit: str = ""
    """The unit of the group, if it is in one."""
    bits: Mapping[str, float] | None = None
    """Bits per element for each task, if each has its own."""
    method: tuple[str, str] | None = None
    """The name, and the arguments as JSON."""
    change: Callable[[StoredTensor | None], StoredTensor] | None = None
    """Makes a kept adapter's tensor of the base's; None if the adapter leaves that as it is."""
    needs_base: bool = True
    """Whether `change` needs the base's tensor."""
    pieces: tuple[Stored, ...] = ()
    """The tensors that it is put together from."""
    dim: int = 0
    """The axis of the pieces of a split tensor."""
    common: Runs = ()
    """The rows of a joined tensor at which its first piece stands."""

    @property
    def dtype(self) -> str:
        return self.dtypes[self.tasks.index(self.task)]
