"""Describes a plan: its size curve, its blocks and how similar they are. Needs no torch and no weights."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.allocation.block_measure import block_measure
from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.order.order import Merge
from flexmerge_cli.order.similarity import similarity
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.report.inspect_curve import SizeCurve, curve_of
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.options import options_value, size_row
from flexmerge_cli.report.plan import classes, low_rank_rows, task_rows
from flexmerge_cli.report.vocabulary import vocabularies

# M tasks, B blocks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanFacts:
    """Facts that follow from a plan."""

    plan: Plan
    path: Path
    curve: SizeCurve
    similarity: np.ndarray
    """Similarities, [B, M, M] float64, compared as in the plan's settings."""
    scale: Scale
    """The range of all blocks, so that their pictures are comparable; a task with itself does not count."""
    merges: tuple[Merge, ...]
    """The merge order, with block indices."""
    positions: tuple[tuple[int, ...], ...]
    """The places of each block's merges in the order, from 1: `--merges N` makes all up to N."""
    block: int | None
    """The requested block."""
    cosine: np.ndarray
    """Cosines of whole task vectors, [M, M] float64; NaN for a task that is the base."""
    options: dict[str, Any]
    """The options to store the family, as `options_value` gives them."""

    def groups(self, block: int, merges: int) -> int:
        """Return the number of groups of a block after this many merges."""
        return len(self.plan.tasks) - sum(position <= merges for position in self.positions[block])

    def pairs(self, block: int) -> dict[str, Any] | None:
        """Return the mean similarity, and the most and the least similar pair; None for a single task."""
        rows, columns = np.triu_indices(len(self.plan.tasks), 1)
        if not len(rows):
            return None
        values, names = self.similarity[block][rows, columns], self.plan.task_names

        def pair(place: int) -> dict[str, Any]:
            return {"similarity": float(values[place]), "tasks": [names[rows[place]], names[columns[place]]]}

        return {"mean": float(values.mean()), "most": pair(int(values.argmax())), "least": pair(int(values.argmin()))}


def plan_facts(path: Path, block: str | None = None) -> PlanFacts:
    """Read a plan. Raises UsageError if it is malformed, or lacks the block."""
    plan = load_plan(path)
    chosen = None if block is None else _find(block, [found.name for found in plan.blocks])
    try:
        measures = [block_measure(b.name, [plan.tensor(name) for name in b.tensors]) for b in plan.blocks]
        found = [similarity(measure, plan.settings.similarity) for measure in measures]
        curve = curve_of(plan)
    except ValueError as error:  # a sha256 proves that a plan is complete, not that its numbers make sense
        raise UsageError(f"{path} is not a valid plan: {error}", hint="create it again with `flexmerge plan`") from None
    merges = plan.merges()
    positions: list[list[int]] = [[] for _ in plan.blocks]
    for position, merge in enumerate(merges, 1):
        positions[merge.block].append(position)
    similarity_BMM = np.array(found).reshape(len(plan.blocks), len(plan.tasks), len(plan.tasks))
    return PlanFacts(
        plan=plan,
        path=path,
        curve=curve,
        similarity=similarity_BMM,
        scale=Scale.over(similarity_BMM[:, ~np.eye(len(plan.tasks), dtype=bool)]),
        merges=merges,
        positions=tuple(map(tuple, positions)),
        block=chosen,
        cosine=cosines(plan.whole_gram()),
        options=options_value(plan, str(path)),
    )


def cosines(gram: np.ndarray) -> np.ndarray:
    """Return the cosines of vectors, [M, M] in [-1, 1], from their Gram matrix; NaN for a vector of zeros."""
    norms = np.sqrt(np.diag(gram))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    found[np.diag_indices(len(gram))] = np.where(norms > 0, 1.0, np.nan)
    return found


def cosine_scale(cosine: np.ndarray) -> Scale:
    """Return the range of the cosines of different tasks."""
    return Scale.over(cosine[~np.eye(len(cosine), dtype=bool)])


def plan_value(facts: PlanFacts) -> dict[str, Any]:
    """Return the value that `inspect` shows for a plan; sizes as in `plan --json`."""
    plan, curve = facts.plan, facts.curve
    value = {
        "kind": "plan",
        "plan": str(facts.path),
        "sha256": plan.sha256,
        "generator": plan.generator,
        "settings": plan.settings.model_dump(mode="json"),
        "base": plan.base.source,
        "tasks": task_rows(plan),
        "low_rank": low_rank_rows(plan),
        "one_model_bytes": plan.one_model_bytes,
        "classes": classes(plan),
        "vocabularies": vocabularies(plan),
        "task_vectors": {
            "norms": np.sqrt(plan.task_energy()).tolist(),
            "cosine": [[None if np.isnan(value) else float(value) for value in row] for row in facts.cosine],
        },
        "merges": len(plan.order),
        "near_ties": plan.near_ties,
        "sizes": [_size(facts, name, merges) for name, merges in curve.named],
        **facts.options,
        "curve": {"tensor_bytes": list(curve.tensor_bytes)},
        "blocks": [
            {
                "name": block.name,
                "tensors": len(block.tensors),
                "parameters": block.elements,
                "similarity": facts.pairs(index),
                "merges": list(facts.positions[index]),
                "groups": {name: facts.groups(index, merges) for name, merges in curve.named},
            }
            for index, block in enumerate(plan.blocks)
        ],
    }
    if facts.block is not None:
        value["block"] = _block(facts, facts.block)
    return value


def _block(facts: PlanFacts, index: int) -> dict[str, Any]:
    plan, names = facts.plan, facts.plan.task_names
    return {
        "name": plan.blocks[index].name,
        "tensors": list(plan.blocks[index].tensors),
        "parameters": plan.blocks[index].elements,
        "tasks": list(names),
        "similarity": facts.similarity[index].tolist(),
        "merges": [
            {
                "position": position,
                "left": [names[task] for task in plan.order[position - 1].left],
                "right": [names[task] for task in plan.order[position - 1].right],
                "similarity": plan.order[position - 1].similarity,
            }
            for position in facts.positions[index]
        ],
    }


def _size(facts: PlanFacts, name: str, merges: int) -> dict[str, Any]:
    cut, curve = facts.curve.cuts.index(merges), facts.curve
    distance = {method: distance_CM[cut] for method, distance_CM in curve.distance.items()}
    return size_row(facts.plan, name, merges, curve.tensor_bytes[merges], distance)


def _find(wanted: str, names: Sequence[str]) -> int:
    if wanted in names:
        return names.index(wanted)
    near = [name for name in names if name.endswith(f".{wanted}")][:3] or difflib.get_close_matches(wanted, names, 3)
    known = ", ".join(f"`{name}`" for name in near or names[:3])
    raise UsageError(
        f"the plan has no block `{wanted}`", hint=f"did you mean {known}?" if near else f"blocks are called {known}, …"
    )
