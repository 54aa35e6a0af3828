"""Trains routers of a bundle's mixtures of experts on unlabelled examples, and adds them to the bundle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.bundle.mixture import MixtureLinear
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.wemoe import ROLES, ExpertRouter, attach, layers_of, routed_units
from flexmerge_cli.calibration.batches import Example, drawn, not_finite, seen_examples, stacked
from flexmerge_cli.calibration.fitted import Fitted, check_fitting, write_fitted
from flexmerge_cli.calibration.merged import entropy
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep
from flexmerge_cli.calibration.wemoe import Arrays, wemoe
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.formats.folders import WEMOE

Place = tuple[str, str]
"""A unit, and the first task of the group."""


@dataclass(slots=True)
class BundleModels:
    """The models of a bundle's tasks, in memory together, which compute with the same routers."""

    bundle: Bundle
    seed: int
    models: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    """The aligned name of the weight of the layer that runs first in each unit."""
    _layers: dict[str, dict[Place, dict[str, MixtureLinear]]] = field(default_factory=dict)
    """The layers of each task's model by the name of their weight, by unit."""
    _routers: dict[Place, ExpertRouter] = field(default_factory=dict)

    def add(self, request: CalibrationRequest, task: str) -> None:
        """Run a task's model once, to see what it gets, and keep it."""
        own: dict[str, MixtureLinear] = {}
        order: list[str] = []
        hooks = []

        def on_built(model: Any, names: Mapping[str, str]) -> None:
            self.models[task] = model.requires_grad_(False)
            own.update(layers_of(self.bundle, task, model, names))
            for name, layer in own.items():
                hooks.append(layer.register_forward_pre_hook(lambda *_call, name=name: order.append(name)))

        self.examples[task], self.digests[task] = seen_examples(request, bundle_model(self.bundle, task), on_built)
        for hook in hooks:
            hook.remove()
        self._layers[task] = {}
        for unit, (first_task, tensors) in routed_units(self.bundle.manifest, task).items():
            runs = [name for name in order if name in tensors]
            if runs:
                self.first.setdefault(unit, runs[0])
                self._layers[task][unit, first_task] = {name: own[name] for name in tensors if name in own}

    @property
    def sizes(self) -> dict[Place, tuple[int, int]]:
        found = {}
        for of_task in self._layers.values():
            for place, layers in of_task.items():
                layer = layers[self.first[place[0]]]
                found[place] = layer.weight.shape[1], len(layer.down)
        return found

    def set(self, values: Arrays) -> None:
        if not self._routers:
            self._attach(values)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(torch.from_numpy(values[name]))

    def _attach(self, values: Arrays) -> None:
        device = next(iter(next(iter(self.models.values())).parameters())).device
        for unit, task in self.sizes:
            own = {role: values[name] for role in ROLES if (name := f"{unit}@{role}.{task}") in values}
            made = {role: torch.from_numpy(value).float().to(device) for role, value in own.items()}
            self._routers[unit, task] = ExpertRouter(made).requires_grad_(True)
        for task, model in self.models.items():
            of_task = self._layers[task].items()
            attach(model, {p[0]: (self._routers[p], layers, self.first[p[0]]) for p, layers in of_task})

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{unit}@{role}.{task}": parameter
            for (unit, task), router in self._routers.items()
            for role, parameter in router.named_parameters()
        }

    def gradient(self, loss: Callable[[Tensor], Tensor], step: int, batch_size: int) -> Arrays:
        parameters = self._parameters()
        for parameter in parameters.values():
            parameter.grad = None
        for task, examples in self.examples.items():
            with torch.enable_grad():
                value = self._loss(task, drawn(examples, step, batch_size, self.seed, task), loss)
                if value.requires_grad:  # The model may have no mixture.
                    value.backward()  # type: ignore[no-untyped-call]
        return {
            name: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.double().cpu().numpy()
            for name, p in parameters.items()
        }

    def entropy(self, task: str, batch_size: int) -> float:
        """Return the mean entropy of a task's answers to all its examples, in nats."""
        examples, total = self.examples[task], 0.0
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                batch = examples[start : start + batch_size]
                total += float(self._loss(task, batch, entropy)) * len(batch) / len(examples)
        return total

    def _loss(self, task: str, batch: list[Example], loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mean of a loss of a model's logits. Raises DataError if it is not finite."""
        found = torch.zeros(())
        for args, kwargs, part in stacked(batch):
            logits: Tensor = self.models[task](*args, **kwargs).logits.float()
            found = found.to(logits.device) + loss(logits) * part
        if not torch.isfinite(found):
            raise not_finite(f"task `{task}`: the outputs")
        return found


def mix(
    request: CalibrationRequest,
    bundle: Bundle,
    args: Mapping[str, Any],
    output: Path,
    *,
    force: bool = False,
    on_step: OnStep = lambda *_step: None,
) -> dict[str, Fitted]:
    """Write a copy of the bundle with routers that weigh its experts. before and after: the mean entropy of answers.

    args: those of `wemoe`, all of them. Raises UsageError for a bundle without mixtures, with a surgery or a router of
    tasks, or of other tasks, DataError if its models or the sources are not those of the plan, or outputs are not
    finite.
    """
    check_fitting(request, bundle, output, force=force)
    names = request.plan.task_names
    without = UsageError(
        f"no layer of {bundle.path} is a mixture of experts",
        hint="merge with --method task_arithmetic:form=sum --method-for '*.mlp=smile:rank=16'; where experts would "
        "take no fewer bytes than copies, copies are stored, and a lower rank helps",
    )
    if not any(bundle.experts(task) for task in names):
        raise without
    for what, fitted in (("surgery", bundle.manifest.surgery), ("router", bundle.manifest.router)):
        if fitted is not None:
            raise UsageError(
                f"{bundle.path} has a {what}, which was fitted to other weights of its experts",
                hint=f"use the bundle without it, and fit the {what} to the result",
            )
    models = BundleModels(bundle, request.seed)
    for place, task in enumerate(names):
        on_step("reading", place, len(names))
        models.add(request, task)
    if not models.first:  # No model runs them.
        raise without
    size = args["batch_size"]
    models.set(wemoe(models, lambda *_: None, **{**args, "steps": 0}))
    before = {task: models.entropy(task, size) for task in names}
    values = wemoe(models, partial(on_step, "tuning"), **args)
    models.set(values)
    found = {
        task: Fitted(
            examples=len(models.examples[task]),
            data=models.digests[task],
            before=before[task],
            after=models.entropy(task, size),
        )
        for task in names
    }
    entry = {"layers": args["layers"], "first": models.first}
    arrays = {name: value.astype(np.float32) for name, value in values.items()}
    write_fitted(request, bundle, WEMOE, entry, arrays, found, output, force=force)
    return found
