"""Decides whether scores are close enough to the fine-tuned models' for a release. Limits and paired scores in.

A limit is `1%` of the fine-tuned score or `1pt`, points of the metric (its own units for perplexity and divergence). A
task passes if the one-sided 95 % bound of its paired drop is within the limit, fails if the drop exceeds the limit with
the same confidence, and is undecided otherwise; then the verdict says how many examples are needed. A gate judges every
task of a bundle: if one is neither scored nor listed under `not_scored`, it fails whatever the other scores are. Pure.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.evaluation.intervals import CONFIDENCE, PairedBound, paired_bound
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.resampling import mean_drops
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.spec import EvalSpec

LIMIT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|pt)")
MEAN = "the mean"


class Outcome(StrEnum):
    """The outcome for a task, and for all of them."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest acceptable loss."""

    text: str
    value: float
    """A fraction of the fine-tuned score if relative, else in the metric's unit."""
    relative: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The limits on each task and on the mean over tasks."""

    max_drop: Limit | None = None
    max_mean_drop: Limit | None = None

    def __bool__(self) -> bool:
        return self.max_drop is not None or self.max_mean_drop is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVerdict:
    """The result for one task, or for the mean, with its limit."""

    name: str
    outcome: Outcome
    limit: str
    drop: float | None
    low: float | None
    high: float | None
    """One-sided 95 % bounds of the drop; None if an external number came without them."""
    n: int
    needed: int | None
    """The number of examples that would decide an undecided case; None if no number would."""
    points: float = 100.0
    """The points in a drop of 1, in the unit of the limit."""

    @property
    def message(self) -> str:
        """The verdict on one line."""
        if self.drop is None or self.high is None or self.low is None:
            return f"{self.name}: {self.outcome} (an external number has no paired bound)"
        unit = "%" if self.limit.endswith("%") else "pt"
        drop, low, high = (f"{self.points * value:.2f}{unit}" for value in (self.drop, self.low, self.high))
        shown = f"{self.name}: lost {drop}, at most {high} with 95 %"
        if self.outcome is Outcome.FAIL:
            shown = f"{self.name}: lost {drop}, at least {low} with 95 %"
        if self.outcome is Outcome.UNDECIDED:
            more = (
                "no number of examples would decide" if self.needed is None else f"about {self.needed:,} would decide"
            )
            shown += f"; n = {self.n:,} is too small: {more}"
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The verdicts on all tasks."""

    tasks: tuple[TaskVerdict, ...]
    not_scored: tuple[str, ...] = ()
    """Tasks of the bundle that the spec excludes on purpose."""
    forgotten: tuple[str, ...] = ()
    """Tasks of the bundle that the spec does not mention. Nothing is known about them, so the gate fails."""

    @property
    def outcome(self) -> Outcome:
        """The outcome of all: `fail` takes precedence over `undecided`, since more data would not help."""
        if self.forgotten:
            return Outcome.FAIL
        found = {task.outcome for task in self.tasks}
        return next((o for o in (Outcome.FAIL, Outcome.UNDECIDED) if o in found), Outcome.PASS)

    @property
    def message(self) -> str:
        bad = [f"{task.message} (limit {task.limit})" for task in self.tasks if task.outcome is not Outcome.PASS]
        bad += [forgotten_message(self.forgotten)] if self.forgotten else []
        if bad:
            return f"{self.outcome}: " + "; ".join(bad)
        left_out = f"; not scored: {', '.join(self.not_scored)}" if self.not_scored else ""
        return f"pass: all of {', '.join(sorted({task.limit for task in self.tasks}))}{left_out}"

    def record(self) -> dict[str, Any]:
        return {
            "outcome": str(self.outcome),
            "message": self.message,
            "tasks": {
                task.name: {
                    "outcome": str(task.outcome), "message": task.message, "limit": task.limit,
                    "drop": _finite(task.drop), "low": _finite(task.low), "high": _finite(task.high), "n": task.n,
                    "n_needed": task.needed,
                }
                for task in self.tasks
            },
            "not_scored": list(self.not_scored),
            "forgotten": list(self.forgotten),
        }  # fmt: skip


def forgotten_message(tasks: Sequence[str]) -> str:
    return f"the spec does not score {', '.join(tasks)}"


def _finite(value: float | None) -> float | None:
    """Return a bound as JSON can hold it: JSON has no infinity, and the bound of a single example is infinite."""
    return value if value is not None and np.isfinite(value) else None


def require_pass(gate: Mapping[str, Any], what: str) -> None:
    """Raise GateError with the tasks and reasons unless all pass. gate: from `Verdict.record`."""
    if gate["outcome"] != Outcome.PASS:
        bad = [task for task in gate["tasks"].values() if task["outcome"] != Outcome.PASS]
        reasons = [f"{task['outcome']}: {task['message']}, limit {task['limit']}" for task in bad]
        reasons += [f"{Outcome.FAIL}: {forgotten_message(gate['forgotten'])}"] if gate["forgotten"] else []
        lines = "\n  ".join(reasons or [gate["message"]])
        hint = "a larger --size, or another method"
        if gate["outcome"] == Outcome.UNDECIDED:
            hint = "score more examples (`limit` of the spec)"
        if gate["forgotten"]:
            hint = f"score them, or write `not_scored: [{', '.join(gate['forgotten'])}]` in the spec"
        error = GateError(f"{what} does not pass the gate:\n  {lines}", hint=hint)
        error.document = {"gate": dict(gate)}
        raise error


def require_scored(spec: EvalSpec, what: str) -> None:
    """Raise GateError, before anything is scored, for tasks of the bundle that the spec does not mention."""
    if spec.forgotten:
        require_pass(Verdict(tasks=(), not_scored=spec.not_scored, forgotten=spec.forgotten).record(), what)


def parse_gate(max_drop: str | None, max_mean_drop: str | None) -> Gate:
    """Parse the options of these names. Raises UsageError."""
    return Gate(
        max_drop=None if max_drop is None else parse_limit(max_drop, "--max-drop"),
        max_mean_drop=None if max_mean_drop is None else parse_limit(max_mean_drop, "--max-mean-drop"),
    )


def parse_limit(text: str, option: str) -> Limit:
    """Parse `1%` or `0.5pt`. Raises UsageError."""
    match = LIMIT.fullmatch(text.strip())
    if match is None or not 0 <= float(match[1]) <= 100:
        raise UsageError(
            f"{option} `{text}` is not a drop",
            hint=f"{option} 1% of the fine-tuned score, or 1pt: points of the metric",
        )
    return Limit(text=text.strip(), value=float(match[1]) / 100, relative=match[2] == "%")


def judge(
    merged: Mapping[str, Scored],
    references: Mapping[str, Scored],
    gate: Gate,
    same: Mapping[str, bool] | None = None,
    *,
    not_scored: Sequence[str] = (),
    forgotten: Sequence[str] = (),
) -> Verdict:
    """Judge the scores. references: those of the fine-tuned models, on the same examples.

    not_scored: tasks of the bundle that the spec excludes; forgotten: tasks that it does not mention.
    """
    found: list[TaskVerdict] = []
    if gate.max_drop is not None:
        found += [
            _of_task(task, scored, references[task], gate.max_drop, same is not None and same.get(task, False))
            for task, scored in merged.items()
        ]
    if gate.max_mean_drop is not None:
        found.append(_of_mean(merged, references, gate.max_mean_drop))
    return Verdict(tasks=tuple(found), not_scored=tuple(not_scored), forgotten=tuple(forgotten))


def _of_task(task: str, merged: Scored, reference: Scored, limit: Limit, same: bool) -> TaskVerdict:
    bound = paired_bound(merged, reference, relative=limit.relative, same_weights=same)
    if bound is None:
        return TaskVerdict(
            name=task, outcome=Outcome.UNDECIDED, limit=limit.text, drop=None, low=None, high=None, n=merged.n,
            needed=None,
        )  # fmt: skip
    return _verdict(task, bound, limit, 100.0 if limit.relative or METRICS[merged.metric].percent else 1.0)


def _of_mean(merged: Mapping[str, Scored], references: Mapping[str, Scored], limit: Limit) -> TaskVerdict:
    """Judge the mean drop over tasks, by a paired bootstrap over examples; in hundredths of points."""
    smallest = min((scored.n for scored in merged.values()), default=0)
    if any(scored.given is not None for scored in (*merged.values(), *references.values())):
        return TaskVerdict(
            name=MEAN, outcome=Outcome.UNDECIDED, limit=limit.text, drop=None, low=None, high=None, n=smallest,
            needed=None,
        )  # fmt: skip
    drop, draws_R = mean_drops(merged, references, relative=limit.relative)
    low, high = (float(np.quantile(draws_R, q)) for q in (1 - CONFIDENCE, CONFIDENCE))
    bound = PairedBound(drop=drop, low=min(low, drop), high=max(high, drop), n=smallest)
    return _verdict(MEAN, bound, limit, 100.0)


def _verdict(name: str, bound: PairedBound, limit: Limit, points: float) -> TaskVerdict:
    value = 100 * limit.value / points
    decided = bound.decides(value)
    outcome = {True: Outcome.PASS, False: Outcome.FAIL, None: Outcome.UNDECIDED}[decided]
    return TaskVerdict(
        name=name, outcome=outcome, limit=limit.text, drop=bound.drop, low=bound.low, high=bound.high, n=bound.n,
        needed=bound.n_that_decides(value) if decided is None else None, points=points,
    )  # fmt: skip
