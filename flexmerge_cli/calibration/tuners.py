"""Lists the methods of `tune`, which find something small on unlabelled examples. Imports no torch."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexmerge_cli.calibration.adamerging import adamerging
from flexmerge_cli.calibration.concrete import concrete
from flexmerge_cli.calibration.fw_merging import fw_merging
from flexmerge_cli.calibration.surgery import surgery
from flexmerge_cli.calibration.wemoe import wemoe
from flexmerge_cli.methods.method import Parameter, parameters_of


@dataclass(frozen=True, slots=True)
class Tuner:
    """A method of `tune`. Its function takes the method's arguments by keyword.

    Without a bundle it is a function of (MergedModels, on_step), and returns weights, float64 [tasks, blocks].
    """

    function: Callable[..., Any]
    paper: str
    adds_to_bundle: bool = False
    """Whether it finds what is added to a bundle, and not weights for a merge."""

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
        Tuner(surgery, "Yang et al. 2024, Representation Surgery", adds_to_bundle=True),
        Tuner(wemoe, "Tang et al. 2024", adds_to_bundle=True),
    )
}
