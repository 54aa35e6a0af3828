"""Implements Representation Surgery: low-rank corrections of features. Needs no torch to declare it."""

from typing import Annotated

import numpy as np

from flexmerge_cli.calibration.adam import Adam
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Range

Count = Annotated[int, Range(least=1, most=100_000)]
Rate = Annotated[float, Range(above=0, most=1)]


def surgery(
    start: Tensor,
    wanted: Tensor,
    key: int,
    *,
    rank: Count = 16,
    steps: Count = 1000,
    lr: Rate = 0.001,
    batch_size: Count = 16,
) -> tuple[Tensor, Tensor]:
    """Correct what the last layer of each task's model gets in a bundle: ẑ = z - U max(0, D z).

    Adam minimises the mean |ẑ - z of the fine-tuned model| over the task's examples. U starts at 0, so that nothing is
    corrected at first; D is drawn. Each example is used once before any is used again. Yang et al. 2024 draw U at
    random, too, and fit on the test images.
    """
    # start: what the layer gets in the bundle's model, [n, d]; wanted: what it gets in the fine-tuned one, [n, d]; key:
    # of the draws. Returns D [rank, d] and U [d, rank]. The docstring is what `flexmerge methods surgery` shows.
    n, d = start.shape
    rng = np.random.Generator(np.random.PCG64(key))
    bound = d**-0.5
    down = torch.from_numpy(rng.uniform(-bound, bound, (rank, d)).astype(np.float32))
    up = torch.zeros(d, rank)
    adams = Adam(lr), Adam(lr)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(batch_size, n):
            order += rng.permutation(n).tolist()
        rows, order = order[: min(batch_size, n)], order[min(batch_size, n) :]
        z = start[rows]
        inside = z @ down.T
        sign = (z - inside.relu() @ up.T - wanted[rows]).sign() / z.numel()
        gradients = -((sign @ up) * (inside > 0)).T @ z, -sign.T @ inside.relu()
        for value, gradient, adam in zip((down, up), gradients, adams):
            value += adam.change(gradient)
    return down, up
