"""Fits corrections of a bundle's models on unlabelled examples: last layers then get what fine-tuned ones get."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.surgery import corrected
from flexmerge_cli.calibration.fitted import Fitted, check_fitting, write_fitted
from flexmerge_cli.calibration.measure import RunEnded
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, run_examples
from flexmerge_cli.calibration.surgery import surgery
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.folders import SURGERY
from flexmerge_cli.random import key64


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected(Fitted):
    """The correction of one task; before and after: the mean of |z - z of the fine-tuned model|."""

    layer: str
    """The own name of the weight of the last layer."""
    down: np.ndarray
    up: np.ndarray


def correct(
    request: CalibrationRequest,
    bundle: Bundle,
    args: Mapping[str, Any],
    output: Path,
    *,
    force: bool = False,
    on_step: OnStep = lambda *_step: None,
) -> dict[str, Corrected]:
    """Write a copy of the bundle with corrections z - U max(0, D z) of what the last layer of each task's model gets.

    args: those of `surgery`, all of them. Raises UsageError for a task without a last layer of its own and for a
    bundle of other tasks, DataError if its models or the sources are not those of the plan, or outputs are not finite.
    """
    check_fitting(request, bundle, output, force=force)
    names, found = request.plan.task_names, dict[str, Corrected]()
    for place, task in enumerate(names):
        on_step(task, place, len(names))
        tuned, merged = request.references.of(task)["fine_tuned"](), bundle_model(bundle, task)
        layer = last_layer(request, place, tuned)
        wanted, digest = inputs_of(request, tuned, layer)
        start, _ = inputs_of(request, merged, layer)
        down, up = surgery(start, wanted, key64("flexmerge/surgery/1", request.seed, task), **args)
        before, after = (float((z - wanted).abs().mean()) for z in (start, corrected(start, down, up)))
        n = request.scorer.examples(task, request.references.folders[task]).n
        found[task] = Corrected(
            layer=layer, down=down.numpy(), up=up.numpy(), examples=n, data=digest, before=before, after=after
        )
    entry = {"rank": args["rank"], "layers": {task: one.layer for task, one in found.items()}}
    arrays = {f"{task}@{role}": getattr(one, role) for task, one in found.items() for role in ("down", "up")}
    write_fitted(request, bundle, SURGERY, entry, arrays, found, output, force=force)
    return found


def last_layer(request: CalibrationRequest, place: int, model: TaskModel) -> str:
    """Return the own name of the weight of the last linear layer of a task's model. Raises UsageError if it merges."""
    plan, found = request.plan, list[str]()
    own = {plan.own_name(place, t.name) for t in plan.tensors if place in t.present and t.class_ is TensorClass.PRIVATE}

    def on_built(built: Any, names: Mapping[str, str]) -> None:
        layers = [path for path, module in built.named_modules() if type(module) is nn.Linear]
        found.extend(names.get(f"{path}.weight", "") for path in layers[-1:])
        raise RunEnded

    with suppress(RunEnded):
        run_examples(request, model, on_built=on_built)
    if not found or found[0] not in own:
        raise UsageError(
            f"task `{model.task}` has no head of its own: surgery corrects what a last linear layer gets that is "
            "private to the task",
            hint="use models with a classifier of each task",
        )
    return found[0]


def inputs_of(request: CalibrationRequest, model: TaskModel, layer: str) -> tuple[Tensor, str]:
    """Return what a layer gets from a task's examples, float32 [rows, d], and the digest of the examples."""
    seen: list[Tensor] = []

    def on_built(built: Any, names: Mapping[str, str]) -> None:
        path = next(state for state, own in names.items() if own == layer).rpartition(".")[0]
        built.get_submodule(path).register_forward_pre_hook(
            lambda _module, args: seen.append(args[0].detach().float().flatten(0, -2).cpu())
        )

    digest = run_examples(request, model, on_built=on_built).digest
    rows = torch.cat(seen)
    if not torch.isfinite(rows).all():
        raise DataError(
            f"what the last layer of task `{model.task}` gets is not finite", hint="check the data and the weights"
        )
    return rows.clone(), digest
