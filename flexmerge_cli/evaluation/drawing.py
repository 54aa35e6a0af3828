"""Scores the points of a curve: decides which layouts methods and sizes ask for, and has them scored.

Methods are scored one after another or, with `parallel`, in several processes; each has one model in memory.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.allocation import Allocation
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.cache import ScoreCache
from flexmerge_cli.evaluation.curve import Curve, CurveCut, CurveScorer, OnScore, Point, Unreached, in_order
from flexmerge_cli.evaluation.ensembles import ensembles
from flexmerge_cli.evaluation.memory import curve_chunk, largest_model
from flexmerge_cli.evaluation.plane import score_plane
from flexmerge_cli.evaluation.processes import in_processes
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.merging import calibration_of
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.curve import CurveMethod, CurveRequest
from flexmerge_cli.request.merge import MergeRequest, merge_request
from flexmerge_cli.request.size import Size

Job = CurveMethod | None
"""A method; None for the alternatives."""
Result = tuple[list[Point], list[Unreached]]

ALTERNATIVES = {
    "copies as fp32": merge_request(dtype="fp32"),
    "copies as bf16": merge_request(dtype="bf16"),
    "copies as int8 per row": merge_request(method="low_bit:bits=8,centre=none"),
}
"""The layouts that merge nothing: M models, each in fewer bits."""


def cuts_of(
    pricer: Pricer, sizes: Sequence[Size], method: CurveMethod, plan_path: str
) -> tuple[list[CurveCut], list[Unreached]]:
    """Lay out one method at every size that it reaches, and at its own. Sizes with equal allocations are one cut.

    A method's own size is the smallest that it reaches; for `auto` it is the size chosen when none is given. It is
    added if the method stores something for each task, or if no size was requested.
    """
    found: dict[Allocation, tuple[list[str], BundleLayout, str]] = {}
    unreached = []
    own: list[Size | None] = [None] if not sizes or method.stores_per_task else []
    for size in (*sizes, *own):
        asked = method.request.at(size)
        try:
            layout = allocate(pricer.plan, asked, pricer)
        except GateError as error:
            assert size is not None
            unreached.append(Unreached(method=method.name, size=size.text, message=error.message))
            continue
        key = replace(layout.allocation, merges=0, undone=0, fit="")
        texts = found.setdefault(key, ([], layout, command_of(plan_path, asked)))[0]
        texts += [size.text] if size is not None else []
    return [
        CurveCut(method=method.name, sizes=tuple(texts), layout=layout, command=command)
        for texts, layout, command in found.values()
    ], unreached


def alternatives_of(pricer: Pricer, plan_path: str) -> list[CurveCut]:
    """Lay out copies in fewer bits, if the family has more than one task to copy."""
    return [
        CurveCut(
            method=name, sizes=(), layout=allocate(pricer.plan, asked, pricer), command=command_of(plan_path, asked)
        )
        for name, asked in ALTERNATIVES.items()
    ]


def command_of(plan_path: str, asked: MergeRequest) -> str:
    """Return the `merge` command that writes the bundle."""
    return shlex.join(["flexmerge", "merge", plan_path, *asked.words(), "-o", "bundle/"])


@dataclass(kw_only=True)
class Drawing:
    """What one process needs to score points of a curve."""

    plan: Plan
    plan_path: Path
    spec: EvalSpec
    request: CurveRequest
    pricer: Pricer = field(init=False)
    scorer: CurveScorer = field(init=False)
    fine_tuned: dict[str, TaskModel] = field(init=False)
    base: dict[str, TaskModel] = field(init=False)

    def __post_init__(self) -> None:
        """Open the sources. Raises DataError, SourceError, and UsageError if the spec does not fit them."""
        from flexmerge_cli.engine.device import choose_device
        from flexmerge_cli.engine.pool import default_threads
        from flexmerge_cli.evaluation.in_memory import MemoryBundles
        from flexmerge_cli.evaluation.planned import planned_models

        request = self.request
        found = [calibration_of(method.request, self.plan) for method in request.methods if method.request.calibration]
        self.pricer = Pricer(self.plan, calibration=found[0] if found else None)
        sources = open_sources(self.plan, self.plan_path.absolute().parent, request.relocate, request.access)
        fetch(sources.to_fetch(), request.access)
        folders = sources.folders(self.plan)
        tasks = list(self.spec.tasks)
        device = None if request.device == "auto" else request.device
        cache = ScoreCache(overwrite=not request.reuse)
        scorer = Scorer(spec=self.spec, device=device, cache=cache, access=request.access)
        for task in tasks:  # report what does not fit before any weight is read
            scorer.examples(task, folders[task])
        self.fine_tuned, self.base = planned_models(self.plan, sources.located, folders, tasks)
        threads = request.threads or (1 if request.parallel > 1 else default_threads())
        memory = MemoryBundles(sources=sources.located, device=choose_device(request.device), threads=threads)
        self.scorer = CurveScorer(
            memory=memory, scorer=scorer, folders=folders, references=self.fine_tuned, reuse=request.reuse
        )

    def reference(self, task: str, model: TaskModel) -> Scored:
        """Score the fine-tuned model or the base, and remember the result."""
        scored = self.scorer.scorer.score(model, reference=self.fine_tuned[task])
        self.scorer.known(task, model.digest, scored)
        return scored

    def cuts(self, job: Job) -> tuple[list[CurveCut], list[Unreached]]:
        if job is None:
            return alternatives_of(self.pricer, str(self.plan_path)), []
        return cuts_of(self.pricer, self.request.sizes, job, str(self.plan_path))

    def fit(self, jobs: Sequence[Sequence[CurveCut]]) -> None:
        """Fit the memory of every job, each given by its cuts, to what is allowed. Raises UsageError."""
        memory, request = self.scorer.memory, self.request
        if request.max_memory is not None:
            memory.chunk_elements = curve_chunk(
                memory,
                [[cut.layout for cut in in_order(cuts)] for cuts in jobs],
                [self.plan.task_names.index(task) for task in self.spec.tasks],
                model=largest_model(self.spec, self.plan),
                max_memory=request.access.memory_left(request.max_memory) or 0,
                processes=request.parallel,
            )

    def run(self, job: Job, on_score: OnScore = lambda *_step: None) -> Result:
        cuts, unreached = self.cuts(job)
        self.fit([cuts])
        return list(self.scorer.points(cuts, on_score)), unreached


def draw(
    plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest, *, on_score: OnScore = lambda *_step: None
) -> Curve:
    """Score every method at every size. plan_path: as commands name it; sources are relative to its folder.

    Raises UsageError before a weight is read, DataError for sources that have changed since the plan.
    """
    for size in request.sizes:
        plan.target(size)
    drawing = Drawing(plan=plan, plan_path=plan_path, spec=spec, request=request)
    jobs: list[Job] = [*request.methods, *([None] if request.alternatives else [])]
    if request.max_memory is not None:
        drawing.fit([drawing.cuts(job)[0] for job in jobs])
    references: dict[str, dict[str, Scored]] = {"fine_tuned": {}, "base": {}}
    for who, models in (("fine_tuned", drawing.fine_tuned), ("base", drawing.base)):
        for done, (task, model) in enumerate(models.items()):
            on_score(f"{who.replace('_', '-')} models", done, len(models))
            references[who][task] = drawing.reference(task, model)
    found = None
    if request.ensembles:
        scorer, folders = drawing.scorer.scorer, drawing.scorer.folders
        found = tuple(ensembles(scorer, drawing.fine_tuned, folders, on_score=on_score))
    plane = None
    if request.plane is not None:
        scorer = drawing.scorer.scorer
        plane = score_plane(plan, request.plane, scorer, drawing.fine_tuned, drawing.base, on_score=on_score)
    if request.parallel > 1:
        results = _in_processes(drawing, jobs, on_score)
    else:
        results = [drawing.run(job, on_score) for job in jobs]
    by_job = dict(zip(jobs, results))
    return Curve(
        points=tuple(point for method in request.methods for point in by_job[method][0]),
        alternatives=tuple(by_job[None][0] if None in by_job else ()),
        unreached=tuple(item for method in request.methods for item in by_job[method][1]),
        ensembles=found,
        plane=plane,
        fine_tuned=references["fine_tuned"],
        base=references["base"],
        data={task: drawing.scorer.scorer.examples(task, drawing.scorer.folders[task]).digest for task in spec.tasks},
        models={task: {"fine_tuned": drawing.fine_tuned[task], "base": drawing.base[task]} for task in spec.tasks},
    )


def _in_processes(drawing: Drawing, jobs: Sequence[Job], on_score: OnScore) -> list[Result]:
    """Run each job in one of a few processes, and return the results in order."""
    alone = replace(drawing.request, access=drawing.request.access.for_process())
    prepare = partial(_prepared, drawing.plan, drawing.plan_path, drawing.spec, alone)

    def on_job(number: int) -> None:
        job = jobs[number]
        on_score(job.name if job is not None else "copies", number, len(jobs))

    return in_processes(prepare, jobs, parallel=drawing.request.parallel, on_job=on_job)


def _prepared(plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest) -> Callable[[Job], Result]:
    return Drawing(plan=plan, plan_path=plan_path, spec=spec, request=request).run
