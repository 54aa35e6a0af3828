"""What each task gets back from a bundle, computed on whole tensors in memory: no ranges, no files, no threads.

Merged values are those of tests/methods/driver.py; what is stored of them, and how, is written out here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmerge_cli.allocation.allocation import Group, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.storage import effective_dtype
from flexmerge_cli.checkpoint.dtypes import TO_TORCH, promote
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.methods.coded import Coded, declare
from flexmerge_cli.residuals.coder import Coder
from flexmerge_cli.residuals.mask import drawn

from ..families import Models, State
from ..methods.driver import Family, measure, merge


def torch_dtype(dtype: str) -> torch.dtype:
    return getattr(torch, TO_TORCH[dtype])


def given_back(models: Models, layout: BundleLayout) -> dict[str, State]:
    """Task -> name -> tensor. Names are the base's in every task."""
    plan, cast = layout.plan, layout.allocation.dtype
    mergeable = sorted(tensor.name for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE)
    family = Family(
        tasks=plan.task_names,
        deltas={
            name: torch.stack(
                [models.tasks[task][name].float() - models.base[name].float() for task in plan.task_names]
            )
            for name in mergeable
        },
        blocks={block.name: tuple(sorted(block.tensors)) for block in plan.blocks},
    )
    back: dict[str, State] = {}
    experts: dict[Any, Any] = {}
    for number, task in enumerate(plan.task_names):
        own = {tensor.name: tensor.dtype_of(number) for tensor in plan.tensors if number in tensor.present}
        back[task] = {
            name: models.tasks[task][name].to(torch_dtype(effective_dtype(dtype, cast))) for name, dtype in own.items()
        }
    for unit in layout.allocation.units:
        for group in unit.groups:
            for task, name, value in _group(models, layout, family, experts, unit, group):
                back[task][name] = value.view(back[task][name].shape)
    return back


def _group(
    models: Models, layout: BundleLayout, family: Family, experts: dict[Any, Any], unit: Unit, group: Group
) -> list[tuple[str, str, Tensor]]:
    """(task, tensor, value) of all that is not copied. experts: statistics that were taken before."""
    stored = [
        name
        for name in unit.tensors
        if any(found.tasks == group.tasks and found.method is not None for found in layout.storages[name].groups)
    ]
    if group.method is None or not stored:
        return []
    use, call = layout.allocation.methods[group.method], layout.calls[group.method]
    names = tuple(family.tasks[task] for task in group.tasks)
    dtypes = {
        name: tuple(
            effective_dtype(layout.storages[name].tensor.dtype_of(task), layout.allocation.dtype)
            for task in group.tasks
        )
        for name in family.blocks[unit.name]
    }
    coded = declare(call)
    maker = coded.centre_call() if coded is not None else call
    if maker is not None and maker.scope == "block":  # a method never sees what is copied
        family = Family(
            tasks=family.tasks, deltas=family.deltas, blocks={**family.blocks, unit.name: tuple(sorted(stored))}
        )
    merged: Mapping[str, Any] = {}
    if maker is not None:
        merged = merge(
            family,
            maker,
            blocks=[unit.name],
            group=names,
            steps=list(use.steps),
            calibrate=use.calibrate,
            bypass=False,
            stored=lambda name: torch_dtype(promote(dtypes[name])),
        )
    values = []
    for name in stored:
        base = models.base[name].float().flatten()
        kept_base = models.base[name].to(
            torch_dtype(effective_dtype(str(layout.storages[name].tensor.base_dtype), layout.allocation.dtype))
        )
        value = base + merged[name].unified.flatten() + 0.0 if maker is not None else base
        if coded is not None:
            kept = kept_base.float().flatten()
            found = _residuals(models, family, experts, coded, name, names, dtypes[name], value, kept)
        elif call.method.form == "masked":
            taken = [merged[name].tasks[task].flatten() for task in names]
            kept = kept_base.float().flatten()
            found = [torch.where(delta == 0, kept, kept + delta) for delta in taken]
        elif call.method.form == "superposed":
            unified = merged[name].unified.flatten().to(torch_dtype(promote(dtypes[name]))).float()
            plus = (torch.from_numpy(drawn(call.args["seed"], task, name, 0, len(unified))) for task in names)
            found = [kept_base.float().flatten() + torch.where(mine, unified, -unified) for mine in plus]
        else:
            found = [value.to(torch_dtype(promote(dtypes[name])))] * len(names)
        values += [
            (task, name, one.to(torch_dtype(dtype)))
            for task, dtype, one in zip(names, dtypes[name], found, strict=True)
        ]
    return values


def _residuals(
    models: Models,
    family: Family,
    experts: dict[Any, Any],
    coded: Coded,
    name: str,
    names: Sequence[str],
    dtypes: tuple[str, ...],
    plain: Tensor,
    base: Tensor,
) -> list[Tensor]:
    """θ̂ of each task, float32 before it is given its own dtype. plain, base: of the tensor, one axis."""
    shape = tuple(models.base[name].shape)
    form = coded.form(name, shape, dtypes)
    if coded.centre == "none":
        centre = torch.zeros_like(base)
    elif form.centre is not None:
        centre = _coded(form.centre, plain, form.matrix, promote(dtypes))
    elif coded.centre == "base":
        centre = base
    else:
        centre = plain.to(torch_dtype(promote(dtypes))).float()
    factors = None
    if coded.expert is not None:
        expert: Any = coded.expert
        domain = {"model": tuple(family.deltas), "block": family.blocks[family.block_of(name)], "tensor": (name,)}
        tensors = domain[expert.scope]
        if (expert, tensors) not in experts:
            experts[expert, tensors] = measure(expert, family.deltas, tensors, family.tasks, 1 << 30)
        factors = expert.factors(experts[expert, tensors].take([family.tasks.index(task) for task in names]))
    found = []
    for row, task in enumerate(names):
        own = models.tasks[task][name].float().flatten()
        residual = own - centre
        if factors is not None:
            delta = family.deltas[name][family.tasks.index(task)]
            old, new = models.base[name].float(), centre.view(shape)
            residual = coded.expert.residual(delta, old, new, float(factors[row])).flatten()
        found.append(centre if form.is_centre else centre + _coded(form.residual, residual, form.matrix, dtypes[row]))
    return found


def _coded(coder: Coder, values: Tensor, matrix: tuple[int, int], dtype: str) -> Tensor:
    """There and back, all rows at once."""
    return torch.from_numpy(coder.decode(coder.encode(values.view(matrix), dtype), matrix, dtype)).flatten()
