"""Measures what methods and stored forms must know about a whole scope before the first element is merged.

Reads the weights as often as statistics have passes. The results go to the chains of the worker and to the encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.storage import StoredGroup
from flexmerge_cli.engine.encode import Encoder
from flexmerge_cli.engine.pool import ordered_map
from flexmerge_cli.engine.runs import added
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.spans import Span, widest
from flexmerge_cli.engine.statistics import Key, run_statistics
from flexmerge_cli.engine.work import Worker
from flexmerge_cli.engine.writers.table import writer_of
from flexmerge_cli.engine.writers.writer import UnitValues
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.later import torch
from flexmerge_cli.methods.method import Scope, Statistic
from flexmerge_cli.stored.forms import form_of

Spans = Callable[[str, Scope], list[Span]]
"""Returns the ranges of a tensor for a scope."""


class StatisticsPass:
    """The passes before the one that writes."""

    def __init__(
        self,
        worker: Worker,
        encoder: Encoder,
        spans: Spans,
        threads: int,
        on_stage: Callable[[str], None],
        known: dict[Any, Any],
    ) -> None:
        """Take what measures. known: what passes of other layouts of the plan have found, which this one extends."""
        self.worker, self.encoder, self.spans = worker, encoder, spans
        self.layout, self.plan = worker.layout, worker.plan
        self.threads, self.on_stage, self._known = threads, on_stage, known
        self._names: frozenset[str] = frozenset()

    def measure(self, names: frozenset[str]) -> None:
        """Take all passes that merging these tensors needs."""
        self._names = names
        self._statistics()
        self._of_units()

    def _statistics(self) -> None:
        """Measure what steps, methods and experts must know about a whole scope, for every method that some group
        uses."""
        mergeable = [tensor.name for tensor in self.plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
        for index, chain in enumerate(self.worker.chains):
            used = self._used(index)
            if not used:
                continue
            name = self.layout.calls[index].method.name
            first = chain.call.statistics if chain.call is not None else None
            after = [step.statistics for step in chain.steps] + [first]
            for number, step in enumerate(chain.steps):
                by_domain = None
                if step.statistics is not None:
                    # Later steps may measure stepped tensors that this method does not merge.
                    wide = any(later is not None and later.scope != "tensor" for later in after[number + 1 :])
                    places = mergeable if wide else [tensor for tensor, _ in used]
                    everyone = [(tensor, self.plan.all_tasks) for tensor in places]
                    what = f"{step.step.name}: statistics"
                    found = self._measure(index, step.statistics, everyone, number, what)
                    by_domain = {domain: value for (domain, _), value in found.items()}
                chain.step_stats.append(by_domain)
            groups = [(tensor, group.tasks) for tensor, group in used]
            if first is not None:
                found = self._measure(index, first, groups, len(chain.steps), f"{name}: statistics")
                chain.stats = self._lookup(first, found)
            expert: Any = chain.coded.expert if chain.coded else None
            if expert is not None:
                found = self._measure(index, expert, groups, 0, f"{name}: statistics of the experts", "tensor")
                chain.expert_stats = self._lookup(expert, found)

    def _used(self, index: int) -> list[tuple[str, StoredGroup]]:
        """List the tensors and groups of a method; copied tensors of their units also count in its sums."""
        found = []
        for unit in (one for one in self.layout.allocation.units if not self._names.isdisjoint(one.tensors)):
            storages = [self.layout.storages[name] for name in unit.tensors]
            groups = {g.tasks: g for storage in storages for g in storage.groups if g.method == index}
            found += [(name, group) for group in groups.values() for name in unit.tensors]
        return found

    def _measure(
        self,
        index: int,
        first: Statistic,
        groups: Sequence[tuple[str, Tasks]],
        num_steps: int,
        what: str,
        scope: Scope = "element",
    ) -> dict[Key, Any]:
        """Run one statistic of a method, by its index, on deltas that have been through the first steps."""
        chain = self.worker.chains[index]
        wanted: dict[str, list[Tasks]] = {}
        for name, of_group in groups:
            sets = wanted.setdefault(self.worker.domain(first.scope, name), [])
            tasks = of_group if getattr(first, "per", "task") == "group" else self.plan.all_tasks
            if tasks not in sets:
                sets.append(tasks)
        key = (self.layout.allocation.methods[index], what, num_steps, *((d, *sets) for d, sets in wanted.items()))
        if key in self._known:
            return dict(self._known[key])
        spans = []
        for name in sorted(t.name for t in self.plan.tensors if t.class_ is TensorClass.MERGEABLE):
            shape = self.plan.tensor(name).shape
            scopes = [scope, *(step.scope_of(name, shape) for step in chain.steps[:num_steps])]
            spans += self.spans(name, widest(scopes))

        def read(span: Span, tasks: Tasks) -> torch.Tensor:
            raw = self.worker.read(span, (*tasks, BASE))
            deltas = self.worker.deltas_in_place(raw, tasks)
            return self.worker.all_stepped(chain, deltas, span, tasks, num_steps)

        found = self._known[key] = run_statistics(
            first,
            wanted,
            spans,
            self.worker.domain,
            read,
            lambda span, tasks: self.worker.where(span, 0, tasks),
            threads=self.threads,
            device=self.worker.device,
            on_pass=lambda number: self.on_stage(f"{what}, pass {number}"),
        )
        return found

    def _lookup(self, first: Statistic, found: dict[Key, Any]) -> Callable[[Tasks, str], Any]:
        """Return a function that finds the finished value for a group's tasks and a tensor."""
        if getattr(first, "per", "task") == "group":
            return lambda tasks, tensor: found[self.worker.domain(first.scope, tensor), tasks]
        everyone = self.plan.all_tasks
        return lambda tasks, tensor: found[self.worker.domain(first.scope, tensor), everyone].take(list(tasks))

    def _of_units(self) -> None:
        """Compute what groups store once for all tensors of a unit, which the writers of these tensors need."""
        methods, units = self.layout.allocation.methods, {unit.name: unit for unit in self.layout.allocation.units}
        used = [
            (index, name, group)
            for index, call in enumerate(self.layout.calls)
            if form_of(call).of_unit(call)
            for name, group in self._used(index)
        ]
        jobs: list[tuple[StoredGroup, Span]] = []
        for index, name, group in used:
            unit, scope = (
                self.encoder.unit_of[name],
                self.worker.chains[index].scope_of(name, self.plan.tensor(name).shape),
            )
            known = self._known.get((units[unit], methods[index], group.tasks))
            if known is None:
                jobs += [(group, span) for span in self.spans(name, scope)]
            else:
                self.encoder.of_units[unit, group.tasks] = known
        if not jobs:
            return
        self.on_stage("factors of the blocks")

        def work(job: tuple[StoredGroup, Span]) -> np.ndarray:
            group, span = job
            return _of_unit(group).sums(self.encoder, group, self.worker.read(span, (*group.tasks, BASE)))

        groups: dict[tuple[str, Tasks], StoredGroup] = {}
        totals: dict[tuple[str, Tasks], dict[str, np.ndarray]] = {}
        with ordered_map(jobs, work, threads=self.threads, device=self.worker.device) as parts:
            for (group, span), part_skR in zip(jobs, parts):
                key = self.encoder.unit_of[span.tensor], group.tasks
                groups[key] = group
                total_sk = totals.setdefault(key, {}).setdefault(span.tensor, np.zeros(part_skR.shape[:2]))
                for place in np.ndindex(total_sk.shape):
                    total_sk[place] = added(float(total_sk[place]), part_skR[place])
        for key, group in groups.items():
            assert group.method is not None
            elements_T = np.array([self.plan.tensor(name).num_elements for name in totals[key]], np.float64)
            sums_skT = np.stack(list(totals[key].values()), axis=-1)
            call = self.layout.calls[group.method]
            values = _of_unit(group).values(call, sums_skT, elements_T)
            self.encoder.of_units[key] = self._known[units[key[0]], methods[group.method], group.tasks] = values


def _of_unit(group: StoredGroup) -> UnitValues:
    found = writer_of(group).of_unit
    assert found is not None
    return found
