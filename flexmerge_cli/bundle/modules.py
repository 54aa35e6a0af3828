"""Completes a task's model whose weights are in place: with mixtures of experts, their routers, and corrections."""

from collections.abc import Iterable, Mapping

from torch import nn

from flexmerge_cli.bundle.mixture import Mixture, install
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.surgery import correct
from flexmerge_cli.bundle.wemoe import route_experts


def complete(
    bundle: Bundle,
    task: str,
    model: nn.Module,
    names: Mapping[str, str | Iterable[str]],
    mixtures: Mapping[str, Mixture],
) -> None:
    """Put what no tensor holds into a model whose weights are the centres. Arguments and errors are those of `install`,
    `route_experts` and `correct`."""
    install(model, names, mixtures)
    route_experts(bundle, task, model, names)
    correct(bundle, task, model, names)
