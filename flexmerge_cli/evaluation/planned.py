"""Makes the references of a curve: each task's fine-tuned model and the base, from a plan's sources.

The base is scored as a model of each task: the base's values of all tensors that merge, and the task's own heads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.sources import BASE, Sources
from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.models import StoredWeights
from flexmerge_cli.evaluation.scored import TaskModel, places_line, weights_digest
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import ROWS_SUFFIX
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.plan_file import Plan


def planned_models(
    plan: Plan, sources: Sources, folders: Mapping[str, Path], tasks: Sequence[str]
) -> tuple[dict[str, TaskModel], dict[str, TaskModel]]:
    """Return the fine-tuned models and the base, by task. Weights are mapped, and read once for their digests.

    Raises DataError if a source has changed since the plan.
    """
    fine_tuned: dict[str, TaskModel] = {}
    base: dict[str, TaskModel] = {}
    sound: set[tuple[str, int]] = set()
    for number, task in ((plan.task_names.index(name), name) for name in tasks):
        own, with_base, rows, joined = {}, {}, {}, {}
        split: dict[str, tuple[list[str], int]] = {}
        for tensor in plan.tensors:
            if number not in tensor.present:
                continue
            name = plan.own_name(number, tensor.name)
            stored_as = plan.tensor(tensor.reason) if tensor.class_ is TensorClass.TIED else tensor
            own[name] = sources.tasks[number][stored_as.name], str(stored_as.digests[number]), number
            if stored_as.class_ is TensorClass.MERGEABLE:
                with_base[name] = sources.base[stored_as.name], str(stored_as.base_digest), BASE
            else:
                with_base[name] = own[name]
            if (of_split := plan.split(tensor.name)) is not None:
                split.setdefault(whole_of(name)[0], ([], of_split.dim))[0].append(name)
            places = plan.rows_of(tensor.name, number)
            if places is not None and not places.is_plain:
                of_rows = f"{stored_as.name}{ROWS_SUFFIX}"
                has = sources.tasks[number].get(of_rows)
                joined[name] = has, places.common, places.rows
                if has is not None:
                    rows[f"{name}{ROWS_SUFFIX}"] = has, str(plan.tensor(of_rows).digests[number]), number
        parts = {name for names, _ in split.values() for name in names}
        for found, into in ((own | rows, fine_tuned), (with_base | rows, base)):
            weights = StoredWeights(
                {name: found[name][0] for name in own if name not in parts},
                joined,
                {whole: ([found[name][0] for name in names], dim) for whole, (names, dim) in split.items()},
            )
            for name, (stored, expected, model) in found.items():
                if (name, model) not in sound:
                    _check(weights, stored, expected, sources.describe[model])
                    sound.add((name, model))
            into[task] = TaskModel(
                task=task,
                weights=weights,
                folder=folders[task],
                digest=weights_digest(
                    [(name, stored.dtype, stored.shape, digest) for name, (stored, digest, _) in found.items()]
                    + [places_line(name, rows, common) for name, (_, common, rows) in joined.items()]
                ),
                num_bytes=sum(stored.num_bytes for stored, _, _ in found.values()),
            )
    return fine_tuned, base


def _check(weights: StoredWeights, stored: StoredTensor, expected: str, who: str) -> None:
    data = np.ascontiguousarray(weights.array(stored)).reshape(-1).view(np.uint8)
    if digest_bytes(data) != expected:
        raise DataError(
            f"{who} has changed since the plan: `{stored.name}` of {stored.path}", hint="create the plan again"
        )
