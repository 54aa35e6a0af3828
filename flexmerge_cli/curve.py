"""`eval --plan`: a plan, methods and sizes in, scored points out. Which bills are asked for, and who scores them.

Methods are drawn one after another, or, with `parallel`, in processes of their own; each has one model in memory.
"""

import multiprocessing
import re
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

from flexmerge_cli.allocation.allocation import Allocation
from flexmerge_cli.allocation.auto_options import parse_auto
from flexmerge_cli.allocation.bill import Bill, Pricer
from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.allocation.size import PATTERN, parse_size
from flexmerge_cli.checkpoint.dtypes import CASTS
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.evaluation.cache import ScoreCache
from flexmerge_cli.evaluation.curve import Curve, CurveScorer, Cut, OnScore, Point, Unreached
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.merging import MergeRequest, allocate, check_request, method_use
from flexmerge_cli.methods.coded import declare
from flexmerge_cli.methods.registry import all_methods, parse_call, resolve
from flexmerge_cli.reopening import open_sources

MAX_SIZES = 1000
ALTERNATIVES = {
    "copies as fp32": MergeRequest(dtype="F32"),
    "copies as bf16": MergeRequest(dtype="BF16"),
    "copies as int8 per row": MergeRequest(method="low_bit:bits=8,centre=none"),
}
"""What a team can do without merging anything: M models, each smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRequest:
    """What `eval --plan` is asked."""

    methods: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    """Empty: each method at its own size."""
    common: MergeRequest = field(default_factory=MergeRequest)
    """Steps, calibration, methods by block, cast and fit of every point."""
    reuse: bool = True
    alternatives: bool = True
    parallel: int = 1
    device: str = "auto"
    threads: int | None = None


def parse_sizes(text: str, *, num_tasks: int, one_model_bytes: int) -> tuple[str, ...]:
    """`0.75x:8x:0.25x` (both ends), `1x,2x,600MiB`, or both, by commas. Raises UsageError."""
    found: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        found += _range(item) if ":" in item else [item]
    for size in found:
        parse_size(size, num_tasks=num_tasks, one_model_bytes=one_model_bytes)
    if not found:
        raise UsageError(f"--sizes `{text}` names no size", hint="--sizes 1x:8x:1x, or 1x,1.5x,2x")
    return tuple(dict.fromkeys(found))


def _range(text: str) -> list[str]:
    matches = [PATTERN.fullmatch(end.strip()) for end in text.split(":")]
    if len(matches) != 3 or None in matches or len({match[2] for match in matches if match}) != 1:
        raise UsageError(f"`{text}` is no range of sizes", hint="from, to and step, of one unit: 0.75x:8x:0.25x")
    first, last, step = (Decimal(match[1]) for match in matches if match)
    unit = next(match[2] for match in matches if match)
    if step <= 0 or last < first or (last - first) / step >= MAX_SIZES:
        raise UsageError(f"`{text}` steps from {first} to {last} by {step}", hint="upwards, in at most 1000 steps")
    count = int((last - first) / step) + 1
    return [f"{_plain(first + number * step)}{unit}" for number in range(count)]


def _plain(value: Decimal) -> str:
    return re.sub(r"\.?0+$", "", f"{value:f}") if "." in f"{value:f}" else f"{value:f}"


def parse_methods(text: str, plan: Plan) -> tuple[str, ...]:
    """`auto;emr;low_bit:bits=2`, by semicolons; `all`: every method, and `auto` where the plan has what it needs."""
    found: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(";"))):
        if item == "all":
            found += (["auto"] if plan.settings.statistics == "all" else []) + list(all_methods())
        else:
            found.append(item)
    if not found:
        raise UsageError(f"--methods `{text}` names no method", hint="--methods 'auto;emr;low_bit:bits=2'")
    return tuple(dict.fromkeys(found))


def check_curve(plan: Plan, request: CurveRequest) -> None:
    """What is wrong with methods and sizes, before a weight is read. Raises UsageError."""
    for method in request.methods:
        asked = _asked(request.common, method, None)
        check_request(asked, len(plan.tasks))
        if parse_auto(method) is None:
            method_use(asked, method)


def cuts_of(pricer: Pricer, request: CurveRequest, method: str, plan_path: str) -> tuple[list[Cut], list[Unreached]]:
    """Bills of one method: at every size that it reaches, and at its own. Sizes of one allocation are one cut.

    A method's own size is the smallest that it reaches, of `auto` what it takes without a size; it is added where the
    method stores something of each task, or where no size was asked for.
    """
    found: dict[Allocation, tuple[list[str], Bill, str]] = {}
    unreached = []
    own: list[str | None] = [None] if not request.sizes or (parse_auto(method) is None and is_per_task(method)) else []
    for size in (*request.sizes, *own):
        asked = _asked(request.common, method, size)
        try:
            bill = allocate(pricer.plan, asked, pricer)
        except GateError as error:
            assert size is not None
            unreached.append(Unreached(method=method, size=size, message=error.message))
            continue
        key = replace(bill.allocation, merges=0, undone=0, fit="")
        sizes = found.setdefault(key, ([], bill, command_of(plan_path, asked)))[0]
        sizes += [size] if size is not None else []
    return [
        Cut(method=method, sizes=tuple(sizes), bill=bill, command=command) for sizes, bill, command in found.values()
    ], unreached


def alternatives_of(pricer: Pricer, plan_path: str) -> list[Cut]:
    """Copies in fewer bits, if the family has more than one task to copy."""
    return [
        Cut(method=name, sizes=(), bill=allocate(pricer.plan, asked, pricer), command=command_of(plan_path, asked))
        for name, asked in ALTERNATIVES.items()
    ]


def command_of(plan_path: str, asked: MergeRequest) -> str:
    """The `merge` that writes it."""
    options = [("--method", asked.method), ("--size", asked.size), ("--calibrate", asked.calibrate)]
    options += [("--step", step) for step in asked.steps] + [("--method-for", item) for item in asked.method_for]
    options += [("--dtype", next((word for word, dtype in CASTS.items() if dtype == asked.dtype), None))]
    options += [("--fit", asked.fit.value if asked.fit is not MergeRequest().fit else None)]
    words = [word for name, value in options if value is not None for word in (name, value)]
    return shlex.join(["flexmerge", "merge", plan_path, *words, "-o", "bundle/"])


def is_per_task(method: str) -> bool:
    """Whether it stores something of each task beside what a group shares."""
    call = parse_call(resolve(method).method, run_files=True)
    return call.method.masked or declare(call) is not None


def _asked(common: MergeRequest, method: str, size: str | None) -> MergeRequest:
    if parse_auto(method) is not None:  # which merges by no order, and has no use for them
        common = replace(common, steps=(), calibrate=None)
    return replace(common, method=method, size=size)


@dataclass(kw_only=True)
class Drawing:
    """A curve being drawn: what one process needs for it."""

    plan: Plan
    plan_path: Path
    spec: EvalSpec
    request: CurveRequest
    pricer: Pricer = field(init=False)
    scorer: CurveScorer = field(init=False)
    fine_tuned: dict[str, TaskModel] = field(init=False)
    base: dict[str, TaskModel] = field(init=False)

    def __post_init__(self) -> None:
        """Opens the sources. Raises DataError, SourceError; UsageError for what does not fit in the spec."""
        from flexmerge_cli.engine.device import choose_device
        from flexmerge_cli.engine.pool import default_threads
        from flexmerge_cli.evaluation.in_memory import MemoryBundles
        from flexmerge_cli.evaluation.planned import planned_models

        request = self.request
        self.pricer = Pricer(self.plan)
        sources, _ = open_sources(
            self.plan, self.plan_path.absolute().parent, request.common.relocate, request.common.access
        )
        fetch(sources.to_fetch(), request.common.access)
        folders = {
            task.name: source.path if source.path.is_dir() else source.path.parent
            for task, source in zip(self.plan.tasks, sources.tasks)
        }
        tasks = list(self.spec.tasks)
        device = None if request.device == "auto" else request.device
        cache = ScoreCache(overwrite=not request.reuse)
        scorer = Scorer(spec=self.spec, device=device, cache=cache, access=request.common.access)
        for task in tasks:  # what does not fit is told before a weight is read
            scorer.examples(task, folders[task])
        self.fine_tuned, self.base = planned_models(self.plan, sources.located, folders, tasks)
        threads = request.threads or (1 if request.parallel > 1 else default_threads())
        memory = MemoryBundles(sources=sources.located, device=choose_device(request.device), threads=threads)
        self.scorer = CurveScorer(
            memory=memory, scorer=scorer, folders=folders, references=self.fine_tuned, reuse=request.reuse
        )

    def reference(self, task: str, model: TaskModel) -> Scored:
        """Of the fine-tuned model or the base; known from then on."""
        scored = self.scorer.scorer.score(model, reference=self.fine_tuned[task])
        self.scorer.known(task, model.digest, scored)
        return scored

    def series(self, method: str, on_score: OnScore) -> tuple[list[Point], list[Unreached]]:
        cuts, unreached = cuts_of(self.pricer, self.request, method, str(self.plan_path))
        return list(self.scorer.points(cuts, on_score)), unreached

    def alternatives(self, on_score: OnScore) -> list[Point]:
        return list(self.scorer.points(alternatives_of(self.pricer, str(self.plan_path)), on_score))


def draw(
    plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest, *, on_score: OnScore = lambda *_step: None
) -> Curve:
    """Score every method at every size. plan_path: as a command is to name it; sources are relative to its folder.

    Raises UsageError before a weight is read, DataError for sources that are not what the plan saw.
    """
    check_curve(plan, request)
    drawing = Drawing(plan=plan, plan_path=plan_path, spec=spec, request=request)
    references: dict[str, dict[str, Scored]] = {"fine_tuned": {}, "base": {}}
    for who, models in (("fine_tuned", drawing.fine_tuned), ("base", drawing.base)):
        for done, (task, model) in enumerate(models.items()):
            on_score(f"{who.replace('_', '-')} models", done, len(models))
            references[who][task] = drawing.reference(task, model)
    jobs: list[str | None] = [*request.methods, *([None] if request.alternatives else [])]
    results = list(_in_processes(drawing, jobs, on_score) if request.parallel > 1 else _here(drawing, jobs, on_score))
    by_job = dict(zip(jobs, results))
    return Curve(
        points=tuple(point for method in request.methods for point in by_job[method][0]),
        alternatives=tuple(by_job[None][0] if None in by_job else ()),
        unreached=tuple(item for method in request.methods for item in by_job[method][1]),
        fine_tuned=references["fine_tuned"],
        base=references["base"],
        data={task: drawing.scorer.scorer.examples(task, drawing.scorer.folders[task]).digest for task in spec.tasks},
        models={task: {"fine_tuned": drawing.fine_tuned[task], "base": drawing.base[task]} for task in spec.tasks},
    )


Job = str | None
"""A method; None: the alternatives."""
Result = tuple[list[Point], list[Unreached]]


def _run(drawing: Drawing, job: Job, on_score: OnScore) -> Result:
    return drawing.series(job, on_score) if job is not None else (drawing.alternatives(on_score), [])


def _here(drawing: Drawing, jobs: Sequence[Job], on_score: OnScore) -> Iterator[Result]:
    for job in jobs:
        yield _run(drawing, job, on_score)


def _in_processes(drawing: Drawing, jobs: Sequence[Job], on_score: OnScore) -> Iterator[Result]:
    """Each job in one of a few processes, the results in order."""
    common = replace(drawing.request.common, access=drawing.request.common.access.elsewhere())
    given = (drawing.plan, drawing.plan_path, drawing.spec, replace(drawing.request, common=common))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(drawing.request.parallel, len(jobs)), context, _start, given) as pool:
        futures = [pool.submit(_run_there, job) for job in jobs]
        try:
            for done, future in enumerate(futures):
                on_score(f"{jobs[done] or 'copies'}", done, len(jobs))
                yield future.result()
        except BaseException:  # the others would be finished first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_drawing: Drawing
"""Of a process of `_in_processes`."""


def _start(plan: Plan, plan_path: Path, spec: EvalSpec, request: CurveRequest) -> None:
    import torch

    global _drawing
    torch.set_num_threads(1)  # the processes share the cores
    _drawing = Drawing(plan=plan, plan_path=plan_path, spec=spec, request=request)


def _run_there(job: Job) -> Result:
    return _run(_drawing, job, lambda *_step: None)
