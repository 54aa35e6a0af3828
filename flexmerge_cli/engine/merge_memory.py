"""Estimates the memory of `merge`: for its statistics, and for the pass that writes. Reads no weights.

Methods, steps and coders state their own workspace (methods/method.py, residuals/coder.py). What the engine adds to it
in work.py, writers/ and statistics_pass.py is counted here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.storage import Storage, StoredGroup, effective_dtype
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.engine.chain import Chain, chains_of
from flexmerge_cli.engine.memory import (
    FIXED_BYTES,
    RECORD_BYTES,
    SPAN_BYTES,
    THREAD_BYTES,
    Pass,
    fitting,
    open_bytes,
    reading_bytes,
    unjoined_bytes,
)
from flexmerge_cli.engine.runs import RUN_ELEMENTS
from flexmerge_cli.engine.sources import Sources
from flexmerge_cli.engine.spans import (
    CHUNK_ELEMENTS,
    TILE_ELEMENTS,
    Span,
    row_elements,
    run_of,
    step_and_run,
    tiles,
    widest,
)
from flexmerge_cli.engine.work import runs_in_tiles
from flexmerge_cli.engine.writers.table import visit_scope, writer_of
from flexmerge_cli.engine.writers.writer import Work
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.methods.method import Scope, Statistic
from flexmerge_cli.methods.step import StepCall

SMALLEST_CHUNK = 1 << 12


def merge_bytes(
    layout: BundleLayout,
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    sources: Sources | None = None,
    others: Sequence[BundleLayout] = (),
) -> int:
    """Return the most memory that `merge` takes for this layout, in bytes. sources: only they tell what reading
    adapters takes. others: the layouts that are written at the same time, which read each range once."""
    layouts = (layout, *others)
    chains = [chains_of(one) for one in layouts]
    scopes = {
        name: [visit_scope(of_one, one.storages[name]) for of_one, one in zip(chains, layouts) if name in one.storages]
        for name in dict.fromkeys(name for one in layouts for name in one.storages)
    }
    runs = [_Run(one, of_one, scopes, chunk_elements, sources) for of_one, one in zip(chains, layouts)]
    models = len(layout.plan.tasks) + 1
    fixed = FIXED_BYTES + RECORD_BYTES * models * len(layout.plan.tensors) + threads * THREAD_BYTES
    passes = [run.writing().split(threads) for run in runs]
    # A thread makes one bundle's values after another's, in the same buffers.
    writing = max(working for working, _ in passes) + sum(results for _, results in passes)
    statistics = max((taken.bytes(threads) for run in runs for taken in run.statistics()), default=0)
    return fixed + SPAN_BYTES * sum(run.num_spans for run in runs) + max(writing, statistics)


def merge_chunk(
    layouts: Sequence[BundleLayout], threads: int, max_memory: int | None, sources: Sources | None = None
) -> int:
    """Return the elements of one work item of `merge`. Raises UsageError if even the smallest does not fit."""
    first, *others = layouts
    return fitting(
        lambda chunk: merge_bytes(first, threads, chunk, sources, others),
        CHUNK_ELEMENTS,
        SMALLEST_CHUNK,
        max_memory,
        threads,
    )


class _Run:
    """The passes of one layout."""

    def __init__(
        self,
        layout: BundleLayout,
        chains: Sequence[Chain],
        scopes: Mapping[str, Sequence[Scope]],
        chunk_elements: int,
        sources: Sources | None,
    ) -> None:
        """Take a layout. scopes: what visits of each tensor must see, for all layouts that are written together."""
        self.scopes = scopes
        self.sources = (sources.base, *sources.tasks) if sources is not None else ()
        self.layout, self.plan, self.chunk_elements = layout, layout.plan, chunk_elements
        self.chains = chains
        self.block_of = {name: block.name for block in self.plan.blocks for name in block.tensors}
        self.num_spans = 0

    def writing(self) -> Pass:
        """Return the pass that writes; the factors of masks are measured by the same calls."""
        found = Pass()
        for unit in self.layout.allocation.units:
            storages = [self.layout.storages[name] for name in unit.tensors]
            in_blocks = [storage for storage in storages if "block" in self.scopes[storage.tensor.name]]
            if in_blocks:
                self._block(found, in_blocks)
        for storage in self.layout.storages.values():
            scopes = self.scopes[storage.tensor.name]
            if "block" not in scopes and storage.parts:
                span = self._span(storage, *scopes)
                result = self._result(storage, span)
                work = max((self._work(storage, group, span) for group in storage.groups), default=0)
                work = max(work, self._reading(span.tensor, span.stop))
                deltas = max((self._deltas(group, span) for group in storage.groups), default=0)
                totals = self._unjoined(storage, span, whole=True)
                items = -(-_elements(storage.tensor) // max(1, span.stop))
                found.add(items, raw=self._raw(storage, span), deltas=deltas, work=work, result=result, totals=totals)
        return found

    def _block(self, found: Pass, storages: Sequence[Storage]) -> None:
        """Add all tensors of a unit in one visit. Their buffers are dropped at its end, so they count as work."""
        spans = [self._span(storage, "block") for storage in storages]
        work = sum(self._raw(storage, span) for storage, span in zip(storages, spans))
        groups = {group.tasks: group for storage in storages for group in storage.groups if group.method is not None}
        shapes = {storage.tensor.name: storage.tensor.shape for storage in storages}
        elements = sum(storage.tensor.num_elements for storage in storages)
        work += 8 * elements * len(groups) + 4 * elements * max((len(tasks) for tasks in groups), default=0)
        calls = [0]
        for tasks, group in groups.items():
            assert group.method is not None
            chain, k = self.chains[group.method], len(tasks)
            errors = 100 * elements if chain.products is not None else 0
            calls.append(chain.block_workspace(k, shapes) + errors + self._stepping(chain, storages, k))
        calls += [self._work(s, group, span) for s, span in zip(storages, spans) for group in s.groups]
        result = sum(self._result(storage, span) for storage, span in zip(storages, spans))
        found.add(1, work=work + max(calls), result=result)

    def _stepping(self, chain: Chain, storages: Sequence[Storage], k: int) -> int:
        """Return the bytes, over all tensors of a unit, that steps return and that they take one at a time."""
        if not chain.steps:
            return 0
        shapes = [storage.tensor.shape for storage in storages]
        taken = max(step.workspace(k, shape or (1,)) for step in chain.steps for shape in shapes)
        return taken + sum(4 * k * math.prod(shape) for shape in shapes)

    def statistics(self) -> Iterator[Pass]:
        """Yield the statistics passes of methods, steps and experts; a later pass of the same statistic takes no
        more."""
        mergeable = [tensor.name for tensor in self.plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
        everyone = [(name, self.plan.all_tasks) for name in mergeable]
        for index, chain in enumerate(self.chains):
            groups = [
                (name, group.tasks)
                for unit in self.layout.allocation.units
                for storage in (self.layout.storages[name] for name in unit.tensors)
                for group in storage.groups
                if group.method == index
                for name in unit.tensors
            ]
            if not groups:
                continue
            for number, step in enumerate(chain.steps):
                if step.statistics is not None:
                    yield self._measuring(chain, step.statistics, step.workspace, everyone, number)
            first = chain.call.statistics if chain.call is not None else None
            if chain.call is not None and first is not None:
                yield self._measuring(chain, first, chain.call.workspace, groups, len(chain.steps))
            expert: Any = chain.coded.expert if chain.coded is not None else None
            if expert is not None:
                yield self._measuring(chain, expert, expert.workspace, groups, 0, "tensor")

    def _measuring(
        self,
        chain: Chain,
        first: Statistic,
        workspace: Callable[[int, tuple[int, ...]], int],
        groups: Sequence[tuple[str, Tasks]],
        num_steps: int,
        scope: Scope = "element",
    ) -> Pass:
        found = Pass()
        sets: dict[str, set[Tasks]] = {}
        elements: dict[str, int] = {}
        for name, tasks in groups:
            domain = self._domain(first.scope, name)
            sets.setdefault(domain, set()).add(tasks if first.per == "group" else self.plan.all_tasks)
        names = {tensor.name: tensor for tensor in self.plan.tensors if tensor.class_ is TensorClass.MERGEABLE}
        for name, tensor in names.items():
            domain = self._domain(first.scope, name)
            elements[domain] = elements.get(domain, 0) + tensor.num_elements
        memory: Callable[[int, int], tuple[int, int]] = getattr(first, "memory", _few_numbers)
        for name, tensor in names.items():
            domain = self._domain(first.scope, name)
            if domain not in sets:
                continue
            steps = chain.steps[:num_steps]
            step_scope = widest(step.scope_of(name, tensor.shape) for step in steps)
            span = self._cut(name, tensor.num_elements, tensor.shape, widest([scope, step_scope]))
            n, needed = span.stop, len({task for tasks in sets[domain] for task in tasks})
            seen = (n,) if scope == "element" else tensor.shape
            tile = (min(n, TILE_ELEMENTS),) if scope == "element" else seen
            work = max(workspace(len(tasks), tile) + 4 * len(tasks) * math.prod(tile) for tasks in sets[domain])
            if any(len(tasks) < needed for tasks in sets[domain]):
                work += max(4 * len(tasks) * n for tasks in sets[domain])
            if steps:
                in_tiles = runs_in_tiles(step_scope, tensor.shape, span)
                shape = (max(high - low for low, high in tiles(n, span.run)),) if in_tiles else tensor.shape
                result = 8 * needed * math.prod(shape)
                work = max(work + 4 * needed * n * (not in_tiles), result + _steps(steps, needed, shape))
            work = max(work, self._reading(name, n))
            item = max(ITEM_BYTES[dtype] for dtype in self._dtypes_of(tensor))
            found.add(
                -(-tensor.num_elements // max(1, n)),
                raw=(needed + 1) * (n * item + 64),
                deltas=4 * needed * n + (4 * n if item != 4 else 0),
                work=work,
                result=sum(memory(len(tasks), n)[0] for tasks in sets[domain]),
                totals=sum(memory(len(tasks), elements[domain])[1] for tasks in sets[domain]),
            )
        return found

    # One item

    def _reading(self, name: str, count: int) -> int:
        """Return what reading `count` elements of one model takes, for the model that takes most."""
        return max((reading_bytes(model[name], count) for model in self.sources if name in model), default=0)

    def _span(self, storage: Storage, *scopes: Scope) -> Span:
        """Return the first range of a visit of these scopes, with the runs that this layout has alone."""
        tensor = storage.tensor
        span = self._cut(tensor.name, _elements(tensor), tensor.shape, *scopes)
        return replace(span, run=run_of(visit_scope(self.chains, storage), tensor.shape))

    def _cut(self, name: str, num_elements: int, shape: tuple[int, ...], *scopes: Scope) -> Span:
        """Return the first range of a tensor, which is the longest."""
        step, run = step_and_run(num_elements, shape, scopes, self.chunk_elements)
        self.num_spans += -(-num_elements // step)
        return Span(name, 0, min(step, num_elements), step >= num_elements, run)

    def _dtypes_of(self, tensor: PlanTensor) -> set[str]:
        base = {tensor.base_dtype} if tensor.base_dtype is not None else set()
        return {tensor.dtype_of(task) for task in tensor.present} | base

    def _raw(self, storage: Storage, span: Span) -> int:
        tensor, count = storage.tensor, span.stop - span.start
        representatives = {tensor.same[task] for group in storage.groups for task in group.tasks}
        sizes = [ITEM_BYTES[tensor.dtype_of(representative)] for representative in representatives]
        if tensor.base_dtype is not None:
            sizes.append(ITEM_BYTES[tensor.base_dtype])
        return sum(count * size + 64 for size in sizes)

    def _deltas(self, group: StoredGroup, span: Span) -> int:
        if group.method is None or self.chains[group.method].call is None:
            return 0
        chain = self.chains[group.method]
        whole = chain.coded is not None and chain.coded.expert is not None
        return 4 * len(group.tasks) * (span.stop if whole else self._tile(chain, span))

    def _tile(self, chain: Chain, span: Span) -> int:
        shape = self.plan.tensor(span.tensor).shape
        if not runs_in_tiles(chain.scope_of(span.tensor, shape), shape, span):
            return span.stop
        low, high = tiles(span.stop, span.run)[0]
        return high - low

    def _result(self, storage: Storage, span: Span) -> int:
        """Sum the bytes of a range that is written and hashed later, of its errors, and of the state of digests."""
        tensor = storage.tensor
        written = storage.num_bytes * span.stop // max(1, tensor.num_elements)
        written += self._unjoined(storage, span, whole=False)
        return written + 8 * len(tensor.present) * -(-span.stop // span.run) + 1024 * len(tensor.present)

    def _unjoined(self, storage: Storage, span: Span, *, whole: bool) -> int:
        """Sum what the digests of sources and decoded tensors carry of a range, or of the whole tensor, until it is
        joined.

        A tensor that is read at once carries nothing.
        """
        tensor = storage.tensor
        if span.last:
            return 0
        items = [ITEM_BYTES[tensor.dtype_of(task)] for task in tensor.present]
        items = [*items, *items, ITEM_BYTES[tensor.base_dtype]] if tensor.base_dtype is not None else items
        if whole:
            return sum(open_bytes(item * span.stop, item * tensor.num_elements) for item in items)
        return sum(unjoined_bytes(item * span.stop) for item in items)

    def _work(self, storage: Storage, group: StoredGroup, span: Span) -> int:
        """Return what computing one group of a range takes beside buffers and result."""
        tensor, n, k = storage.tensor, span.stop, len(group.tasks)
        items = [ITEM_BYTES[effective_dtype(tensor.dtype_of(t), self.layout.allocation.dtype)] for t in group.tasks]
        chain, t, merging = None, n, 0
        if group.method is not None:
            chain = self.chains[group.method]
            t = self._tile(chain, span)
            merging = self._merging(chain, tensor.name, tensor.shape, k, t)
            merging += 16 * t + 4 * k * t + (8 * k * t if span.run > RUN_ELEMENTS else 0)
        return writer_of(group).workspace(
            Work(
                chain=chain,
                storage=storage,
                group=group,
                n=n,
                t=t,
                items=items,
                merging=merging,
                is_cast=self.layout.allocation.dtype is not None,
            )
        )

    def _merging(self, chain: Chain, name: str, shape: tuple[int, ...], k: int, t: int) -> int:
        """Return the bytes that steps, call and calibration take for `t` elements."""
        if chain.call is None or chain.call.scope_of(name, shape) == "block":
            return 0
        scope = chain.call.scope_of(name, shape)
        row = max(1, row_elements(shape))
        seen = {"element": (t,), "row": (t // row, row)}.get(scope, shape)
        taken = chain.call.workspace(k, seen)
        if chain.steps:
            stepped = (t,) if t < math.prod(shape) else shape or (1,)
            taken = 4 * k * t + max(taken, 4 * k * t + _steps(chain.steps, k, stepped))
        if chain.calibrate is not None and chain.calibrate.scope_of(name, shape) == "tensor":
            taken = max(taken, 16 * t + chain.calibrate.workspace(k, shape))
        return taken

    def _domain(self, scope: str, tensor: str) -> str:
        return {"model": "", "block": self.block_of[tensor], "tensor": tensor}[scope]


def _elements(tensor: PlanTensor) -> int:
    """Return the number of elements of a tensor; that of the largest if it is private and its shapes differ."""
    return max([tensor.num_elements, *(math.prod(shape) for shape in tensor.shapes or () if shape is not None)])


def _few_numbers(num_tasks: int, _num_elements: int) -> tuple[int, int]:
    """Return the memory of a statistic that does not state its own."""
    return 64 * num_tasks, 64 * num_tasks


def _steps(steps: Sequence[StepCall], k: int, shape: tuple[int, ...]) -> int:
    return max((step.workspace(k, shape) for step in steps), default=0)
