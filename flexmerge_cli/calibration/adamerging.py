"""Implements AdaMerging: weights of tasks and blocks for which the merged model is most certain of its answers."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from flexmerge_cli.calibration.adam import Adam
from flexmerge_cli.calibration.merged import Count, MergedModels, Moderate, entropy


def adamerging(
    models: MergedModels,
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
