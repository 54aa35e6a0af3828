"""Lists the methods of `tune`, which find weights of tasks and blocks on unlabelled examples. Imports no torch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.calibration.adamerging import adamerging
from flexmerge_cli.calibration.concrete import concrete
from flexmerge_cli.calibration.fw_merging import fw_merging
from flexmerge_cli.methods.method import Parameter, parameters_of


@dataclass(frozen=True, slots=True)
class Tuner:
    """A function of (MergedModels, on_step, **arguments) that returns weights, float64 [tasks, blocks]."""

    function: Callable[..., np.ndarray]
    paper: str

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")

    @property
    def parameters(self) -> dict[str, Parameter]:
        return parameters_of(self.function)


TUNERS = {
    tuner.name: tuner
    for tuner in (
        Tuner(adamerging, "Yang et al. 2024"),
        Tuner(concrete, "Tang et al. 2023"),
        Tuner(fw_merging, "Chen et al. 2025"),
    )
}
