"""Scores two tasks on the plane through the base and their fine-tuned models: `curve --plane A,B`.

A point is θ_0 + a·τ_A + b·τ_B, computed in float32 and rounded to the task's own dtype. (0, 0) is the base, (1, 0) and
(0, 1) are the fine-tuned models, (½, ½) is their average and (1, 1) their sum. Each task is scored with its own tensors
that do not merge, such as its head, and with its own rows of tokens that not all models have.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from flexmerge_cli.checkpoint.rows import Runs
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan

if TYPE_CHECKING:
    from torch import Tensor

PLACES = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""The values of a and b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """The scores of two tasks at every point."""

    tasks: tuple[str, str]
    scores: Mapping[tuple[float, float], Mapping[str, Scored]]
    """Maps (a, b) to the score of each of both tasks, row by row of b."""


def score_plane(
    plan: Plan,
    tasks: tuple[str, str],
    scorer: Scorer,
    fine_tuned: Mapping[str, TaskModel],
    base: Mapping[str, TaskModel],
    *,
    on_score: Callable[[str, int, int], None] = lambda *_step: None,
) -> Plane:
    """Score every point; one model is in memory at a time. fine_tuned, base: the models by task."""
    scores: dict[tuple[float, float], dict[str, Scored]] = {}
    others = {task: _others(plan, *map(plan.task_names.index, (task, of))) for task, of in (tasks, tasks[::-1])}
    points = [(a, b) for b in PLACES for a in PLACES]
    for number, (a, b) in enumerate(points):
        scores[a, b] = {}
        for task, other, own, of_other in ((*tasks, a, b), (*tasks[::-1], b, a)):
            on_score(f"plane of {' and '.join(tasks)}", 2 * number + len(scores[a, b]), 2 * len(points))
            weights = _Mixed(
                own=fine_tuned[task].weights,
                base=base[task].weights,
                other=fine_tuned[other].weights,
                others=others[task],
                parts=(own, of_other),
            )
            digests = (fine_tuned[task].digest, base[task].digest, fine_tuned[other].digest, own, of_other)
            digest = xxhash.xxh3_128_hexdigest(f"flexmerge/plane/2 {digests} {others[task]}".encode())
            if (own, of_other) == (1.0, 0.0):
                digest = fine_tuned[task].digest  # Its score is known.
            model = replace(fine_tuned[task], weights=weights, digest=digest, num_bytes=None)
            scores[a, b][task] = scorer.score(model, reference=fine_tuned[task])
    return Plane(tasks=tasks, scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Other:
    """Where another task has a tensor that merges."""

    name: str
    """Its own name."""
    rows: tuple[Runs, Runs] | None
    """The rows of the task and of the other that merge, in the same order; None: all."""


def _others(plan: Plan, task: int, other: int) -> dict[str, _Other]:
    """Map a task's own names of tensors that merge to those of another task that has them, too."""
    found = {}
    for tensor in plan.tensors:
        stored_as = plan.tensor(tensor.reason) if tensor.class_ is TensorClass.TIED else tensor
        if stored_as.class_ is TensorClass.MERGEABLE and {task, other} <= set(tensor.present):
            names = [plan.whole_name(each, tensor.name) for each in (task, other)]
            at, at_other = plan.rows_of(tensor.name, task), plan.rows_of(tensor.name, other)
            rows = None if at is None or at_other is None else (at.common, at_other.common)
            found[names[0]] = _Other(name=names[1], rows=rows)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mixed(Mapping[str, "Tensor"]):
    """The weights of a task at one point, made on demand."""

    own: "Mapping[str, Tensor]"
    base: "Mapping[str, Tensor]"
    other: "Mapping[str, Tensor]"
    others: Mapping[str, _Other]
    """Maps the task's names to what the other has."""
    parts: tuple[float, float]
    """The factors of the task's own vector and of the other's."""

    def __getitem__(self, name: str) -> "Tensor":
        own, of = self.own[name], self.others.get(name)
        if of is None or self.parts == (1.0, 0.0):
            return own
        base, other = self.base[name], self.other[of.name]
        if of.rows is None:
            return own if other.shape != own.shape else self._mixed(own, base, other)
        at, at_other = ([row for first, count in runs for row in range(first, first + count)] for runs in of.rows)
        joined = own.clone()
        joined[at] = self._mixed(own[at], base[at], other[at_other])
        return joined

    def _mixed(self, own: "Tensor", base: "Tensor", other: "Tensor") -> "Tensor":
        start = base.float()
        mixed = start + self.parts[0] * (own.float() - start) + self.parts[1] * (other.float() - start)
        return mixed.to(own.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)
