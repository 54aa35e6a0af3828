"""Defines what is scored, and the result. Values only: no files, no models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from flexmerge_cli.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskModel:
    """One task's weights, ready to be scored: from a bundle's view, a source, or a plan's cut in memory."""

    task: str
    weights: "Mapping[str, Tensor]"
    """Maps own names to tensors, made on demand."""
    folder: Path
    """The folder of its side files: config.json, tokenizer, preprocessor."""
    digest: str
    """The digest of the weights, from `weights_digest`."""
    num_bytes: int | None = None
    """Bytes of the tensors that this task reads, if they are stored as tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """An external number, without per-example values to resample."""

    value: float
    n: int | None
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The outputs of one model on one task's data: enough for the value, its interval and paired differences."""

    metric: str
    """A name in METRICS; any name with `given`."""
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[n, ...] per example, in the form that the metric takes."""
    labels: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[n, ...] per example."""
    notes: tuple[str, ...] = ()
    """Remarks, e.g. `3 of 200 outputs are not numbers`."""
    given: Given | None = None
    """The number of a `python`, `command` or `lm-eval` task, without predictions, labels and paired bound."""
    others: "tuple[Scored, ...]" = ()
    """Further metrics of the same run."""

    @property
    def n(self) -> int:
        """The number of examples; 0 if an external number does not come with it."""
        return (self.given.n or 0) if self.given is not None else len(self.predictions)

    @property
    def value(self) -> float:
        if self.given is not None:
            return self.given.value
        return METRICS[self.metric].value(self.predictions, self.labels)

    @property
    def higher_is_better(self) -> bool:
        return self.given.higher_is_better if self.given is not None else METRICS[self.metric].higher_is_better

    @property
    def outcomes(self) -> np.ndarray | None:
        """[n] numbers whose mean is the value, or None."""
        outcomes = None if self.given is not None else METRICS[self.metric].outcomes
        return None if outcomes is None else outcomes(self.predictions, self.labels)

    def take(self, examples: np.ndarray) -> "Scored":
        """Return the scores of some examples, in that order, with repetition: a half, or a resample. [k] indices."""
        return replace(
            self,
            predictions=self.predictions[examples],
            labels=self.labels[examples],
            others=tuple(other.take(examples) for other in self.others),
        )


DigestLine = tuple[str, str, tuple[int, ...], str]
"""Own name, dtype, shape and digest of the bytes of one tensor."""


def places_line(own: str, rows: int, common: Iterable[tuple[int, int]]) -> DigestLine:
    """Return where the common rows are in a joined tensor, which the digests of the rows do not determine."""
    return f"{own}@places", "runs", (rows, *(number for run in common for number in run)), ""


def weights_digest(tensors: Iterable[DigestLine]) -> str:
    """Compute one digest of (own name, dtype, shape, digest of the bytes) of all tensors, independent of their order.

    Equal for equal weights, whether they come from a bundle, a source or a plan's cut: the key of the score cache.
    """
    lines = sorted(f"{name} {dtype} {list(shape)} {digest}" for name, dtype, shape, digest in tensors)
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())
