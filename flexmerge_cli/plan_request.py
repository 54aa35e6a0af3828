"""What `plan` is asked. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexmerge_cli.allocation.plan_records import Statistics
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """How blocks are made and merged; DESIGN words."""

    blocks: str = "component"
    """component, layer, tensor, model, or a path to one's own rules.yaml."""
    linkage: Linkage = Linkage.COMPLETE
    strategy: Strategy = Strategy.GREEDY
    similarity: Similarity = Similarity.COSINE
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `plan` is asked."""

    base: str
    tasks: Mapping[str, str]
    """Name -> source."""
    order: OrderSettings = field(default_factory=OrderSettings)
    private: tuple[str, ...] = ()
    """Name patterns of tensors that stay apart."""
    merge_heads: bool = False
    statistics: Statistics = "all"
    """`gram` leaves out what `--method auto` needs."""
    adapters: Adapters = "keep"
    """What becomes of tasks that are PEFT adapters."""
    assume_base: bool = False
    """Take the base for an adapter's own even if it names another."""
    relative_to: Path = field(default_factory=Path)
    """Folder that relative sources are relative to."""
    access: Access = ONLINE
