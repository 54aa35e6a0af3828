"""Scores a bundle or its sources, in this process or in several: decides which models, and what to compare them with.

Each process has one model in memory at a time. drawing.py scores the curves of plans.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.evaluation.cache import ScoreCache
from flexmerge_cli.evaluation.evaluate import OnStep, evaluate, means, on_further_data
from flexmerge_cli.evaluation.gate import Gate, judge, require_pass
from flexmerge_cli.evaluation.memory import largest_model, require_memory
from flexmerge_cli.evaluation.planned import planned_models
from flexmerge_cli.evaluation.processes import in_processes
from flexmerge_cli.evaluation.references import References, Who, spec_references
from flexmerge_cli.evaluation.routed import require_routable, routed_record
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer, library_versions
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.planning.sources import OpenSources, open_sources


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What to score."""

    spec: EvalSpec
    bundle: Path | None = None
    plan: Path | None = None
    """The plan whose sources are the references; None for those that the spec names."""
    relocate: Mapping[str, str] = field(default_factory=dict)
    """New places of the plan's sources, as in MergeRequest."""
    sources: bool = False
    """Whether to score every task's fine-tuned model and the base, and no bundle."""
    cross: bool = False
    """Whether to score every model on the other tasks' data, too."""
    router: bool = False
    """Whether to score with the tasks that the bundle's router chooses, too."""
    device: str | None = None
    reuse: bool = True
    parallel: int = 1
    access: Access = ONLINE
    max_memory: int | None = None
    """The most bytes for the weights of the models that are in memory at a time."""
    gate: Gate = field(default_factory=Gate)
    """The limits on the drop from the fine-tuned scores; the verdict is in the document."""

    @property
    def num_processes(self) -> int:
        return min(self.parallel, len(self.spec.tasks))

    @property
    def num_models(self) -> int:
        """The models that are scored; an upper bound if the spec gives further models to only some tasks."""
        if self.num_processes > 1:
            return len(self.spec.tasks)  # one step per task
        named = any(task.checkpoint is not None for task in self.spec.tasks.values())
        references = 2 if self.plan is not None else named + (self.spec.base is not None)
        own = references if self.sources else 1 + references
        named_models = (self.plan is not None or named) + (not self.sources)  # those that --cross scores
        tasks = len(self.spec.tasks)
        further = sum(len(self.spec.others_of(task)) for task in self.spec.tasks)
        return own * (tasks + further) + self.router * tasks + self.cross * named_models * tasks * (tasks - 1)


def score_request(
    bundle: str | None,
    spec: Path,
    *,
    plan: Path | None = None,
    device: str | None = None,
    allow_exec: bool = False,
    corrupt: Sequence[str] = (),
    access: Access = ONLINE,
    on_progress: OnStep = lambda *_step: None,
    **asked: Any,
) -> ScoreRequest:
    """Make the request from words: find the bundle, or fetch it, and read the spec. asked: further fields.

    corrupt: corruptions instead of the spec's.

    Raises UsageError, SourceError, DataError, before a weight is read.
    """
    path: Path | None = None
    tasks: tuple[str, ...]
    kept: tuple[str, ...] = ()
    if plan is not None and not plan.is_file():
        raise SourceError(f"no plan at {plan}", hint="make one with `flexmerge plan`")
    if bundle is not None:
        located = locate(bundle, access, on_progress=on_progress)
        path, tasks = located.path, located.open().tasks
    elif plan is not None:
        loaded = load_plan(plan)
        tasks, kept = loaded.task_names, loaded.kept_names
    else:
        again = f"flexmerge eval bundle/ --spec {shlex.quote(str(spec))}"
        raise UsageError("give a bundle, or --sources and --plan", hint=again)
    read = read_spec(spec, tasks, unscorable=kept, allow_exec=allow_exec)
    return ScoreRequest(
        spec=read.with_corruptions(corrupt) if corrupt else read,
        bundle=path,
        plan=plan,
        device=None if device == "auto" else device,
        access=access,
        **asked,
    )


@dataclass(slots=True, kw_only=True)
class _Pairs:
    """The scores that a gate compares, by task."""

    merged: dict[str, Scored] = field(default_factory=dict)
    references: dict[str, Scored] = field(default_factory=dict)
    same: dict[str, bool] = field(default_factory=dict)

    def add(self, task: str, models: dict[str, TaskModel], scored: dict[str, Scored]) -> None:
        self.merged[task], self.references[task] = scored["merged"], scored["fine_tuned"]
        self.same[task] = models["merged"].digest == models["fine_tuned"].digest

    def verdict(self, spec: EvalSpec, gate: Gate) -> dict[str, Any]:
        return judge(
            self.merged, self.references, gate, self.same, not_scored=spec.not_scored, forgotten=spec.forgotten
        ).record()

    def join(self, other: "_Pairs") -> None:
        self.merged |= other.merged
        self.references |= other.references
        self.same |= other.same


def scores(request: ScoreRequest, *, on_step: OnStep = lambda *_step: None) -> dict[str, Any]:
    """Return the document, `flexmerge.eval/1`.

    Raises UsageError, before a weight is read, if spec, data and models do not fit together; DataError, SourceError.
    """
    tasks = list(request.spec.tasks)
    if request.router and (request.bundle is None or request.sources or request.parallel > 1):
        raise UsageError("--router scores a bundle, in one process", hint="leave out --sources and --parallel")
    if request.max_memory is not None:
        source = Bundle.open(request.bundle) if request.bundle is not None else load_plan(_planned(request))
        left = request.access.memory_left(request.max_memory) or 0
        require_memory(largest_model(request.spec, source), request.num_processes, left)
    if request.num_processes == 1:
        return _judged(request, *_scores(request, on_step))
    _check(request)
    alone = replace(request, parallel=1, access=request.access.for_process())

    def on_job(number: int) -> None:
        on_step(tasks[number], number, len(tasks))

    results = in_processes(partial(_prepared, alone), tasks, parallel=request.parallel, on_job=on_job)
    found, pairs = [record for record, _ in results], _Pairs()
    for _, of_task in results:
        pairs.join(of_task)
    records = {task: part["tasks"][task] for task, part in zip(tasks, found)}
    counts = {key: sum(part["evaluations"][key] for part in found) for key in found[0]["evaluations"]}
    document = found[0] | {"tasks": records, "mean": means(records), "evaluations": counts}
    return _judged(request, document | _joined(request.spec, found), pairs)


def _joined(spec: EvalSpec, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a document may have besides `tasks`, from documents of one task each."""
    records = {name: record for part in parts for name, record in part.get("unseen", {}).items()}
    for part in parts:
        for corruption, of in part.get("corrupted", {}).items():
            records |= {f"{task} {corruption}": record for task, record in of["tasks"].items()}
    found = on_further_data(spec, records)
    if "cross" in parts[0]:
        found["cross"] = {task: row for part in parts for task, row in part["cross"].items()}
    return found


def _judged(request: ScoreRequest, document: dict[str, Any], pairs: _Pairs) -> dict[str, Any]:
    if not request.gate:
        return document
    return document | {"gate": pairs.verdict(request.spec, request.gate)}


def _check(request: ScoreRequest) -> None:
    """Report errors in any task before the first is scored. Each process reads its own data again."""
    bundle, references = _opened(request)
    folders = (
        {task: bundle.config_folder(task) for task in request.spec.tasks} if bundle is not None else references.folders
    )
    for task in request.spec.tasks:
        for name in (task, *request.spec.others_of(task)):
            scorer = Scorer(spec=request.spec, device=request.device, cache=None, access=request.access)
            scorer.examples(name, folders[task])


def _prepared(request: ScoreRequest) -> Callable[[str], tuple[dict[str, Any], _Pairs]]:
    return partial(_scores_of, request)


def _scores_of(request: ScoreRequest, task: str) -> tuple[dict[str, Any], _Pairs]:
    spec = request.spec if request.cross else request.spec.only(task)
    return _scores(replace(request, spec=spec), lambda *_step: None, tasks=[task])


def _scores(
    request: ScoreRequest, on_step: OnStep, tasks: Sequence[str] | None = None
) -> tuple[dict[str, Any], _Pairs]:
    bundle, references = _opened(request)
    cache = ScoreCache(overwrite=not request.reuse)
    scorer = Scorer(spec=request.spec, device=request.device, cache=cache, access=request.access)
    pairs, merged = _Pairs(), dict[str, Scored]()
    if request.router:
        assert bundle is not None
        require_routable(bundle, scorer)

    def on_scored(task: str, models: dict[str, TaskModel], scored: dict[str, Scored]) -> None:
        if request.gate:
            pairs.add(task, models, scored)
        if request.router:
            merged[task] = scored["merged"]

    document = evaluate(
        None if request.sources else bundle,
        request.spec,
        scorer=scorer,
        references=references,
        tasks=tasks,
        cross=request.cross,
        on_step=on_step,
        on_scored=on_scored,
    )
    if request.router:
        assert bundle is not None
        document["router"] = routed_record(bundle, scorer, merged, on_step)
        document["evaluations"] = scorer.counts
    return document, pairs


def _opened(request: ScoreRequest) -> tuple[Bundle | None, References]:
    """Open bundle and references. Reads headers. Raises UsageError for a gate that has nothing to compare with."""
    bundle = Bundle.open(request.bundle, tasks=list(request.spec.tasks)) if request.bundle is not None else None
    if bundle is not None:
        for task in request.spec.tasks:
            bundle.check_files(task, weights=False)  # the examples are prepared with them, also for --sources
    if request.plan is not None:
        references = planned_references(request)
    else:
        assert bundle is not None
        references = spec_references(request.spec, bundle, access=request.access, needed=request.sources)
    if request.sources and bundle is not None and not references.folders:
        folders = {task: bundle.config_folder(task) for task in request.spec.tasks}
        references = replace(references, folders=folders)
    if request.gate:
        _require_pairs(request, references)
    return bundle, references


def _require_pairs(request: ScoreRequest, references: References) -> None:
    if request.sources:
        raise UsageError(
            "a gate compares a bundle with its sources, but --sources scores only the sources",
            hint="leave out the limits",
        )
    for task in request.spec.tasks:
        if "fine_tuned" not in references.of(task):
            raise UsageError(
                f"task `{task}` has no fine-tuned model, with which a gate compares",
                hint="--plan plan.json, or checkpoint: path/of/the/fine-tuned/model in the spec",
            )


def planned_references(request: ScoreRequest) -> References:
    """Return the sources of a plan as models. Reads headers; weights are read and checked when a model is opened.

    Raises SourceError, DataError.
    """
    path = _planned(request)
    plan, folder = load_plan(path), path.absolute().parent
    return references_of(plan, folder, request.spec, relocate=request.relocate, access=request.access)


def _planned(request: ScoreRequest) -> Path:
    assert request.plan is not None
    return request.plan


def references_of(
    plan: Plan, folder: Path, spec: EvalSpec, *, relocate: Mapping[str, str] | None = None, access: Access = ONLINE
) -> References:
    """Return the references from a plan. folder: the folder that its relative sources are relative to. Raises
    UsageError for a task that the plan keeps as an adapter, or does not have."""
    for task in spec.tasks:
        if task not in plan.task_names:
            raise spec.document.error(
                ("tasks", task),
                "the plan keeps it exactly, as an adapter, and has no model of it"
                if task in plan.reader_names
                else "the plan has no such task",
                hint=f"not_scored: [{task}], or name its fine-tuned model by `checkpoint` and leave out --plan",
            )
    sources = open_sources(plan, folder, relocate, access)
    folders = sources.folders(plan)

    def opened(task: str, who: Who) -> TaskModel:
        _fetch(sources, plan.task_names.index(task), access)
        fine_tuned, base = planned_models(plan, sources.located, folders, [task])
        return (fine_tuned if who == "fine_tuned" else base)[task]

    models = {task: {who: partial(opened, task, who) for who in ("fine_tuned", "base")} for task in spec.tasks}
    return References(models=models, folders=folders)


@dataclass(kw_only=True)
class BundleGate:
    """The gate that a bundle must pass before it is published. Everything but its scores is known before it is made."""

    spec: EvalSpec
    gate: Gate
    references: References
    device: str | None = None
    document: dict[str, Any] | None = None
    """`flexmerge.eval/1` with the verdict, after `require`."""

    def __post_init__(self) -> None:
        """Prepare the data. Raises UsageError, SourceError and DataError if spec and data do not fit; reads no
        weights."""
        scorer, folders = self._scorer(), self.references.folders
        self._data = {
            name: scorer.examples(name, folders[task]).digest or None
            for task in self.spec.tasks
            for name in (task, *self.spec.others_of(task))
        }

    def _scorer(self) -> Scorer:
        return Scorer(spec=self.spec, device=self.device)

    @property
    def record(self) -> dict[str, Any]:
        """The manifest's `gate` (formats/manifest.py)."""
        limits = {"max_drop": self.gate.max_drop, "max_mean_drop": self.gate.max_mean_drop}
        return {
            **{name: limit.text for name, limit in limits.items() if limit is not None},
            "spec": self.spec.sha256,
            "data": {task: self._data[task] for task in self.spec.tasks},
            "not_scored": list(self.spec.not_scored),
            "versions": library_versions(),
        }

    def require(self, folder: Path, on_step: OnStep) -> dict[str, Any]:
        """Score the finished bundle, wherever it lies, and return its scores.

        Raises GateError unless it passes, DataError if the data have changed.
        """
        pairs = _Pairs()
        document = evaluate(
            Bundle.open(folder), self.spec, scorer=self._scorer(), references=self.references, on_step=on_step,
            on_scored=pairs.add,
        )  # fmt: skip
        for name, record in (document["tasks"] | document.get("unseen", {})).items():
            if record["data"] != self._data[name]:
                raise DataError(f"the data of task `{name}` changed during the run", hint="run it again")
        self.document = document | {"gate": pairs.verdict(self.spec, self.gate)}
        require_pass(self.document["gate"], "the bundle is not published: it")
        return self.document


def _fetch(sources: OpenSources, task: int, access: Access) -> None:
    opened = [sources.tasks[task], *([sources.base] if sources.base is not None else [])]
    fetch([file for checkpoint in opened for file in checkpoint.remote.values()], access)
