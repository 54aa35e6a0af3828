"""Reads and writes plan.json, `flexmerge.plan/1`: what one pass over a family measured. Canonical JSON, sorted keys,
UTF-8, no times.

sha256      of the file's bytes with these 64 digits set to 0; an edited plan is refused
tasks       in code-point order of name; every list "per task" follows it
tensors     every tensor of every file. Per task: `digests`, `same` (first task with the same bits), `is_base`
            (the base, cast to the task's dtype, has its bits), and `dtypes` and `shapes` where they differ; null for a
            task without the tensor. Mergeable ones have `gram`, [M, M] float64, and if `settings.statistics` is `all`
            also `coding`: how well they can be coded in few bits, which `auto` needs
rows        the rows of tensors with one row per token that not all models have, `<tensor>@rows`: records like those of
            `tensors`
vocabularies  such tensors, whose own records are for the rows that all models have, and the places of these rows in
            each model
splits      tensors that are split (family/split.py): `tensors` has their parts, `<tensor>@part0`, …, in place of them
adapters    tasks that are kept as adapters of the base, in order of name: they are in no list "per task"; see
            adapter_changes.py
blocks      in forward order; `order` refers to them by name
settings    what the order was made with; another order is made from the same measurements (`flexmerge plan plan.json`)
Readers refuse unknown keys; a change of meaning makes it /2. A file is written beside its place and renamed, so it is
whole or absent.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import ROWS_SUFFIX, Family, RowMap, Vocabulary
from flexmerge_cli.family.split import Split, whole_of
from flexmerge_cli.formats.members import Member, PlanAdapter, PlanTask
from flexmerge_cli.formats.plan_check import check_plan
from flexmerge_cli.formats.plan_records import (
    PlanBase,
    PlanBlock,
    PlanMerge,
    PlanSettings,
    PlanTensor,
)
from flexmerge_cli.formats.pools import check_request
from flexmerge_cli.formats.sealed import is_sealed, read_sealed, save_sealed, sealed
from flexmerge_cli.order.order import Merge
from flexmerge_cli.record import Count, Items, Record, Shape
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.size import Size, Target

FORMAT = "flexmerge.plan/1"
MAX_PLAN_BYTES = 1 << 30  # Gram matrices of 30 tasks take 20 kB per tensor


class Plan(Record):
    """Everything that a cut needs."""

    format: Literal["flexmerge.plan/1"]
    generator: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    one_model_bytes: Count
    base: PlanBase
    tasks: Items[PlanTask]
    adapters: Items[PlanAdapter] = ()
    tensors: Items[PlanTensor]
    blocks: Items[PlanBlock]
    order: Items[PlanMerge]
    settings: PlanSettings
    near_ties: Count
    rows: Items[PlanTensor] = ()
    vocabularies: Items[Vocabulary] = ()
    splits: Items[Split] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        check_plan(self)
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def all_tasks(self) -> tuple[int, ...]:
        """The tasks that merge; kept adapters are numbered after them."""
        return tuple(range(len(self.tasks)))

    @property
    def stored(self) -> tuple[PlanTensor, ...]:
        """Everything that is stored by itself: tensors, and rows of vocabularies."""
        return self.tensors + self.rows

    @property
    def readers(self) -> tuple[Member, ...]:
        """All members that read a bundle: the tasks, then the kept adapters."""
        return (*self.tasks, *self.adapters)

    @property
    def reader_names(self) -> tuple[str, ...]:
        return tuple(reader.name for reader in self.readers)

    def target(self, size: Size) -> Target:
        """Convert a size to bytes of this plan's bundle, where a kept adapter counts as a model.

        Raises UsageError for more models than there are.
        """
        return size.target(num_tasks=len(self.readers), one_model_bytes=self.one_model_bytes)

    @property
    def merges_products(self) -> bool:
        """Whether tensors merge in pairs by their products (family/factors.py), and not by themselves."""
        return self.settings.adapters == "pool" and any(task.adapter == "lora" for task in self.tasks)

    def require_models(self) -> None:
        """Raise UsageError if the tasks are no models that could run."""
        if self.merges_products:
            raise UsageError("a pool of LoRA adapters has no models to run", hint="plan with --adapters merge")

    def check_request(self, request: MergeRequest) -> None:
        """Raise UsageError for a request that cannot merge these members."""
        if self.merges_products:
            check_request(request)

    def not_low_rank(self) -> Iterator[tuple[str, str]]:
        """Yield each tensor that is not one tensor for all tasks and matrices of low rank beside it, and why, as far as
        kinds of members and ways of storing tell."""
        if self.merges_products:
            yield self.tensors[0].name, "is a factor of a pooled adapter, which `export --as-lora` serves as it is"
        yield from ((split.tensor, "is stored in parts") for split in self.splits)
        yield from ((name, "has rows of each task's own") for one in self.vocabularies for name in one.tensors)
        yield from (found for member in self.readers for found in member.not_low_rank())

    @property
    def kept(self) -> tuple[int, ...]:
        """The readers that are kept adapters."""
        return tuple(range(len(self.tasks), len(self.readers)))

    @property
    def kept_names(self) -> tuple[str, ...]:
        return tuple(self.readers[reader].name for reader in self.kept)

    @property
    def own_bytes(self) -> int:
        """The bytes of the tensors that readers store in weight files of their own."""
        return sum(reader.own_bytes for reader in self.readers)

    @property
    def own_names(self) -> list[str]:
        """The tensors that only such files hold, sorted: no record of the plan has their names."""
        return sorted({name for reader in self.readers for name in reader.own_names} - set(self._by_name))

    def base_readers(self, tensor: PlanTensor) -> tuple[int, ...]:
        """Return the kept adapters that read a tensor of the base. If each of them replaces it, all of them read it: it
        is stored because a base that lacks it would not load."""
        if tensor.base_dtype is None:
            return ()
        found: dict[str, tuple[int, ...]] = self.__dict__.setdefault("_base_readers", {})
        if tensor.name not in found:
            needs = [reader.needs_base(tensor.name) for reader in self.readers]
            found[tensor.name] = tuple(place for place, need in enumerate(needs) if need) or self.kept
        return found[tensor.name]

    def tensor(self, name: str) -> PlanTensor:
        return self._by_name[name]

    def find(self, name: str) -> PlanTensor | None:
        return self._by_name.get(name)

    def vocabulary(self, tensor: str) -> Vocabulary | None:
        """Return the vocabulary of a tensor, or of its `@rows`; None if all models have the same rows."""
        return self._vocabulary_of.get(tensor.removesuffix(ROWS_SUFFIX))

    def rows_of(self, tensor: str, task: int | None) -> RowMap | None:
        """Return where a task, or the base (None), has the rows of a tensor that all models have; None if all models
        have the same rows, and for a kept adapter."""
        vocabulary = self.vocabulary(tensor)
        return None if vocabulary is None else vocabulary.of(task)

    def split(self, tensor: str) -> Split | None:
        """Return the split that has a tensor as a part; None if the tensor is not part of a split one."""
        whole, place = whole_of(tensor)
        return None if place is None else self._split_of[whole]

    def whole_shape(self, name: str, shape: Shape, task: int | None) -> Shape:
        """Return the shape that a tensor of this name and shape has in the file of a task, or of the base (None)."""
        split, rows = self.split(name), self.rows_of(name, task)
        if split is not None:
            return split.whole(shape)
        return shape if rows is None else (rows.rows, *shape[1:])

    def section(self, name: str, whole: StoredTensor, task: int | None) -> StoredTensor:
        """Return a tensor out of the whole one that the file of a task, or of the base (None), has: rows, or a part."""
        split, rows = self.split(name), self.rows_of(name, task)
        if split is not None:
            return split.take(whole, name)
        return whole if rows is None else whole.take(rows.own if name.endswith(ROWS_SUFFIX) else rows.common)

    def shapes_of(self, reader: int) -> dict[str, Shape]:
        """Map the own name of every tensor that a reader has to its shape."""
        member, found = self.readers[reader], {}
        for name in [*(tensor.name for tensor in self.tensors), *self.own_names]:
            given = member.given(name, self.find(name), reader)
            if given is not None:
                found[whole_of(member.names.get(name, name))[0]] = self.whole_shape(name, given.shape, reader)
        return found

    def joined_tasks(self) -> set[int]:
        """Return the tasks with a tensor that is put together from rows or parts stored separately."""
        joined = {task for found in self.vocabularies for task, rows in enumerate(found.tasks) if not rows.is_plain}
        return joined | {task for split in self.splits for task in self.tensor(split.names[0]).present}

    def is_divided_as(self, family: Family) -> bool:
        """Return whether tensors have the rows and parts that they have in a family, so that names mean the same."""
        return (self.vocabularies, self.splits) == (family.vocabularies, family.splits)

    @property
    def division(self) -> dict[str, Any]:
        """How tensors are divided into rows and parts, as a manifest records it: without what there is none of."""
        vocabularies = [vocabulary.entry(self.task_names) for vocabulary in self.vocabularies]
        splits = [split.model_dump() for split in self.splits]
        return {name: found for name, found in (("vocabularies", vocabularies), ("splits", splits)) if found}

    def own_name(self, task: int, tensor: str) -> str:
        return self.tasks[task].names.get(tensor, tensor)

    def whole_name(self, task: int, tensor: str) -> str:
        """Return what the file of a task calls a tensor, or the whole that this is rows or a part of."""
        return whole_of(self.own_name(task, tensor.removesuffix(ROWS_SUFFIX)))[0]

    def merges(self) -> tuple[Merge, ...]:
        """Return the order with block indices."""
        index = {block.name: place for place, block in enumerate(self.blocks)}
        return tuple(
            Merge(block=index[merge.block], left=merge.left, right=merge.right, similarity=merge.similarity)
            for merge in self.order
        )

    def gram(self, tensor: PlanTensor) -> np.ndarray:
        """Return the Gram matrix of a tensor, [M, M] float64."""
        return np.array(tensor.gram, np.float64)

    def whole_gram(self) -> np.ndarray:
        """Return ⟨τ_j, τ_k⟩ over the mergeable tensors, [M, M] float64, summed in the plan's order."""
        total = np.zeros((len(self.tasks), len(self.tasks)))
        for tensor in self.tensors:
            if tensor.class_ is TensorClass.MERGEABLE:
                total += self.gram(tensor)
        return total

    def task_energy(self) -> np.ndarray:
        """Return ‖τ_k‖² over the mergeable tensors, [M] float64, summed in the plan's order."""
        return np.diag(self.whole_gram()).copy()

    @cached_property
    def _by_name(self) -> dict[str, PlanTensor]:
        return {tensor.name: tensor for tensor in self.stored}

    @cached_property
    def _vocabulary_of(self) -> dict[str, Vocabulary]:
        return {name: vocabulary for vocabulary in self.vocabularies for name in vocabulary.tensors}

    @cached_property
    def _split_of(self) -> dict[str, Split]:
        return {split.tensor: split for split in self.splits}


def sealed_plan(fields: Mapping[str, Any]) -> Plan:
    """Check a plan's fields and fill in its sha256. Raises ValidationError."""
    return sealed(Plan, fields)


def save_plan(plan: Plan, path: Path) -> None:
    """Write the plan, replacing what is there. Raises MachineError, and then leaves what is there as it was."""
    save_sealed(plan, path)


def is_plan(path: Path) -> bool:
    """Return whether a file is, or once was, a plan: what a new plan may replace."""
    return is_sealed(path, FORMAT, MAX_PLAN_BYTES)


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises UsageError if it is no plan, was edited, or is not consistent."""
    return read_sealed(Plan, path, FORMAT, "plan", "make it again with `flexmerge plan`", MAX_PLAN_BYTES)
