"""The request of `plan`, checked when it is made. The command line, recipes and Python use the same words. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, get_args

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.order.linkage import Linkage, check_settings
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.text import is_text

Statistics = Literal["all", "gram"]
"""The statistics to measure: all, or only those that a merge order needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """How blocks are made and merged. Enums can be given as words: `OrderSettings(linkage="average")`.

    Raises UsageError for an unknown word, for a linkage and a similarity that do not go together, and for a seed that
    nothing would draw from, or that no plan could hold.
    """

    blocks: str = "component"
    """`component`, `layer`, `tensor`, `model`, or a path to your own rules.yaml."""
    linkage: Linkage = Linkage.COMPLETE
    strategy: Strategy = Strategy.GREEDY
    similarity: Similarity = Similarity.COSINE
    seed: int = 0
    """The seed of strategy `random`, the only one that draws; at least 0."""

    def __post_init__(self) -> None:
        kinds: dict[str, type[StrEnum]] = {"linkage": Linkage, "strategy": Strategy, "similarity": Similarity}
        for name, kind in kinds.items():
            object.__setattr__(self, name, kind(known_word(list(kind), getattr(self, name), name)))
        check_settings(self.linkage, self.similarity)
        if self.seed != 0 and self.strategy is not Strategy.RANDOM:
            raise UsageError(
                f"--seed {self.seed} has no effect with --strategy {self.strategy}, which draws nothing",
                hint="add --strategy random, or leave --seed out",
            )
        require_seed(self.seed)


def require_seed(seed: int) -> None:
    """Raise UsageError for a seed that no file could hold."""
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed {seed} is outside [0, 2^63)", hint="give a smaller number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What `plan` is to do. Raises UsageError for an unknown word."""

    base: str
    tasks: Mapping[str, str]
    """Maps each name to its source."""
    order: OrderSettings = field(default_factory=OrderSettings)
    private: tuple[str, ...] = ()
    """Name patterns of tensors that stay apart."""
    merge_heads: bool = False
    statistics: Statistics = "all"
    """`gram` leaves out what `--method auto` needs."""
    adapters: Adapters = "keep"
    """How tasks that are PEFT adapters are treated."""
    assume_base: bool = False
    """Accept the base as an adapter's own even if the adapter names another."""
    relative_to: Path = field(default_factory=Path)
    """The folder that relative sources are relative to."""
    access: Access = ONLINE

    def __post_init__(self) -> None:
        known_word(get_args(Adapters), self.adapters, "adapters")
        known_word(get_args(Statistics), self.statistics, "statistics")
        require_text("private", *self.private)
        require_text("variant", self.access.variant or "")


def require_text(option: str, *texts: str) -> None:
    """Raise UsageError for bytes of a command line that are not Unicode text, which no plan or manifest can hold."""
    for text in texts:
        if not is_text(text):
            raise UsageError(f"--{option} {text!r} is not Unicode text", hint="write it in UTF-8")


def known_word(known: "list[str] | tuple[str, ...]", word: str, option: str) -> str:
    """Return the word. Raises UsageError that lists the known words if it is not one of them."""
    if word not in known:
        raise UsageError(f"--{option} {word} is not known", hint=f"one of: {', '.join(known)}")
    return word
