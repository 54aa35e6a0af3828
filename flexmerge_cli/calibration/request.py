"""The request of `calibrate` and `tune`: plan, spec and examples, checked to fit each other before a weight is read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.allocation import Allocation
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.kinds.kind import AGREEMENT, Examples
from flexmerge_cli.evaluation.references import References
from flexmerge_cli.evaluation.running import references_of
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.formats.calibration import STATISTICS, Statistic, Unmeasured
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.request.choices import Auto
from flexmerge_cli.request.merge import MergeRequest, merge_request

THIS = "calibration/"
"""What a merge through which inputs are measured calls the calibration."""
OnStep = Callable[[str, int, int], None]

DEFAULT: tuple[Statistic, ...] = ("inputs", "fisher")
OUTSIDE = ("python", "command", "lm-eval")
HAVE_LOGITS = ("image-classification", "text-classification", "regression", "causal-lm")
IMAGES = ("image-classification", "zero-shot-image-classification")


@dataclass(frozen=True, kw_only=True)
class Through:
    """A merge, block by block, whose models run on the examples."""

    request: MergeRequest
    allocation: Allocation
    relocate: Mapping[str, str] | None
    access: Access


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
    through: Through | None = None
    """The merge whose models give the inputs; None: the fine-tuned models do."""


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
    through: str | None = None,
    size: str | None = None,
) -> CalibrationRequest:
    """Read plan, spec and examples, and check that they fit. Reads no weights.

    examples: the largest number for each task, at least 1. If a task has more, they are drawn at random with the spec's
    seed, or 0. kinds: the only kinds of tasks that can be used; None: those that can be observed. through, size: the
    method and size of a merge whose models give the inputs.
    Raises UsageError, SourceError, DataError.
    """
    if examples < 1:
        raise UsageError(f"{examples} examples of each task are too few", hint="at least 1")
    wanted, plan = parse_statistics(statistics), load_plan(plan_path)
    if size is not None and through is None:
        raise UsageError("--size has no effect without --through", hint="--through regmean --size 1x")
    if through is not None:
        if statistics is not None and wanted != ("inputs",):
            raise UsageError(
                f"--statistics {statistics}: --through measures inputs alone", hint="leave out --statistics"
            )
        wanted = ("inputs",)
    plan.require_models()
    merged = None
    if through is not None:
        merged = Through(**_merge_of(plan, through, size), relocate=relocate, access=access)
    spec = read_spec(spec_path, plan.task_names, unscorable=plan.kept_names)
    if missing := [name for name in (*spec.forgotten, *spec.not_scored) if name not in plan.kept_names]:
        said = f"no examples of {', '.join(missing)}"
        raise spec.document.error(("tasks",), said, hint="list every task of the plan, but kept adapters")
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
        device=device, references=references, scorer=scorer, through=merged,
    )  # fmt: skip


def _merge_of(plan: Plan, method: str, size: str | None) -> dict[str, Any]:
    """Return the request and allocation of a merge that reads inputs. Raises UsageError, GateError."""
    asked = merge_request(method=method, size=size, run_files=True)
    if isinstance(asked.choice, Auto):
        raise UsageError(
            f"--through {method}: `auto` merges no block by the inputs of its layers, and only rounds by them",
            hint="leave out --through, or use --through regmean --size 1x",
        )
    if asked.reads != {"inputs"}:
        raise UsageError(f"--through {method}: it reads no inputs", hint="--through regmean --size 1x")
    asked = replace(asked, calibration=THIS)
    return {
        "request": asked,
        "allocation": allocate(plan, asked, Pricer(plan, calibration=Unmeasured(plan=plan))).allocation,
    }


def run_examples(request: CalibrationRequest, model: TaskModel, **run: Any) -> Examples:
    """Run a task's model on its examples, and return these. run: fields of Run."""
    spec, scorer = request.spec, request.scorer
    examples = scorer.examples(model.task, model.folder)
    spec.kind(model.task).score(model, spec.tasks[model.task], examples, replace(scorer.run(model.task), **run))
    return examples
