"""Implements AdaMerging: weights of tasks and blocks for which the merged model is most certain of its answers."""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.calibration.adam import Adam
from flexmerge_cli.calibration.joint import JointModels
from flexmerge_cli.methods.method import Range

Count = Annotated[int, Range(least=1)]
Moderate = Annotated[float, Range(above=0, most=1000)]


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of softmax(logits), in nats. [n, …, classes] -> []."""
    each = torch.log_softmax(logits, -1)
    return -(each.exp() * each).sum(-1).mean()


def adamerging(
    models: JointModels,
    on_step: Callable[[int, int], None],
    *,
    granularity: Literal["block", "task"] = "block",
    steps: Count = 100,
    lr: Moderate = 0.01,
    batch_size: Count = 16,
    init: Moderate = 1.0,
) -> np.ndarray:
    """Minimise the entropy of the answers of θ_base + Σ_k w_k τ_k / M, summed over tasks, by Adam. [tasks, blocks].

    All weights start at init, where 1 is the average of the models, and stay at or above 0. granularity=task: one
    weight per task, for all blocks. The models run as in evaluation, without dropout. Yang et al. 2024 write
    λ_k = w_k / M, start at 0.3 with eight tasks, keep λ in [0, 1] and take steps of 0.001; FusionBench does not bound
    λ, gives every tensor a weight ("layer-wise") and adds 1e-8 inside the logarithm. Both adapt on the test images.
    """
    weight_MB, adam = np.full((models.num_tasks, len(models.plan.blocks)), float(init)), Adam(lr)
    for step in range(steps):
        models.merge(weight_MB)
        gradient, _ = models.gradient(entropy, step, batch_size)
        if granularity == "task":
            gradient[:] = gradient.sum(1, keepdims=True)
        weight_MB = np.maximum(0.0, weight_MB + adam.change(gradient))
        on_step(step + 1, steps)
    return weight_MB
