"""Implements Frank-Wolfe merging: steps of the merge towards the models in whose direction the entropy falls most."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from flexmerge_cli.calibration.merged import Count, MergedModels, Moderate, entropy
from flexmerge_cli.methods.method import Fraction


def fw_merging(
    models: MergedModels,
    on_step: Callable[[int, int], None],
    *,
    granularity: Literal["block", "task"] = "task",
    steps: Count = 10,
    rate: Fraction = 0.1,
    batch_size: Count = 100,
    init: Moderate = 1.0,
) -> np.ndarray:
    """Move θ to θ + γ·(s - θ) in step t = 0, 1, …, with γ = rate·2/(t + 2). [tasks, blocks].

    s is the vertex that minimises ⟨∇L(θ), s⟩, where L is the entropy of the answers, summed over tasks. The vertices
    are the fine-tuned models and the start, where all weights are init; 1 is the average of the models. Of equal
    vertices the first task's is taken, and θ stays where no vertex is better. granularity=block: each block has a
    vertex of its own. Chen et al. 2025, whose constraint set is the convex hull of the models.

    fusion_bench chooses s by the sum over tensors of the cosine of gradient and weights, instead of their product,
    starts at a sum scaled by 0.3, and multiplies γ by 0.3 as well; its default loss is the cross-entropy of labelled
    training examples, and the entropy is an option. Its soft variant, which merges one model for each task by
    AdaMerging in every step, is not here.
    """
    start_MB = np.full((models.num_tasks, len(models.plan.blocks)), float(init))
    weight_MB, corner_MM = start_MB.copy(), models.num_tasks * np.eye(models.num_tasks)
    for step in range(steps):
        models.merge(weight_MB)
        gradient_MB, _ = models.gradient(entropy, step, batch_size)
        # What the loss would be at each vertex if it were linear, beside what it is here.
        value_VB = np.concatenate([corner_MM @ gradient_MB, (start_MB * gradient_MB).sum(0, keepdims=True)])
        here_B = (weight_MB * gradient_MB).sum(0)
        if granularity == "task":
            value_VB, here_B = value_VB.sum(1, keepdims=True), here_B.sum(keepdims=True)
        best_B = np.broadcast_to(value_VB.argmin(0), len(models.plan.blocks))
        vertex_MB = np.concatenate([corner_MM, start_MB[:, :1]], axis=1)[:, best_B]
        weight_MB = weight_MB + np.where(value_VB.min(0) < here_B, rate * 2 / (step + 2) * (vertex_MB - weight_MB), 0)
        on_step(step + 1, steps)
    return weight_MB
