"""Says where the weights of a family lie. Nothing here needs torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from flexmerge_cli.checkpoint.tensor import StoredTensor

BASE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The tensors of the base and of each task, by aligned name."""

    base: Mapping[str, StoredTensor]
    tasks: tuple[Mapping[str, StoredTensor], ...]
    describe: tuple[str, ...]
    """What to call each task, and last the base, in an error."""
