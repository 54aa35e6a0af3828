"""What the methods of `tune` see of merged models, and the entropy that they lower. Needs no torch to declare them."""

from collections.abc import Callable
from typing import Annotated, Protocol

import numpy as np

from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range

Count = Annotated[int, Range(least=1)]
Moderate = Annotated[float, Range(above=0, most=1000)]


class MergedModels(Protocol):
    """All tasks' models on one set of merged weights, θ_base + Σ_k w_k τ_k / M, with their examples."""

    plan: Plan
    seed: int

    @property
    def num_tasks(self) -> int: ...

    @property
    def elements_B(self) -> np.ndarray:
        """The number of elements of each block that merge, float64 [blocks]."""

    def merge(self, weight_MB: np.ndarray) -> None:
        """Set the merged weights. weight_MB: float64 [tasks, blocks]."""

    def gradient(self, loss: Callable[[Tensor], Tensor], step: int, batch_size: int) -> tuple[np.ndarray, float]:
        """Return ∂/∂w of the sum over tasks of a loss of the logits, float64 [tasks, blocks], and that sum."""


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of softmax(logits), in nats. [n, …, classes] -> []."""
    each = torch.log_softmax(logits, -1)
    return -(each.exp() * each).sum(-1).mean()
