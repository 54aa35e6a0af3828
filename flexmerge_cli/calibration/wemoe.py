"""Implements WEMoE: routers that weigh the experts of mixtures for each input. Needs no torch to declare it."""

from collections.abc import Callable, Mapping
from typing import Annotated, Protocol

import numpy as np

from flexmerge_cli.calibration.adam import Adam
from flexmerge_cli.calibration.merged import Count, Moderate, entropy
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Range
from flexmerge_cli.random import key64

Arrays = dict[str, np.ndarray]
"""Values of routers by name, `UNIT@ROLE.TASK` with the first task of the group: w0 [·, d], b0, and perhaps w1, b1."""


class MixedModels(Protocol):
    """The models of tasks whose layers are mixtures of experts, with routers and examples."""

    seed: int

    @property
    def sizes(self) -> Mapping[tuple[str, str], tuple[int, int]]:
        """The inputs and the experts of each router, by unit and first task."""

    def set(self, values: Arrays) -> None:
        """Set the values of the routers."""

    def gradient(self, loss: Callable[[Tensor], Tensor], step: int, batch_size: int) -> Arrays:
        """Return the gradient of the sum over tasks of a loss of the logits, float64."""


def wemoe(
    models: MixedModels,
    on_step: Callable[[int, int], None],
    *,
    layers: Annotated[int, Range(least=1, most=2)] = 2,
    steps: Count = 1000,
    lr: Moderate = 0.0001,
    batch_size: Count = 16,
    init: Annotated[float, Range(least=-100, most=100)] = 0.3,
) -> Arrays:
    """Train routers that weigh the experts of a bundle of `smile` for each input: W = W_c + Σ_k g_k E_k.

    One router weighs all experts of a block, such as an MLP: g is the mean of r(x) over all x that the block's first
    layer gets of an example. With layers=1, r(x) is W x + b; with layers=2 it is W₁ max(0, W₀ x + b₀) + b₁, with as
    many hidden units as x has elements. Adam minimises the entropy of the answers, summed over tasks. All weights g_k
    start at init, whatever x is; W₀ is drawn with a deviation of 0.01. Tang et al. 2024.

    FusionBench's experts are whole task vectors of MLPs, biases included, on the base; here they have a rank, and
    biases are the centre's. It draws W₁, too, averages the weights over a batch while it trains, and over padding, and
    adapts on the test images.
    """
    values = _start(models, layers, init)
    adams = {name: Adam(lr) for name in values}
    for step in range(steps):
        models.set(values)
        gradient = models.gradient(entropy, step, batch_size)
        values = {name: value + adams[name].change(gradient[name]) for name, value in values.items()}
        on_step(step + 1, steps)
    return values


def _start(models: MixedModels, layers: int, init: float) -> Arrays:
    values: Arrays = {}
    for (unit, task), (width, experts) in models.sizes.items():
        rng = np.random.Generator(np.random.PCG64(key64("flexmerge/wemoe/1", models.seed, unit, task)))
        if layers == 2:
            values[f"{unit}@w0.{task}"] = rng.normal(0, 0.01, (width, width))
            values[f"{unit}@b0.{task}"] = np.zeros(width)
        values[f"{unit}@w{layers - 1}.{task}"] = np.zeros((experts, width))
        values[f"{unit}@b{layers - 1}.{task}"] = np.full(experts, float(init))
    return values
