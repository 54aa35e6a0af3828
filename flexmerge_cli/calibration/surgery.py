"""Fits corrections of a bundle's models on unlabelled examples: last layers then get what fine-tuned ones get."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.added import write_added
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.card import make_card
from flexmerge_cli.bundle.manifest_file import read_manifest
from flexmerge_cli.bundle.publish import bundle_files, check_target
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.surgery import corrected
from flexmerge_cli.calibration.measure import RunEnded
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, run_examples
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.folders import SURGERY_FILE
from flexmerge_cli.formats.manifest import SurgeryEntry
from flexmerge_cli.methods.method import Range
from flexmerge_cli.random import key64

Count = Annotated[int, Range(least=1, most=1 << 20)]
Rate = Annotated[float, Range(above=0, most=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """The correction of one task, and the mean of |z - z of the fine-tuned model| without and with it."""

    layer: str
    """The own name of the weight of the last layer."""
    down: np.ndarray
    up: np.ndarray
    examples: int
    data: str
    before: float
    after: float


def surgery(
    request: CalibrationRequest,
    bundle: Bundle,
    args: Mapping[str, Any],
    output: Path,
    *,
    force: bool = False,
    on_step: OnStep = lambda *_step: None,
) -> dict[str, Corrected]:
    """Write a copy of the bundle with corrections z - U max(0, D z) of what the last layer of each task's model gets.

    args: those of `fit`, all of them. Raises UsageError for a task without a last layer of its own and for a bundle of
    other tasks, DataError if its models or the sources are not those of the plan, or outputs are not finite.
    """
    check_apart(output, [request.plan_path, request.spec.document.path, bundle.path])
    check_target(output, force=force, ours=bundle_files)
    names = request.plan.task_names
    if bundle.manifest.base != request.plan.base.fingerprint or set(bundle.tasks) != set(request.plan.reader_names):
        raise UsageError(
            f"{bundle.path} was not merged from {request.plan_path}: its base or its tasks are others",
            hint="give the plan that the bundle was merged from",
        )
    found = {}
    for place, task in enumerate(names):
        on_step(task, place, len(names))
        if bundle.manifest.tasks[task].fingerprint != request.plan.tasks[place].fingerprint:
            raise DataError(f"`{task}` of {bundle.path} is another model than in the plan", hint="merge it again")
        tuned, merged = request.references.of(task)["fine_tuned"](), bundle_model(bundle, task)
        layer = last_layer(request, place, tuned)
        wanted, digest = inputs_of(request, tuned, layer)
        start, _ = inputs_of(request, merged, layer)
        down, up = fit(start, wanted, key64("flexmerge/surgery/1", request.seed, task), **args)
        before, after = (float((z - wanted).abs().mean()) for z in (start, corrected(start, down, up)))
        n = request.scorer.examples(task, request.references.folders[task]).n
        found[task] = Corrected(
            layer=layer, down=down.numpy(), up=up.numpy(), examples=n, data=digest, before=before, after=after
        )
    entry = SurgeryEntry(
        rank=args["rank"],
        layers={task: one.layer for task, one in found.items()},
        examples={task: one.examples for task, one in found.items()},
        data={task: one.data for task, one in found.items()},
    )
    arrays = {f"{task}@{role}": getattr(one, role) for task, one in found.items() for role in ("down", "up")}
    write_added(
        bundle, SURGERY_FILE, arrays, output, key="surgery", entry=entry.model_dump(mode="json"), force=force,
        card=lambda folder: make_card(folder, read_manifest(folder), request.plan, None),
    )  # fmt: skip
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


def fit(
    start: Tensor,
    wanted: Tensor,
    key: int,
    *,
    rank: Count = 16,
    steps: Count = 1000,
    lr: Rate = 0.001,
    batch_size: Count = 16,
) -> tuple[Tensor, Tensor]:
    """Return D [rank, d] and U [d, rank], float32, which bring rows of `start` near those of `wanted`, both [n, d].

    Adam minimises the mean |difference|. U starts at 0, so that the correction starts at none. key: draws the start
    of D and the rows of each step, each row once before any is used again. Yang et al. 2024 start U at random, too.
    """
    n, d = start.shape
    rng = np.random.Generator(np.random.PCG64(key))
    bound = d**-0.5
    down = torch.from_numpy(rng.uniform(-bound, bound, (rank, d)).astype(np.float32))
    up = torch.zeros(d, rank)
    moments = [[torch.zeros_like(value), torch.zeros_like(value)] for value in (down, up)]
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < min(batch_size, n):
            order += rng.permutation(n).tolist()
        rows, order = order[: min(batch_size, n)], order[min(batch_size, n) :]
        z = start[rows]
        inside = z @ down.T
        sign = (z - inside.relu() @ up.T - wanted[rows]).sign() / z.numel()
        gradients = -((sign @ up) * (inside > 0)).T @ z, -sign.T @ inside.relu()
        for value, gradient, (first, second) in zip((down, up), gradients, moments):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            # The bias corrections of Adam, and its ε.
            value -= lr * first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return down, up
