"""One tensor of a checkpoint: what it is and where its bytes lie. No I/O."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.stream import StreamedFile


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor on disk."""

    name: str
    """As in its own file."""
    dtype: str
    """As safetensors spells it, a key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte in the file."""
    strides: tuple[int, ...] | None = None
    """In elements; None if row-major without gaps, as everything in a safetensors file is."""
    stream: "StreamedFile | None" = field(default=None, compare=False, repr=False)
    """Where its bytes are read from instead of from `path`."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.item_bytes
