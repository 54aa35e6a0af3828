"""Makes a calibration from a plan and examples. One fine-tuned model is in memory at a time.

A model runs once for as many arrays as fit into HELD_BYTES, and again for the next ones; every array is written when
its run ends.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.calibration.write import ArrayFile
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples
from flexmerge_cli.evaluation.references import References
from flexmerge_cli.evaluation.running import references_of
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.scoring import Scorer, library_versions
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.calibration import (
    INDEX_NAME,
    STATISTICS,
    CalibratedTask,
    CalibrationSettings,
    FisherEntry,
    Index,
    InputsEntry,
    OutputsEntry,
    Statistic,
    is_calibration,
    read_index,
)
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.version import GENERATOR

if TYPE_CHECKING:
    from flexmerge_cli.calibration.collect import CollectedArray, Wanted

OnStep = Callable[[str, int, int], None]

# The most that the sums of one run take, beside the model. Those of a ViT-B/32 take 0.6 GB; a single larger sum gets a
# run of its own.
HELD_BYTES = 512 << 20
DEFAULT: tuple[Statistic, ...] = ("inputs", "fisher")
OUTSIDE = ("python", "command", "lm-eval")
HAVE_LOGITS = ("image-classification", "text-classification", "regression", "causal-lm")
IMAGES = ("image-classification", "zero-shot-image-classification")


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What `calibrate` is to measure. Made by `calibration_request`."""

    plan: Plan
    plan_path: Path
    spec: EvalSpec
    """The spec, with as many examples of each task as are measured and no metric that needs labels."""
    statistics: tuple[Statistic, ...]
    examples: int
    seed: int
    device: str | None
    references: References
    scorer: Scorer


def parse_statistics(text: str | None) -> tuple[Statistic, ...]:
    """Parse `inputs,fisher,outputs`, or some of them. Raises UsageError."""
    if text is None:
        return DEFAULT
    words = [word.strip() for word in text.split(",")]
    unknown = [word for word in words if word not in STATISTICS]
    if unknown:
        raise UsageError(f"--statistics {text}: `{unknown[0]}` is not known", hint=f"some of: {','.join(STATISTICS)}")
    return tuple(word for word in STATISTICS if word in words)


def calibration_request(
    plan_path: Path,
    spec_path: Path,
    *,
    statistics: str | None = None,
    examples: int = 256,
    device: str | None = None,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    kinds: Collection[str] | None = None,
) -> CalibrationRequest:
    """Read plan, spec and examples, and check that they fit. Reads no weights.

    examples: the largest number for each task, at least 1. If a task has more, they are drawn at random with the spec's
    seed, or 0. kinds: the only kinds of tasks that can be used; None: those that can be observed.
    Raises UsageError, SourceError, DataError.
    """
    wanted, plan = parse_statistics(statistics), load_plan(plan_path)
    if plan.pools_lora:
        raise UsageError("a pool of LoRA adapters has no models to run", hint="plan with --adapters merge")
    spec = read_spec(spec_path, plan.task_names, unscorable=plan.kept_names)
    if spec.forgotten or spec.not_scored:
        missing = ", ".join([*spec.forgotten, *spec.not_scored])
        raise spec.document.error(("tasks",), f"no examples of {missing}", hint="a calibration is of every task")
    tasks = {}
    for name in spec.tasks:
        settled, kind = spec.settled(name), spec.kind(name)
        if kind.name in OUTSIDE:
            said = f"`{kind.name}` runs models of its own, which cannot be observed"
            raise spec.document.error(("tasks", name, "kind"), said, hint="a kind that builds the model itself")
        if kinds is not None and kind.name not in kinds:
            raise spec.document.error(
                ("tasks", name, "kind"), f"`{kind.name}` has no logits of classes", hint=f"one of: {', '.join(kinds)}"
            )
        if kinds is None and "fisher" in wanted and kind.name not in HAVE_LOGITS:
            said = f"no Fisher information of `{kind.name}`, whose model alone gives no probabilities"
            raise spec.document.error(("tasks", name, "kind"), said, hint="--statistics inputs,outputs")
        limit = min(examples, settled.limit or examples)
        changes: dict[str, Any] = {"limit": limit, "seed": settled.seed or 0}
        changes["metric"] = AGREEMENT if AGREEMENT in kind.metrics else None  # It reads no labels.
        if kind.name not in IMAGES:
            changes["batch_size"] = 1  # Padding would count as inputs.
        tasks[name] = settled.model_copy(update=changes)
    spec = spec.model_copy(update={"tasks": tasks})
    references = references_of(plan, plan_path.absolute().parent, spec, relocate=relocate, access=access)
    scorer = Scorer(spec=spec, device=device, cache=None, access=access)
    for name in spec.tasks:
        scorer.examples(name, references.folders[name])
    return CalibrationRequest(
        plan=plan, plan_path=plan_path, spec=spec, statistics=wanted, examples=examples, seed=spec.seed or 0,
        device=device, references=references, scorer=scorer,
    )  # fmt: skip


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
        measured = [_measure(request, place, folder, on_step) for place in request.plan.all_tasks]
        index = Index(
            generator=GENERATOR,
            settings=CalibrationSettings(
                statistics=request.statistics,
                examples=request.examples,
                seed=request.seed,
                device=request.scorer.run(request.plan.task_names[0]).device.split(":")[0],
                dtypes={name: task.dtype for name, task in request.spec.tasks.items()},
                spec=request.spec.sha256,
            ),
            versions=library_versions(),
            tasks={row["task"]: entry for entry, row in measured},
        )
        (folder / INDEX_NAME).write_bytes(index.dump())
    return [row for _, row in measured]


def expected_sizes(request: CalibrationRequest) -> list[dict[str, Any]]:
    """Return the most bytes that each task's file will take, and how often its model runs. Reads no weights.

    Layers that share their inputs, such as q, k and v, store them once; this is not known before the model runs.
    """
    found = []
    for place in request.plan.all_tasks:
        wanted = _observed(request, place, _unread(request, place))
        found.append(
            _row(request, place, {(one.tensor, one.statistic): 4 * one.num_elements for one in wanted}, wanted)
        )
    return found


def _row(
    request: CalibrationRequest, place: int, sizes: Mapping[tuple[str, str], int], wanted: "Sequence[Wanted]"
) -> dict[str, Any]:
    """Return the row of one task. sizes: bytes by tensor and statistic."""
    name = request.plan.task_names[place]
    largest = max(sizes, key=lambda key: sizes[key], default=None)
    return {
        "task": name,
        "examples": request.scorer.examples(name, request.references.folders[name]).n,
        "runs": len(_runs(wanted)),
        "bytes": {
            statistic: sum(size for (_, of), size in sizes.items() if of == statistic)
            for statistic in request.statistics
        },
        "largest": "@".join(largest) if largest else None,
        "largest_bytes": sizes[largest] if largest else 0,
    }


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


def wanted_of(
    plan: Plan, place: int, model: Any, names: Mapping[str, str], statistics: Sequence[Statistic]
) -> "list[Wanted]":
    """Return what is measured in a task's model, for the tensors that merge, in the plan's order.

    names: maps each name in the model's state to the task's own name. Tensors of vocabularies that differ are left out;
    for split tensors only `inputs` and `outputs` are measured, for the whole.
    """
    from flexmerge_cli.calibration.collect import Wanted, layout_of

    shapes = {}
    for tensor in plan.tensors:
        if tensor.class_ is TensorClass.MERGEABLE and place in tensor.present and plan.vocabulary(tensor.name) is None:
            whole = whole_of(tensor.name)[0]
            own = whole_of(plan.own_name(place, tensor.name))[0]
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


def _runs(wanted: "Sequence[Wanted]") -> "list[list[Wanted]]":
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


def _measure(
    request: CalibrationRequest, place: int, folder: Path, on_step: OnStep
) -> tuple[CalibratedTask, dict[str, Any]]:
    """Run one task's model and write its file. Returns its entry and its row."""
    plan, name = request.plan, request.plan.task_names[place]
    model = request.references.of(name)["fine_tuned"]()
    examples = request.scorer.examples(name, request.references.folders[name])
    path = f"tasks/{name}.safetensors"
    wanted = _observed(request, place, model)
    runs = _runs(wanted)
    total = len(plan.tasks) * len(runs) * examples.n
    entries: dict[Statistic, dict[str, Any]] = {statistic: {} for statistic in STATISTICS}
    sizes: dict[tuple[str, str], int] = {}
    with ArrayFile(folder / path, [(f"{one.tensor}@{one.statistic}", one.num_elements) for one in wanted]) as file:
        for number, run in enumerate(runs):

            def on_example(done: int, _total: int, number: int = number) -> None:
                on_step("calibrating", (place * len(runs) + number) * examples.n + done, total)

            for found in _run(request, model, run, on_example):
                _check(found, name)
                if not found.count:
                    continue  # No example reached the layer.
                one = found.wanted
                if found.of is None:
                    file.add(f"{one.tensor}@{one.statistic}", found.array)
                    sizes[one.tensor, one.statistic] = found.array.nbytes
                entries[one.statistic][one.tensor] = _entry(found)
    entry = CalibratedTask(
        weights=plan.tasks[place].fingerprint,
        data=examples.digest,
        n=examples.n,
        file=path,
        bytes=(folder / path).stat().st_size,
        sha256=file.sha256,
        inputs=entries["inputs"],
        fisher=entries["fisher"],
        outputs=entries["outputs"],
    )
    return entry, _row(request, place, sizes, wanted)


def _entry(found: "CollectedArray") -> InputsEntry | FisherEntry | OutputsEntry:
    one = found.wanted
    if one.statistic == "fisher":
        return FisherEntry(mean=float(found.array.mean(dtype=np.float64)))
    if one.statistic == "outputs":
        return OutputsEntry(rows=found.count)
    assert one.layout is not None
    return InputsEntry(layout=one.layout, rows=found.count, of=found.of)


def _check(found: "CollectedArray", task: str) -> None:
    if not np.isfinite(found.array).all():
        what = {"inputs": "inputs", "fisher": "gradients", "outputs": "outputs"}[found.wanted.statistic]
        raise DataError(
            f"task `{task}`: the {what} of `{found.wanted.tensor}` are not finite on these examples",
            hint="check the data, or give the spec `dtype: float32`",
        )


class _Built(Exception):
    """Raised to end a run that only had to build the model."""


def _observed(request: CalibrationRequest, place: int, model: TaskModel) -> "list[Wanted]":
    """Return what is measured in a model, as soon as it is built."""
    found: list[Wanted] = []

    def on_built(built: Any, names: Mapping[str, str]) -> None:
        found.extend(wanted_of(request.plan, place, built, names, request.statistics))
        raise _Built

    with suppress(_Built):
        run_examples(request, model, on_built=on_built)
    return found


def _run(
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


def run_examples(request: CalibrationRequest, model: TaskModel, **run: Any) -> Examples:
    """Run a task's model on its examples, and return these. run: fields of Run."""
    spec, scorer = request.spec, request.scorer
    examples = scorer.examples(model.task, model.folder)
    spec.kind(model.task).score(model, spec.tasks[model.task], examples, replace(scorer.run(model.task), **run))
    return examples
