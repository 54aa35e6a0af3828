"""Scores `lm-eval`: a task of lm-evaluation-harness runs on the materialised model. Needs the `harness` extra.

task          its name in the harness
metric        as the harness names it, `acc`, `acc_norm`, `word_perplexity`; by default the first that it reports
num_fewshot   examples in the prompt
include_path  a folder of the user's task files, which can name code, so it needs --allow-exec
The harness loads the data. Its standard error becomes a 95 % interval.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run
from flexmerge_cli.evaluation.loading import require
from flexmerge_cli.evaluation.materialise import materialised
from flexmerge_cli.evaluation.scored import Given, Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

EXTRA = "flexmerge-cli[harness]"
Z = 1.959963984540054


class LmEval(TaskSpec):
    kind: Literal["lm-eval"]
    task: str
    num_fewshot: int | None = Field(default=None, ge=0)
    include_path: str | None = None


def prepare(task: LmEval, place: Place) -> Examples:
    require("lm_eval", extra=EXTRA)
    folder = None if task.include_path is None else place.folder / task.include_path
    if folder is not None and not folder.is_dir():
        raise place.error("include_path", f"no folder {folder}", hint="check the path")
    if len(task.metrics) > 1:
        raise place.error("metric", "a task can have only one metric of the harness", hint="add another task for it")
    manager = _manager(folder, task.task)
    if task.task not in manager.all_tasks:
        raise place.error("task", f"lm-eval has no task `{task.task}`", hint="list them with `lm_eval ls tasks`")
    return Examples(items=folder, n=0, digest="", metrics=task.metrics)


def score(model: TaskModel, task: LmEval, examples: Examples, run: Run) -> Sequence[Scored]:
    import lm_eval

    with materialised(model) as checkpoint:
        arguments = {"pretrained": str(checkpoint), "trust_remote_code": False}
        if run.dtype is not None:
            arguments["dtype"] = run.dtype
        answer: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=[task.task],
            num_fewshot=task.num_fewshot,
            batch_size=run.batch_size,
            device=run.device,
            limit=task.limit,
            task_manager=_manager(examples.items, task.task),
            bootstrap_iters=1000,
            verbosity="ERROR",
        )
    return [_scored(answer, task, next(iter(task.metrics), None))]


@cache
def _manager(folder: Path | None, task: str) -> Any:
    """Return a task manager that knows the task. The harness's ten thousand files are not read for a user's own
    task."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if task in own.all_tasks:
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _scored(answer: dict[str, Any], task: LmEval, wanted: str | None) -> Scored:
    """Read `acc,none` and `acc_stderr,none` of the harness's results."""
    results = answer["results"].get(task.task, {})
    found = {key.split(",")[0]: key for key, value in results.items() if isinstance(value, int | float) and "," in key}
    names = [name for name in found if not name.endswith("_stderr")]
    name = wanted or next(iter(names), None)
    if name not in names:
        raise DataError(f"lm-eval gave no `{name}` for {task.task}", hint=f"metric: one of {', '.join(names)}")
    value, error = float(results[found[name]]), results.get(found.get(f"{name}_stderr", ""))
    spread = Z * error if isinstance(error, int | float) else None
    higher = answer.get("higher_is_better", {}).get(task.task, {}).get(name)
    n = answer.get("n-samples", {}).get(task.task, {}).get("effective")
    given = Given(
        value=value,
        n=n,
        interval=None if spread is None else (value - spread, value + spread),
        higher_is_better=True if higher is None else bool(higher),
    )
    return Scored(metric=str(name), given=given)


KIND = Kind(
    name="lm-eval",
    schema=LmEval,
    metrics=(),
    prepare=prepare,
    score=score,
    batch_size=8,
    code_keys=("include_path",),
    cached=False,
)
