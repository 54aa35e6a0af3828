"""Measures inputs through what is merged so far, as RegMean++ does: block by block, in the order in which models run.

At each block the models of all tasks run on their examples. The blocks that a model runs before it have their merged
values, and the block itself and all later ones the fine-tuned values of its task. Then the block is merged, with the
inputs that were measured, and the next one follows. Merged blocks and the inputs of one block are in memory. Blocks
that have parts of one tensor, such as the heads of an attention, merge together.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from flexmerge_cli.allocation.allocation import Allocation, Group
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.calibration.measure import (
    RunEnded,
    TaskRecord,
    by_stage,
    row_of,
    run_of,
    runs_of,
    stages_of,
    tensor_stages,
    wanted_of,
)
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, Through, run_examples
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.engine.device import choose_device
from flexmerge_cli.engine.pool import default_threads
from flexmerge_cli.evaluation.in_memory import MemoryBundles
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.calibration import CalibratedTask, Unmeasured
from flexmerge_cli.planning.sources import open_sources

if TYPE_CHECKING:
    from flexmerge_cli.calibration.collect import Wanted


@dataclass(kw_only=True)
class _SoFar(Unmeasured):
    """What has been measured so far."""

    records: list[TaskRecord] = field(default_factory=list)
    arrays: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    """The inputs of the block that is merged next, by task and tensor."""

    def entry(self, task: int, statistic: str, tensor: str) -> Any:
        return self.records[task].entries["inputs"].get(tensor)

    def array(self, task: int, statistic: str, tensor: str) -> np.ndarray:
        return self.arrays[task, tensor]


def measured_through(
    request: CalibrationRequest, through: Through, folder: Path, on_step: OnStep
) -> list[tuple[CalibratedTask, dict[str, Any]]]:
    """Measure the inputs of all tasks and write their files. Returns the entry and the row of each task.

    Raises DataError for sources that differ from the plan's, and for inputs that are not finite.
    """
    plan, names = request.plan, request.plan.task_names
    sources = open_sources(plan, request.plan_path.absolute().parent, through.relocate, through.access)
    fetch(sources.to_fetch(), through.access)
    so_far = _SoFar(plan=plan)
    pricer = Pricer(plan, calibration=so_far).asked(through.request)
    memory = MemoryBundles(
        sources=sources.located,
        device=choose_device(request.device or request.spec.device or "auto"),
        threads=default_threads(),
    )
    wanted, order = _observed(request)
    stages = sorted({stage for of_task in wanted for stage in of_task}, key=order.index)
    counts = [request.scorer.examples(name, request.references.folders[name]).n for name in names]
    runs, done, total = [0] * len(names), 0, len(stages) * sum(counts)
    with ExitStack() as files:
        for name, of_task in zip(names, wanted):
            record = TaskRecord.of(name, folder, [one for of_stage in of_task.values() for one in of_stage])
            so_far.records.append(record)
            files.enter_context(record.file)
        for stage in stages:
            layout = _hybrid(pricer, through.allocation, order[: order.index(stage)])
            for task, name in enumerate(names):
                on_step("calibrating", done, total)
                done += counts[task]
                for run in runs_of(wanted[task].get(stage, [])):
                    model = replace(
                        bundle_model(memory.bundle(layout, [task]), name), folder=request.references.folders[name]
                    )
                    runs[task] += 1
                    for found in run_of(request, model, run, lambda *_step: None):
                        so_far.records[task].add(found)
                        if found.of is None:
                            so_far.arrays[task, found.wanted.tensor] = found.array
            # The groups of this block are made here, while what they read is in memory.
            layout = _hybrid(pricer, through.allocation, order[: order.index(stage) + 1])
            memory.bundle(layout, plan.all_tasks)
            memory.keep_only(memory.keys(layout, plan.all_tasks))
            so_far.arrays.clear()
    return [
        (record.entry(request), row_of(request, task, record.sizes, runs[task]))
        for task, record in enumerate(so_far.records)
    ]


def _hybrid(pricer: Pricer, allocation: Allocation, merged: list[str]) -> BundleLayout:
    """Return the layout in which the units of these stages are merged, and of all others each task has its own."""
    stages = stages_of(allocation)
    units = tuple(
        unit
        if stages[unit.name] in merged
        else replace(unit, groups=tuple(Group(tasks=(task,), method=None) for task in pricer.plan.all_tasks))
        for unit in allocation.units
    )
    return pricer.layout(replace(allocation, units=units))


def _observed(request: CalibrationRequest) -> "tuple[list[dict[str, list[Wanted]]], list[str]]":
    """Run each fine-tuned model once. Returns what is measured in each task's model by stage, and all stages in the
    order in which models first run them; those that no model runs come last."""
    assert request.through is not None
    plan, allocation = request.plan, request.through.allocation
    stage_of = tensor_stages(allocation)
    seen: dict[str, None] = {}
    wanted: list[dict[str, list[Wanted]]] = []
    for place in plan.all_tasks:
        aligned = {
            plan.whole_name(place, tensor.name): whole_of(tensor.name)[0]
            for tensor in plan.tensors
            if tensor.class_ is TensorClass.MERGEABLE and place in tensor.present
        }
        first: dict[str, None] = {}

        def on_built(
            model: nn.Module,
            names: Mapping[str, str],
            place: int = place,
            aligned: Mapping[str, str] = aligned,
            first: dict[str, None] = first,
        ) -> None:
            wanted.append(by_stage(allocation, wanted_of(plan, place, model, names, request.statistics)))
            modules = dict(model.named_modules())
            for name, _ in model.named_parameters():
                stage = stage_of.get(aligned.get(names.get(name, ""), ""))
                if stage is not None:
                    module = modules[name.rpartition(".")[0]]
                    module.register_forward_pre_hook(lambda *_call, stage=stage: first.setdefault(stage))
            model.register_forward_hook(_stop)

        with suppress(RunEnded):
            run_examples(request, request.references.of(plan.task_names[place])["fine_tuned"](), on_built=on_built)
        seen |= {stage: None for stage in first if stage not in seen}
    return wanted, [*seen, *(stage for stage in dict.fromkeys(stage_of.values()) if stage not in seen)]


def _stop(*_call: Any) -> None:
    raise RunEnded
