"""Implements Concrete Subspace learning with one gate for each block: which blocks take part in the merge."""

from collections.abc import Callable
from typing import Annotated

import numpy as np

from flexmerge_cli.calibration.adam import Adam
from flexmerge_cli.calibration.merged import Count, MergedModels, Moderate, entropy
from flexmerge_cli.methods.method import Range
from flexmerge_cli.random import key64, uniform


def concrete(
    models: MergedModels,
    on_step: Callable[[int, int], None],
    *,
    steps: Count = 100,
    lr: Moderate = 0.1,
    batch_size: Count = 16,
    temperature: Annotated[float, Range(least=0.01, most=100)] = 0.5,
    init: Moderate = 1.0,
) -> np.ndarray:
    """Learn a mask of blocks, which all tasks share, by the entropy of the answers. [tasks, blocks].

    Every task has the weight init·m_b/m̄ in block b, where m̄ is the mean of the mask over all elements that merge, and
    1 is the average of the models. While it learns, m_b = σ((x_b + log(u/(1 - u)))/temperature) with u uniform, drawn
    from the seed anew in each step, is a relaxed draw of a gate that is open with the probability σ(x_b); Adam changes
    the logits x_b, which start at 0. The result has m_b = σ(x_b). Tang et al. 2023.

    The paper's mask has a logit for each element, and m̄ is a mean over each tensor. Such a mask is a file of a bit or
    more for each element of a model, and belongs to these elements alone; one gate for each block is a weight, which
    the file of coefficients holds and every later merge takes. fusion_bench takes 2,000 steps of 0.001, scales the sum
    of the task vectors by 0.3, and ends with a random draw of the mask.
    """
    part_B = models.elements_B / max(1.0, models.elements_B.sum())
    logit_B, adam, key = np.zeros(len(part_B)), Adam(lr), key64("flexmerge/concrete/1", models.seed)
    for step in range(steps):
        u = uniform(key, step * len(part_B), len(part_B)) + 2.0**-54  # The middle of each interval: never 0 or 1.
        mask_B = _sigmoid((logit_B + np.log(u) - np.log1p(-u)) / temperature)
        weight_B, mean = _weights(mask_B, part_B, init)
        models.merge(np.tile(weight_B, (models.num_tasks, 1)))
        gradient_MB, _ = models.gradient(entropy, step, batch_size)
        of_weight_B = gradient_MB.sum(0)
        of_mask_B = (init * of_weight_B - part_B * (of_weight_B @ weight_B)) / mean
        logit_B = logit_B + adam.change(of_mask_B * mask_B * (1 - mask_B) / temperature)
        on_step(step + 1, steps)
    return np.tile(_weights(_sigmoid(logit_B), part_B, init)[0], (models.num_tasks, 1))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(-np.logaddexp(0, -x))
    return found


def _weights(mask_B: np.ndarray, part_B: np.ndarray, init: float) -> tuple[np.ndarray, float]:
    """Return the weights of blocks, and the mean of the mask; 1 in place of 0, where all gates are closed."""
    mean = float(part_B @ mask_B) or 1.0
    return init * mask_B / mean, mean
