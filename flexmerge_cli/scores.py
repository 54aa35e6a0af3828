"""`eval BUNDLE` and `eval --sources`: which models are scored, and beside which; in this process or in several.

One model is in memory at a time, in each process. Curves of a plan: curve.py.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.cache import ScoreCache
from flexmerge_cli.evaluation.evaluate import OnStep, evaluate, means
from flexmerge_cli.evaluation.planned import planned_models
from flexmerge_cli.evaluation.references import References, Who, spec_references
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.merging import OpenSources, open_sources
from flexmerge_cli.plan import load_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What is to be scored."""

    spec: EvalSpec
    bundle: Path | None = None
    plan: Path | None = None
    """Whose sources the references are; None: those that the spec names."""
    sources: bool = False
    """Every task's fine-tuned model and the base, and of a bundle nothing else."""
    device: str | None = None
    reuse: bool = True
    parallel: int = 1
    access: Access = ONLINE


def scores(request: ScoreRequest, *, on_step: OnStep = lambda *_step: None) -> dict[str, Any]:
    """`flexmerge.eval/1`.

    Raises UsageError before a weight is read where spec, data and models do not fit; DataError, SourceError.
    """
    tasks = list(request.spec.tasks)
    if request.parallel <= 1 or len(tasks) == 1:
        return _scores(request, on_step)
    alone = replace(request, parallel=1, access=ONLINE)  # without messages
    parts = [replace(alone, spec=request.spec.only(task)) for task in tasks]
    context = multiprocessing.get_context("spawn")
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(min(request.parallel, len(tasks)), context, _one_thread) as pool:
        futures = [pool.submit(_scores, part, _silent) for part in parts]
        try:
            for task, future in zip(tasks, futures):
                on_step(task, len(found), len(tasks))
                found.append(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    records = {task: part["tasks"][task] for task, part in zip(tasks, found)}
    counts = {key: sum(part["evaluations"][key] for part in found) for key in found[0]["evaluations"]}
    return found[0] | {"tasks": records, "mean": means(records), "evaluations": counts}


def _scores(request: ScoreRequest, on_step: OnStep) -> dict[str, Any]:
    bundle = Bundle.open(request.bundle, tasks=list(request.spec.tasks)) if request.bundle is not None else None
    scorer = Scorer(spec=request.spec, device=request.device, cache=ScoreCache() if request.reuse else None)
    if request.plan is not None:
        references = planned_references(request.plan, request.spec, access=request.access)
    else:
        assert bundle is not None
        references = spec_references(request.spec, bundle, access=request.access, needed=request.sources)
    if request.sources and bundle is not None and not references.folders:
        folders = {task: bundle.path / "tasks" / task for task in request.spec.tasks}
        references = replace(references, folders=folders)
    return evaluate(
        None if request.sources else bundle, request.spec, scorer=scorer, references=references, on_step=on_step
    )


def planned_references(plan_path: Path, spec: EvalSpec, *, access: Access = ONLINE) -> References:
    """A plan's sources as models. Reads headers; weights are read, and checked against the plan, when asked for.

    Raises SourceError, DataError.
    """
    plan = load_plan(plan_path)
    sources, _ = open_sources(plan, plan_path.absolute().parent, {}, access)
    if sources.base is None:
        raise DataError(f"{plan_path}: nothing of the tasks merges with the base", hint="there is nothing to compare")
    folders = {
        task.name: source.path if source.path.is_dir() else source.path.parent
        for task, source in zip(plan.tasks, sources.tasks)
    }

    def opened(task: str, who: Who) -> TaskModel:
        _fetch(sources, plan.task_names.index(task), access)
        fine_tuned, base = planned_models(plan, sources.located, folders, [task])
        return (fine_tuned if who == "fine_tuned" else base)[task]

    models = {task: {who: partial(opened, task, who) for who in ("fine_tuned", "base")} for task in spec.tasks}
    return References(models=models, folders=folders)


def _fetch(sources: OpenSources, task: int, access: Access) -> None:
    assert sources.base is not None
    fetch([*sources.base.remote.values(), *sources.tasks[task].remote.values()], access)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Of a process whose steps nobody sees."""


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the processes share the cores
