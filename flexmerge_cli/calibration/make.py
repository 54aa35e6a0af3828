"""Makes a calibration from a plan and examples: `calibrate`. One model is in memory at a time."""

from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.calibration.measure import by_stage, measured, observed, row_of, runs_of
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, Through
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.scoring import library_versions
from flexmerge_cli.formats.calibration import (
    INDEX_NAME,
    CalibrationSettings,
    Index,
    ThroughEntry,
    is_calibration,
    read_index,
)
from flexmerge_cli.request.merge import typed
from flexmerge_cli.version import GENERATOR


def calibration_files(folder: Path) -> set[str] | None:
    """Return the files that `calibrate` wrote into a folder; None if it is not a calibration."""
    if not is_calibration(folder):
        return None
    return {INDEX_NAME, *(entry.file for entry in read_index(folder)[0].tasks.values())}


def check_calibration_place(output: Path, request: CalibrationRequest, *, force: bool) -> None:
    """Refuse an output that cannot be written, before any weight is read."""
    check_apart(output, [request.plan_path, request.spec.document.path, *request.references.folders.values()])
    check_target(output, force=force, ours=calibration_files)


def calibrate(
    request: CalibrationRequest, output: Path, *, force: bool = False, on_step: OnStep = lambda *_step: None
) -> list[dict[str, Any]]:
    """Measure every task and write the calibration. Returns the rows of `expected_sizes`, with the actual numbers.

    Raises DataError for sources that differ from the plan's, and for activations or gradients that are not finite.
    """
    check_calibration_place(output, request, force=force)
    with publish(output, force=force, ours=calibration_files) as folder:
        (folder / "tasks").mkdir()
        if request.through is not None:
            from flexmerge_cli.calibration.through import measured_through

            rows = measured_through(request, request.through, folder, on_step)
        else:
            rows = [measured(request, place, folder, on_step) for place in request.plan.all_tasks]
        index = Index(
            generator=GENERATOR,
            settings=CalibrationSettings(
                statistics=request.statistics,
                examples=request.examples,
                seed=request.seed,
                device=request.scorer.run(request.plan.task_names[0]).device.split(":")[0],
                dtypes={name: task.dtype for name, task in request.spec.tasks.items()},
                spec=request.spec.sha256,
                through=_entry(request.through),
            ),
            versions=library_versions(),
            tasks={row["task"]: entry for entry, row in rows},
        )
        (folder / INDEX_NAME).write_bytes(index.dump())
    return [row for _, row in rows]


def expected_sizes(request: CalibrationRequest) -> list[dict[str, Any]]:
    """Return the most bytes that each task's file will take, and how often its model runs. Reads no weights.

    Layers that share their inputs, such as q, k and v, store them once; this is not known before the model runs.
    """
    found = []
    for place in request.plan.all_tasks:
        wanted = observed(request, place, _unread(request, place))
        sizes: dict[tuple[str, str], int] = {(one.tensor, one.statistic): 4 * one.num_elements for one in wanted}
        stages = [wanted] if request.through is None else by_stage(request.through.allocation, wanted).values()
        found.append(row_of(request, place, sizes, sum(len(runs_of(stage)) for stage in stages)))
    return found


def _entry(through: Through | None) -> ThroughEntry | None:
    if through is None:
        return None
    return ThroughEntry(request=typed(through.request), groups=through.allocation.digest())


def _unread(request: CalibrationRequest, place: int) -> TaskModel:
    """Return a task's model with untouched memory in place of its weights, from which its layers can be listed."""
    import torch

    name, shapes = request.plan.task_names[place], request.plan.shapes_of(place)
    return TaskModel(
        task=name,
        weights={own: torch.empty(shape) for own, shape in shapes.items()},
        folder=request.references.folders[name],
        digest="",
    )
