"""Reuses what an earlier plan knows of a family, to read less when tasks are added or removed.

The digests of all tensors are known, and with them which tensors are equal. So private tensors, and tensors that are
the same in all tasks, are read only from new tasks. Whatever is measured over all tasks together (Gram matrices, how
their average codes) changes with the set of tasks, down to its rounding: those tensors are read from all tasks again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.survey_item import Measure, SurveyItem
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import Family, FamilyTensor
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.record import Shape

AGAIN = "make the plan again with `flexmerge plan --base …`"
HOLDING = (TensorClass.MERGEABLE, TensorClass.CONSTANT, TensorClass.PRIVATE)  # classes with digests of the bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What an earlier plan knows of a family."""

    plan: Plan
    new: frozenset[str]
    """Tasks that the plan does not know, even if it has a task of this name."""

    def _place(self, name: str) -> int | None:
        """Return the number of a task in the plan."""
        return self.plan.task_names.index(name) if name not in self.new and name in self.plan.task_names else None

    def check_headers(self, family: Family) -> None:
        """Raise DataError if the base or a known task has other tensors than the plan says."""
        of_base = {}
        for tensor in self.plan.tensors:
            whole = whole_of(tensor.name)[0]
            name = self.plan.base.names.get(whole, whole)
            if tensor.base_form is not None:
                dtype, shape = tensor.base_form
                is_recorded = self.plan.adapters or tensor.class_ in (TensorClass.MERGEABLE, TensorClass.BASE_ONLY)
                now = family.base.tensors.get(name) if not is_recorded else None
                of_base[name] = dtype, now.shape if now else self.plan.whole_shape(tensor.name, shape, None)
        problems = _problems("the base", family.base, of_base)
        for name, checkpoint in zip(family.task_names, family.tasks):
            place = self._place(name)
            if place is not None:
                own = {
                    self.plan.whole_name(place, tensor.name): (
                        tensor.dtype_of(place),
                        self.plan.whole_shape(tensor.name, tensor.shape_of(place), place),
                    )
                    for tensor in self.plan.tensors
                    if place in tensor.present
                }
                problems += _problems(f"task `{name}`", checkpoint, own)
        if problems:
            raise DataError("sources have changed since the plan:\n  " + "\n  ".join(problems[:20]), hint=AGAIN)

    def check_files(self, plan: Plan) -> None:
        """Raise DataError if the new plan has found other side files of a known task."""
        then = {reader.name: reader.files for reader in self.plan.readers if reader.name not in self.new}
        problems = [
            f"task `{reader.name}`: {file}"
            for reader in plan.readers
            if reader.name in then
            for file in sorted({**then[reader.name], **reader.files})
            if then[reader.name].get(file) != reader.files.get(file)
        ]
        if problems:
            raise DataError("sources have changed since the plan:\n  " + "\n  ".join(problems[:20]), hint=AGAIN)

    def is_tied(self, task: str, alias: str, target: str) -> bool | None:
        """Return whether two tensors of a task, given by aligned names, hold the same bits; None if that is not
        known."""
        place, records = self._place(task), [self.plan.find(name) for name in (alias, target)]
        if place is None or self.plan.rows_of(alias, place) or self.plan.rows_of(target, place):
            return None
        first, second = records
        if first is None or second is None or not {first.digests[place], second.digests[place]} - {None}:
            return None
        if first.class_ is TensorClass.TIED:
            return True if first.reason == target else None
        return first.digests[place] == second.digests[place] if second.class_ in HOLDING else None

    def low_rank(self, family: Family) -> dict[str, tuple[frozenset[str], dict[str, int] | None]]:
        """Map each task to the matrices that were examined, and to what was found about their changes."""
        if not self.plan.is_divided_as(family):
            return {}  # a name may now mean other elements
        found = {}
        for name in family.task_names:
            place = self._place(name)
            if place is not None:
                names = (
                    tensor.name
                    for tensor in self.plan.tensors
                    if tensor.class_ is TensorClass.MERGEABLE
                    and not tensor.is_base[place]
                    and len(tensor.shape_of(place)) >= 2
                )
                record = self.plan.tasks[place].low_rank
                found[name] = frozenset(names), record.model_dump() if record is not None else None
        return found

    def measure(
        self,
        family: Family,
        owners: Sequence[FamilyTensor],
        items: Sequence[SurveyItem],
        run: Callable[[Sequence[SurveyItem], str], list[Measure]],
    ) -> list[Measure]:
        """Measure the items as a new plan does, but read no more than is needed. run: reads and measures whole items.

        Raises DataError for a tensor that is read again and has changed.
        """
        digests = [
            [self._digest(family, owner, family.task_names[task], stored) for task, stored in item.tasks]
            for owner, item in zip(owners, items)
        ]
        partly = [self._is_partly_read(*each) for each in zip(owners, items, digests)]
        short = [
            replace(item, base=None, gram=False, codes=False, tasks=unknown)
            for item, known, is_short in zip(items, digests, partly)
            if is_short and (unknown := tuple(pair for pair, digest in zip(item.tasks, known) if digest is None))
        ]
        of_new = {id(item): found for item, found in zip(short, run(short, "read new tasks"))}
        of_short = iter(short)
        measures: list[Measure | None] = []
        for owner, item, known, is_short in zip(owners, items, digests, partly):
            found = of_new[id(next(of_short))] if is_short and None in known else None
            measures.append(self._completed(owner, item, known, found) if is_short else None)
        whole = [item for item, measure in zip(items, measures) if measure is None]
        again = iter(run(whole, "compare"))
        done = [measure if measure is not None else next(again) for measure in measures]
        for owner, item, known, measure in zip(owners, items, digests, done):
            self._check_digests(family, owner, item, known, measure)
        return done

    def measure_alone(
        self,
        items: Sequence[SurveyItem],
        digest: Callable[[str, int], str | None],
        run: Callable[[Sequence[SurveyItem], str], list[Measure]],
    ) -> list[Measure]:
        """Measure items in which nothing is compared. digest: maps an item's name and a task's number to a known
        digest."""
        known = [[digest(item.name, task) for task, _ in item.tasks] for item in items]
        short = [
            replace(item, tasks=tuple(pair for pair, digest in zip(item.tasks, of) if digest is None))
            for item, of in zip(items, known)
        ]
        found = iter(run([item for item in short if item.tasks], "read new tasks"))
        return [_joined(of, next(found) if item.tasks else None) for of, item in zip(known, short)]

    def base_digest(self, name: str, _task: int = 0) -> str | None:
        record = self.plan.find(name)
        return record.base_digest if record is not None else None

    def change_digest(self, adapter: str, name: str) -> str | None:
        """Return the digest of what a kept adapter makes of a tensor; None if it is not known."""
        records = {each.name: each for each in self.plan.adapters if each.name not in self.new}
        change = records[adapter].changes.get(name) if adapter in records else None
        return change.digest if change is not None else None

    def _digest(self, family: Family, owner: FamilyTensor, task: str, stored: StoredTensor) -> str | None:
        """Return the digest of a task's tensor; None if it is not known, or if some values may not be finite."""
        place, record = self._place(task), self.plan.find(owner.name)
        if place is None or record is None or record.class_ not in HOLDING or not record.finite:
            return None
        if not self._same_rows(family, owner.name, place, family.task_names.index(task)):
            return None
        form = (record.dtype_of(place), tuple(record.shape_of(place)))
        return record.digests[place] if form == (stored.dtype, stored.shape) else None

    def _same_rows(self, family: Family, tensor: str, place: int | None, task: int | None) -> bool:
        """Return whether the tensor has the same rows of the file of a task, or of the base (None), as before."""
        found = self.plan.rows_of(tensor, place), family.rows_of(tensor, task)
        then, now = (rows and (rows.rows, rows.common) for rows in found)  # however they were compared
        return then == now

    def _is_partly_read(self, owner: FamilyTensor, item: SurveyItem, known: Sequence[str | None]) -> bool:
        """Return whether only new tasks are read at first: for items without comparison, and for what may be
        constant."""
        if not item.gram:
            return any(digest is not None for digest in known)
        record = self.plan.find(owner.name)
        if record is None or not owner.could_be_constant or len(set(known) - {None}) != 1:
            return False
        # The record of a constant says whether it was compared with the base only if one task's tensor equals the
        # base's. It was not compared if an adapter holds it whole, nor if nothing compares it now.
        is_compared = any(record.is_base) or not any(task.adapter for task in self.plan.tasks)
        return record.class_ is TensorClass.MERGEABLE or (record.class_ is TensorClass.CONSTANT and is_compared)

    def _completed(
        self, owner: FamilyTensor, item: SurveyItem, known: Sequence[str | None], found: Measure | None
    ) -> Measure | None:
        """Return what measuring the whole item would give; None if the whole item must be measured after all."""
        joined = _joined(known, found)
        if not item.gram:
            return joined
        record = self.plan.find(owner.name)
        assert record is not None
        if len(set(joined.digests)) > 1 or joined.not_finite:
            return None
        like = next(place for place, digest in enumerate(record.digests) if digest == joined.digests[0])
        joined.base_digest, joined.is_base = record.base_digest, [record.is_base[like]] * len(item.tasks)
        return joined

    def _check_digests(
        self, family: Family, owner: FamilyTensor, item: SurveyItem, known: Sequence[str | None], found: Measure
    ) -> None:
        record = self.plan.find(owner.name)
        changed = [task for (task, _), now, then in zip(item.tasks, found.digests, known) if then not in (None, now)]
        who = [f"task `{family.task_names[task]}`" for task in changed]
        form = (item.base.dtype, item.base.shape) if item.base is not None else None
        is_known = record is not None and form is not None and record.base_form == form
        if record is not None and is_known and self._same_rows(family, owner.name, None, None):
            who += ["the base"] if record.base_digest not in (None, found.base_digest) else []
        if who:
            raise DataError(f"{who[0]} has changed since the plan: `{owner.name}`", hint=AGAIN)


def _joined(known: Sequence[str | None], found: Measure | None) -> Measure:
    """Return the measure of an item in which nothing is compared, from known digests and from what was read."""
    unknown = [position for position, digest in enumerate(known) if digest is None]
    read = iter(found.digests) if found is not None else iter(())
    digests = [digest if digest is not None else next(read) for digest in known]
    return Measure(
        digests=digests,
        base_digest=None,
        same=[digests.index(digest) for digest in digests],
        is_base=[False] * len(digests),
        gram=None,
        agreement=None,
        base_energy=0.0,
        not_finite=[(unknown[position], index) for position, index in found.not_finite] if found is not None else [],
        coding=None,
    )


def _problems(who: str, checkpoint: Checkpoint, then: Mapping[str, tuple[str, Shape]]) -> list[str]:
    now = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return [
        f"{who}: `{name}` was {_form(then.get(name))}, now {_form(now.get(name))}"
        for name in sorted({*then, *now})
        if _form(then.get(name)) != _form(now.get(name))
    ]


def _form(form: tuple[str, Shape] | None) -> str:
    return "missing" if form is None else f"{form[0]} {list(form[1])}"
