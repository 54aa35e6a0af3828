"""Aligns M checkpoints: gives every tensor of every file one name and a class. Headers only, no weights.

Collects the problems of all tasks before it raises.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.candidates import Candidates
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, find_weights
from flexmerge_cli.checkpoint.rows import other_rows
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.family.adapters import KeptAdapter
from flexmerge_cli.family.align import Alignment, align
from flexmerge_cli.family.architecture import differences
from flexmerge_cli.family.classes import TensorClass, absent_alias, aliases, is_resized, is_resnet, why_private
from flexmerge_cli.family.spelling import model_types
from flexmerge_cli.family.split import Split
from flexmerge_cli.record import Count, Items, Record, Runs

# The names that bundles give to parts of a tensor (formats/manifest.py): no tensor of a checkpoint may have such a
# name.
PART_NAME = re.compile(r"@(base|unified|mask|gamma|scale|levels|codes|left|right|index|values|rows|part[0-9]+)(\.|\Z)")
MAX_TASKS = 4096  # the memory of a plan's order and Gram matrices grows with its square
ROWS_SUFFIX = "@rows"
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyTensor:
    """One tensor of the family, across its models."""

    name: str
    """The base's name for the tensor, or its own if the base has none."""
    base: StoredTensor | None
    tasks: tuple[StoredTensor | None, ...]
    """The tensor of each task, in task order; None if the task lacks it."""
    tensor_class: TensorClass
    reason: str = ""
    """Why the tensor is private, or the target if it is tied."""
    resized: bool = False
    """Whether it is private only because of its number of rows, as a vocabulary can be."""

    @property
    def present(self) -> tuple[int, ...]:
        return tuple(index for index, tensor in enumerate(self.tasks) if tensor is not None)

    @property
    def could_be_constant(self) -> bool:
        """Whether all of two or more tasks have it with one shape and dtype. Only the bits can prove it constant."""
        forms = {(tensor.shape, tensor.dtype) if tensor else None for tensor in self.tasks}
        return len(self.tasks) > 1 and len(forms) == 1 and None not in forms


class RowMap(Record):
    """Where one model has the rows that all models share."""

    rows: Count
    """The number of rows of the model's whole tensor."""
    common: Runs
    """The rows that the base and all tasks have, in the base's order."""
    leading: str
    """Why rows were compared by position and not by token; empty if they were compared by token."""

    @property
    def own(self) -> Runs:
        """The other rows, ascending."""
        return other_rows(self.common, self.rows)

    @property
    def is_plain(self) -> bool:
        """Whether the model has no other rows, and has these in the base's order."""
        return self.common == ((0, self.rows),)


class Vocabulary(Record):
    """Tensors with one row per token, where the models differ in the tokens or in their positions."""

    tensors: Items[str]
    """Names of embeddings, output layers and their biases."""
    base: RowMap
    tasks: Items[RowMap]

    def of(self, task: int | None) -> RowMap | None:
        """Return the rows of a task, or of the base if it is None; None for a kept adapter, which has the base's."""
        return self.base if task is None else self.tasks[task] if task < len(self.tasks) else None

    def entry(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what a manifest records. names: of the tasks."""
        base, *own = (rows.model_dump(exclude={"leading"}) for rows in (self.base, *self.tasks))
        found = {name: each for name, each, rows in zip(names, own, self.tasks) if not rows.is_plain}
        return {"tensors": list(self.tensors), "base": base, "tasks": found}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A base and its fine-tunes, aligned."""

    base: Checkpoint
    task_names: tuple[str, ...]
    """Task names in code-point order."""
    tasks: tuple[Checkpoint, ...]
    tensors: tuple[FamilyTensor, ...]
    """Tensors in the order of the base's files, followed by those that the base lacks, by name."""
    own_names: tuple[dict[str, str], ...]
    """For each task: aligned name -> own name, for the tensors that the task has."""
    vocabularies: tuple[Vocabulary, ...] = ()
    """The embeddings whose rows are not the same tokens in all models (vocabulary.py)."""
    rows: tuple[FamilyTensor, ...] = ()
    """The rows of such tensors that are not common to all models, each stored as a tensor `<tensor>@rows`."""
    splits: tuple[Split, ...] = ()
    """The tensors whose parts are in `tensors` (splitting.py)."""
    kept: tuple[KeptAdapter, ...] = ()
    """The tasks that stay adapters of the base, in code-point order. They appear in no list above."""
    merges_products: bool = False
    """Whether the tensors that merge are pairs of factors, whose products merge (factors.py)."""

    @property
    def stored(self) -> tuple[FamilyTensor, ...]:
        """All tensors that are stored by themselves."""
        return self.tensors + self.rows

    @property
    def division(self) -> dict[str, Any]:
        """How tensors are divided into rows and parts, as a plan records it."""
        return {
            "vocabularies": [vocabulary.model_dump() for vocabulary in self.vocabularies],
            "splits": [split.model_dump() for split in self.splits],
        }

    def rows_of(self, tensor: str, task: int | None) -> RowMap | None:
        """Return where a task, or the base (None), has the rows of a tensor that all models have; None if all models
        have the same rows."""
        whole = tensor.removesuffix(ROWS_SUFFIX)
        return next((found.of(task) for found in self.vocabularies if whole in found.tensors), None)

    @property
    def one_model_bytes(self) -> int:
        """The tensor bytes of a model, averaged over tasks and rounded. An adapter counts as the model it makes."""
        return round(sum(model.num_bytes for model in self.models.values()) / len(self.models))

    @property
    def models(self) -> dict[str, Checkpoint]:
        """The model of every member, by task; of a kept adapter, the model that it makes of the base."""
        return dict(zip(self.task_names, self.tasks)) | {kept.name: kept.model for kept in self.kept}


def are_task_names(names: Sequence[str]) -> bool:
    """Return whether these are valid names for the tasks of a family; they may come from a hostile file."""
    return all(map(_is_task_name, names)) and len({name.lower() for name in names}) == len(names)


def check_task_names(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is not a valid file name on every system, or that two tasks have.

    Also raises it for more names than MAX_TASKS.
    """
    if len(names) > MAX_TASKS:
        raise UsageError(f"{len(names):,} tasks, more than {MAX_TASKS:,}", hint="make several bundles")
    seen: dict[str, str] = {}
    for name in names:
        if not _is_task_name(name):
            raise UsageError(
                f"`{name}` cannot be a task's name",
                hint="start with a letter or digit, then letters, digits, `.`, `_`, `-`, at most 64; not `all`",
            )
        if name.lower() in seen:
            raise UsageError(
                f"two tasks have the same name: `{seen[name.lower()]}` and `{name}` (case is ignored)",
                hint="rename one",
            )
        seen[name.lower()] = name


def _is_task_name(name: str) -> bool:
    # `all` in any case: a file system that ignores case would take ALL.safetensors for all.safetensors.
    return TASK_NAME.fullmatch(name) is not None and name.lower() != "all"


def find_tasks(folder: Path) -> Candidates:
    """Find the immediate subfolders that hold a checkpoint, and what else there is. Raises SourceError."""
    if not folder.is_dir():
        raise SourceError(f"no folder {folder}", hint="--tasks takes a folder with one subfolder per fine-tuned model")
    found = Candidates()
    for child in sorted(child for child in folder.iterdir() if not child.name.startswith(".")):
        if child.is_symlink() and not child.exists():
            found.unfinished[child.name] = "is a link that leads nowhere"
        elif not child.is_dir():
            found.add_file(child.name)
        elif find_weights(child) is not None:
            found.models[child.name] = str(child)
        else:
            found.add_folder(child.name, list(_two_levels(child)))
    return found


def _two_levels(folder: Path) -> Iterator[str]:
    """Yield the paths in a folder and in its subfolders. The path of a folder ends in a slash."""
    for child in folder.iterdir():
        if child.is_dir():
            yield f"{child.name}/"
            yield from (f"{child.name}/{each.name}" for each in child.iterdir())
        else:
            yield child.name


def make_family(
    base: Checkpoint,
    tasks: Mapping[str, Checkpoint],
    *,
    private: Sequence[str] = (),
    merge_heads: bool = False,
    kept: Sequence[KeptAdapter] = (),
) -> Family:
    """Align names and classify by headers. Raises DataError that lists every task that does not fit."""
    check_task_names([*tasks, *(adapter.name for adapter in kept)])
    names = tuple(sorted(tasks))
    checkpoints = tuple(tasks[name] for name in names)
    taken = [
        f"`{name}` of {checkpoint.path}"
        for checkpoint in (base, *checkpoints, *(adapter.model for adapter in kept))
        for name in checkpoint.tensors
        if PART_NAME.search(name)
    ]
    if taken:
        raise DataError(
            "tensors with names that bundles give to parts of one:\n  " + "\n  ".join(taken[:20]), hint="rename them"
        )
    alignments = _alignments(base, checkpoints)
    aligned = dict(zip(names, zip(checkpoints, alignments)))
    _check_elements(base, aligned)
    _check_architecture(base, aligned)
    own_to_aligned = [alignment.names for alignment in alignments]
    own_names = tuple({aligned: own for own, aligned in names.items()} for names in own_to_aligned)
    others = sorted({aligned for task in own_names for aligned in task} - set(base.tensors))
    resnet = is_resnet(base.tensors)
    tied = [
        {mapping[alias]: mapping[target] for alias, target in aliases(checkpoint.tensors).items()}
        for mapping, checkpoint in zip(own_to_aligned, checkpoints)
    ]
    tensors = []
    for name in [*base.tensors, *others]:
        parts = tuple(
            checkpoint.tensors[own[name]] if name in own else None for own, checkpoint in zip(own_names, checkpoints)
        )
        of_base = base.tensors.get(name)
        if of_base is None and not kept:  # a kept adapter uses the unchanged base
            of_base = absent_alias(base.config, base.tensors, name)
        tensor = FamilyTensor(name=name, base=of_base, tasks=parts, tensor_class=TensorClass.MERGEABLE)
        targets = {tied[index].get(name) for index in tensor.present}
        if not tensor.present:
            tensor = replace(tensor, tensor_class=TensorClass.BASE_ONLY)
        elif len(targets) == 1 and None not in targets and not (kept and tensor.base is not None):
            tensor = replace(tensor, tensor_class=TensorClass.TIED, reason=str(targets.pop()))
        elif any(part.name in checkpoint.private for part, checkpoint in zip(parts, checkpoints) if part is not None):
            tensor = replace(tensor, tensor_class=TensorClass.PRIVATE, reason="saved whole by an adapter")
        elif reason := why_private(name, tensor.base, parts, private=private, merge_heads=merge_heads, resnet=resnet):
            resized = is_resized(name, tensor.base, parts, private=private, merge_heads=merge_heads, resnet=resnet)
            tensor = replace(tensor, tensor_class=TensorClass.PRIVATE, reason=reason, resized=resized)
        tensors.append(tensor)
    return Family(
        base=base,
        task_names=names,
        tasks=checkpoints,
        tensors=tuple(tensors),
        own_names=own_names,
        kept=tuple(sorted(kept, key=lambda adapter: adapter.name)),
    )


def _alignments(base: Checkpoint, tasks: Sequence[Checkpoint]) -> list[Alignment]:
    """Align the names of each task with the base's. Tasks whose headers do not differ share one alignment."""
    found: dict[object, Alignment] = {}
    alignments = []
    for task in tasks:
        types = model_types(base.config, task.config)
        words = [*(task.config.get("architectures") or ()), task.config.get("model_type")]
        kind = " ".join(word for word in words if isinstance(word, str))
        header = types, kind, tuple((name, tensor.shape) for name, tensor in task.tensors.items())
        if header not in found:
            found[header] = align(base.tensors, task.tensors, model_types=types, kind=kind)
        alignments.append(found[header])
    return alignments


def _check_elements(base: Checkpoint, tasks: Mapping[str, tuple[Checkpoint, Alignment]]) -> None:
    """Raise DataError for tensors that are empty in one model and not in the other."""
    problems = []
    for name, (checkpoint, alignment) in tasks.items():
        for own, tensor in checkpoint.tensors.items():
            other = base.tensors.get(alignment.names[own])
            if other is None or (not tensor.num_elements) == (not other.num_elements):
                continue
            who, its = (f"task `{name}`", tensor) if not tensor.num_elements else ("the base", other)
            full = other if its is tensor else tensor
            problems.append(f"{who}: `{its.name}` {list(its.shape)} ({its.path}), not {list(full.shape)}")
    if problems:
        more = f"\n  … {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(
            f"tensors that {foreign.ZERO_3}:\n  " + "\n  ".join(problems[:20]) + more, hint=foreign.ZERO_3_HINT
        )


def _check_architecture(base: Checkpoint, tasks: Mapping[str, tuple[Checkpoint, Alignment]]) -> None:
    """Raise DataError that lists every task whose config differs, or whose tensors fit the base not at all or in two
    ways.

    A task fits if most of its own tensors, or of the base's, are in the other model: it may be a part of the base, or
    have parts that the base lacks.
    """
    problems, unclear = [], []
    for name, (checkpoint, alignment) in tasks.items():
        most = min(len(base.tensors), len(checkpoint.tensors))
        if found := differences(base.config, checkpoint.config):
            problems.append(f"task `{name}`: {'; '.join(found)} ({checkpoint.path}, {base.path})")
        elif alignment.unclear:
            possible = "; ".join(map(str, alignment.unclear[:4]))
            unclear.append(f"task `{name}` ({checkpoint.path}) fits the base in several ways: {possible}")
        elif 2 * len(alignment.matched) < most:
            problems.append(_misfit(name, base, checkpoint, alignment))
    if unclear:
        raise DataError(
            "it is unclear which tensors of the base a task was trained from:\n  " + "\n  ".join(unclear),
            hint="give the part of the base that was trained as the base, or save the task under the base's names",
        )
    if problems:
        raise DataError(
            "not of one architecture:\n  " + "\n  ".join(problems),
            hint="leave these tasks out, or give the base they were fine-tuned from",
        )


def _misfit(name: str, base: Checkpoint, task: Checkpoint, alignment: Alignment) -> str:
    found = {alignment.names[own]: tensor for own, tensor in task.tensors.items()}
    kinds = [f"{model.config.get('model_type', '?')}" for model in (base, task)]
    other = [
        f"`{key}` is {list(found[key].shape)}, {list(tensor.shape)} in the base"
        for key, tensor in base.tensors.items()
        if key in found and found[key].shape != tensor.shape
    ]
    missing = [f"`{key}` is missing" for key in base.tensors if key not in found]
    examples = "; ".join((other + missing)[:3])
    types = f" ({kinds[1]}, the base is {kinds[0]})" if kinds[0] != kinds[1] else ""
    return (
        f"task `{name}`{types}: {len(alignment.matched)} of its {len(task.tensors)} tensors are in the base's "
        f"{len(base.tensors)} with the same name and shape ({task.path}). {len(other)} of the base's have another "
        f"shape, {len(missing)} are missing: {examples}"
    )
