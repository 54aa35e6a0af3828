"""The choices that a merge can make, each with the fields that it reads and no others."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import Field

from flexmerge_cli.methods.use import MethodUse
from flexmerge_cli.record import Count, Items, Record
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.size import Size


class Fit(StrEnum):
    """How a prefix of the merge order is fitted to a size."""

    TIGHT = "tight"
    """Merges are undone again where the bundle still fits."""
    PREFIX = "prefix"
    """The shortest prefix that fits, as in the paper."""


class Cluster(StrEnum):
    """What is clustered instead of following a merge order."""

    CHANNELS = "channels"
    """Each tensor by itself, all into the same number of clusters."""


class MergeWords(Record):
    """What files hold of a request: options of `merge` in the words of the command line. None: not given."""

    method: str | None = None
    steps: Items[str] | None = None
    calibrate: str | None = None
    size: str | None = None
    merges: Count | None = None
    fit: Literal["tight", "prefix"] | None = None
    """How a cut is fitted to its size."""
    cluster: Literal["channels"] | None = None
    seed: int | None = Field(default=None, ge=0)
    """The seed that `cluster` draws from; `merge_request` refuses one that is too large."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_distance: float | None = Field(default=None, ge=0)
    servable: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMethod:
    """A method for the blocks whose names match a pattern; the first match of several holds."""

    pattern: str
    """A pattern in the syntax of `fnmatch`."""
    use: MethodUse | None
    """None keeps the tasks of these blocks apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """Nothing is merged: equal tensors are stored once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The merge order is cut at a size, after a number of merges, or where the bundle is smallest."""

    use: MethodUse
    block_methods: tuple[BlockMethod, ...] = ()
    size: Size | None = None
    merges: int | None = None
    """Given instead of a size; at least 0."""
    fit: Fit = Fit.TIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """The tasks are clustered tensor by tensor."""

    use: MethodUse
    cluster: Cluster
    size: Size
    """A whole number of models: the number of clusters."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """A centre and bits per task are chosen for every tensor, from the plan alone."""

    text: str
    """`auto[:key=value,…]` with the arguments that are not at their defaults."""
    limits: Limits
    block_methods: tuple[BlockMethod, ...] = ()
    size: Size | None = None
    """The size limit. None: the smallest bundle whose predicted distances stay under the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """What an engine can serve is chosen: one base, and an adapter of low rank per task."""

    text: str
    """`lora:rank=N`."""
    rank: int
    """The largest rank of an adapter; at least 1."""
    size: Size | None = None
    """The size limit. None: adapters have that rank."""


Choice = Exact | Cut | Clusters | Auto | Servable
