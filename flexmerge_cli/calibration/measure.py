"""Measures one task's model on its examples, and records what it finds in the task's file of a calibration.

A model runs once for as many arrays as fit into HELD_BYTES, and again for the next ones; every array is written when
its run ends.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmerge_cli.allocation.allocation import Allocation
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, run_examples
from flexmerge_cli.calibration.write import ArrayFile
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.calibration import (
    STATISTICS,
    CalibratedTask,
    FisherEntry,
    InputsEntry,
    OutputsEntry,
    Statistic,
)
from flexmerge_cli.formats.plan_file import Plan

if TYPE_CHECKING:
    from flexmerge_cli.calibration.collect import CollectedArray, Wanted

# The most that the sums of one run take, beside the model. Those of a ViT-B/32 take 0.6 GB; a single larger sum gets a
# run of its own.
HELD_BYTES = 512 << 20


def wanted_of(
    plan: Plan, place: int, model: Any, names: Mapping[str, str], statistics: Sequence[Statistic]
) -> "list[Wanted]":
    """Return what is measured in a task's model, for the tensors that merge, in the plan's order.

    names: maps each name in the model's state to the task's own name. Tensors of which tasks have rows of their own
    are left out; for split tensors only `inputs` and `outputs` are measured, for the whole.
    """
    from flexmerge_cli.calibration.collect import Wanted, layout_of

    shapes = {}
    for tensor in plan.tensors:
        has = tensor.class_ is TensorClass.MERGEABLE and place in tensor.present
        if has and plan.rows_of(tensor.name, place) is None:
            whole = whole_of(tensor.name)[0]
            own = plan.whole_name(place, tensor.name)
            shapes[own] = whole, plan.whole_shape(tensor.name, tensor.shape_of(place), place), whole != tensor.name
    modules, found = dict(model.named_modules()), []
    for name, parameter in model.named_parameters():
        if names.get(name) not in shapes:
            continue
        tensor_name, shape, is_split = shapes[names[name]]
        if tuple(parameter.shape) != shape:
            continue
        path, _, last = name.rpartition(".")
        layout = layout_of(modules[path]) if last == "weight" else None
        for statistic in statistics:
            if statistic == "fisher":
                if is_split:
                    continue
            elif layout is None or (statistic == "outputs" and layout == "embedding"):
                continue
            at = name if statistic == "fisher" else path
            found.append(Wanted(tensor=tensor_name, statistic=statistic, module=at, layout=layout, shape=shape))
    return found


def runs_of(wanted: "Sequence[Wanted]") -> "list[list[Wanted]]":
    """Divide what is measured into runs of the model that fit into memory, with gradients in runs of their own."""
    runs: list[list[Wanted]] = []
    for is_fisher in (False, True):
        held = 0
        for one in wanted:
            if (one.statistic == "fisher") is is_fisher:
                size = 4 * one.num_elements * (2 if is_fisher else 1)
                if not held or held + size > HELD_BYTES:
                    runs.append([])
                    held = 0
                runs[-1].append(one)
                held += size
    return runs


def stages_of(allocation: Allocation) -> dict[str, str]:
    """Map each unit of a merge to the stage in which it merges, which has the name of the stage's first unit.

    Units with parts of one tensor merge in one stage, because the inputs of its layer are measured once.
    """
    found: dict[str, str] = {}
    by_whole: dict[str, str] = {}
    for unit in allocation.units:
        wholes = {whole for whole, part in map(whole_of, unit.tensors) if part is not None}
        joined = {by_whole[whole] for whole in wholes if whole in by_whole}
        first = next((stage for stage in found.values() if stage in joined), unit.name)
        for known in (found, by_whole):
            known |= {name: first for name, stage in known.items() if stage in joined}
        found[unit.name] = first
        by_whole |= dict.fromkeys(wholes, first)
    return found


def tensor_stages(allocation: Allocation) -> dict[str, str]:
    """Map each tensor of a merge, a split one as a whole, to the stage in which it merges."""
    stages = stages_of(allocation)
    return {whole_of(name)[0]: stages[unit.name] for unit in allocation.units for name in unit.tensors}


def by_stage(allocation: Allocation, wanted: "Sequence[Wanted]") -> "dict[str, list[Wanted]]":
    """Group what is measured by the stages of a merge, in its order; stages without any are left out."""
    stage_of = tensor_stages(allocation)
    found: dict[str, list[Wanted]] = {stage: [] for stage in stage_of.values()}
    for one in wanted:
        found[stage_of[one.tensor]].append(one)
    return {stage: of_stage for stage, of_stage in found.items() if of_stage}


@dataclass(slots=True, kw_only=True)
class TaskRecord:
    """One task's file of a calibration while it is written, and its entry in the index."""

    task: str
    file: ArrayFile
    entries: dict[Statistic, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in STATISTICS})
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """The bytes that were written, by tensor and statistic."""

    @staticmethod
    def of(task: str, folder: Path, wanted: "Sequence[Wanted]") -> "TaskRecord":
        """Open the file for all arrays that may come."""
        names = [(f"{one.tensor}@{one.statistic}", one.num_elements) for one in wanted]
        return TaskRecord(task=task, file=ArrayFile(folder / f"tasks/{task}.safetensors", names))

    def add(self, found: "CollectedArray") -> None:
        """Write an array, unless no example reached the layer. Raises DataError if it is not finite."""
        one = found.wanted
        if not np.isfinite(found.array).all():
            what = {"inputs": "inputs", "fisher": "gradients", "outputs": "outputs"}[one.statistic]
            raise DataError(
                f"task `{self.task}`: the {what} of `{one.tensor}` are not finite on these examples",
                hint="check the data, or give the spec `dtype: float32`",
            )
        if not found.count:
            return
        if found.of is None:
            self.file.add(f"{one.tensor}@{one.statistic}", found.array)
            self.sizes[one.tensor, one.statistic] = found.array.nbytes
        self.entries[one.statistic][one.tensor] = _entry(found)

    def entry(self, request: CalibrationRequest) -> CalibratedTask:
        """Return the entry in the index, when the file is complete."""
        plan, path = request.plan, self.file.path
        examples = request.scorer.examples(self.task, request.references.folders[self.task])
        return CalibratedTask(
            weights=plan.tasks[plan.task_names.index(self.task)].fingerprint,
            data=examples.digest,
            n=examples.n,
            file=f"tasks/{self.task}.safetensors",
            bytes=path.stat().st_size,
            sha256=self.file.sha256,
            inputs=self.entries["inputs"],
            fisher=self.entries["fisher"],
            outputs=self.entries["outputs"],
        )


def measured(
    request: CalibrationRequest, place: int, folder: Path, on_step: OnStep
) -> tuple[CalibratedTask, dict[str, Any]]:
    """Run one task's model and write its file. Returns its entry and its row."""
    name = request.plan.task_names[place]
    model = request.references.of(name)["fine_tuned"]()
    n = request.scorer.examples(name, request.references.folders[name]).n
    wanted = observed(request, place, model)
    runs = runs_of(wanted)
    record = TaskRecord.of(name, folder, wanted)
    with record.file:
        for number, run in enumerate(runs):

            def on_example(done: int, _total: int, number: int = number) -> None:
                on_step("calibrating", (place * len(runs) + number) * n + done, len(request.plan.tasks) * len(runs) * n)

            for found in run_of(request, model, run, on_example):
                record.add(found)
    return record.entry(request), row_of(request, place, record.sizes, len(runs))


def row_of(
    request: CalibrationRequest, place: int, sizes: Mapping[tuple[str, str], int], num_runs: int
) -> dict[str, Any]:
    """Return the row of one task. sizes: bytes by tensor and statistic. num_runs: how often its model runs."""
    name = request.plan.task_names[place]
    largest = max(sizes, key=lambda key: sizes[key], default=None)
    return {
        "task": name,
        "examples": request.scorer.examples(name, request.references.folders[name]).n,
        "runs": num_runs,
        "bytes": {
            statistic: sum(size for (_, of), size in sizes.items() if of == statistic)
            for statistic in request.statistics
        },
        "largest": "@".join(largest) if largest else None,
        "largest_bytes": sizes[largest] if largest else 0,
    }


def _entry(found: "CollectedArray") -> InputsEntry | FisherEntry | OutputsEntry:
    one = found.wanted
    if one.statistic == "fisher":
        return FisherEntry(mean=float(found.array.mean(dtype=np.float64)))
    if one.statistic == "outputs":
        return OutputsEntry(rows=found.count)
    assert one.layout is not None
    return InputsEntry(layout=one.layout, rows=found.count, of=found.of)


class RunEnded(Exception):
    """Raised to end a run that only had to build the model."""


def observed(request: CalibrationRequest, place: int, model: TaskModel) -> "list[Wanted]":
    """Return what is measured in a model, as soon as it is built."""
    found: list[Wanted] = []

    def on_built(built: Any, names: Mapping[str, str]) -> None:
        found.extend(wanted_of(request.plan, place, built, names, request.statistics))
        raise RunEnded

    with suppress(RunEnded):
        run_examples(request, model, on_built=on_built)
    return found


def run_of(
    request: CalibrationRequest, model: TaskModel, wanted: "Sequence[Wanted]", on_example: Callable[[int, int], None]
) -> "list[CollectedArray]":
    """Run a model on its examples, and return what was measured."""
    from flexmerge_cli.calibration.collect import measuring

    results: list[Callable[[], list[CollectedArray]]] = []
    with ExitStack() as stack:

        def on_built(built: Any, _names: Mapping[str, str]) -> None:
            measured = measuring(built, wanted, task=model.task, seed=request.seed)
            results.append(stack.enter_context(measured))

        run_examples(request, model, on_built=on_built, on_example=on_example)
        return results[0]()
