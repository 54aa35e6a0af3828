"""Does what the threads of `merge` do with one range: reads it, makes task vectors of it, steps and merges them.

Knows nothing about what is stored (writers/), nor about order, sums over ranges or files (materialise.py).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.checkpoint.digest import RangeDigest, digest_range
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.chain import Chain, chains_of
from flexmerge_cli.engine.device import as_tensor, name_of, torch_dtype
from flexmerge_cli.engine.pool import Buffers
from flexmerge_cli.engine.read_models import read_models
from flexmerge_cli.engine.sources import BASE, Sources
from flexmerge_cli.engine.spans import Span, row_elements, tiles, widest
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Scope, Where
from flexmerge_cli.methods.reductions import flat


@dataclass(slots=True)
class Raw:
    """The bits of one range, by model; tasks with equal bits share those of the first."""

    span: Span
    bits: dict[int, Tensor]
    """The bits in the source's dtype, one axis, on the CPU: valid until this thread reads again."""
    rows: Tensor | None
    """The same memory as [models, n], in the order of `bits`, if all have one dtype and length."""
    digests: dict[int, RangeDigest]
    """The digests of the bits, if requested."""


class Worker:
    """Reads and merges ranges. Thread-safe: whatever changes belongs to one thread."""

    def __init__(
        self, layout: BundleLayout, sources: Sources, reader: Reader, device: "torch.device", buffers: Buffers
    ) -> None:
        self.layout, self.plan, self.sources = layout, layout.plan, sources
        self.reader = reader
        self._device, self._here = device, threading.local()
        self.buffers = buffers
        self.chains = chains_of(layout)
        self.block_of = {name: block.name for block in self.plan.blocks for name in block.tensors}
        self.on_bytes: Callable[[int], None] = lambda _count: None

    @property
    def device(self) -> "torch.device":
        """The device on which this thread computes."""
        found: torch.device = getattr(self._here, "device", self._device)
        return found

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Make this thread compute on the CPU inside the block."""
        self._here.device = torch.device("cpu")
        try:
            yield
        finally:
            del self._here.device

    # Reading

    def source(self, name: str, model: int) -> StoredTensor:
        return self.sources.base[name] if model == BASE else self.sources.tasks[model][name]

    def models(self, storage: Storage) -> tuple[int, ...]:
        """Return the models that must be read for a tensor: the first of equal tasks, and the base if something
        merges."""
        representatives = sorted({storage.tensor.same[task] for group in storage.groups for task in group.tasks})
        needs_base = any(self._needs_base(group) for group in storage.groups)
        needs_base = needs_base or any(part.array.role == "base" for part in storage.parts)
        return (*representatives, BASE) if needs_base else tuple(representatives)

    def _needs_base(self, group: StoredGroup) -> bool:
        if group.method is None:
            return False
        coded = self.chain(group).coded
        return coded is None or coded.centre != "none"

    def read(self, span: Span, models: Sequence[int], place: int = 0, *, digests: bool = False) -> Raw:
        """Read a range. place: which of the thread's buffers, if several tensors are read at once. digests: whether to
        digest the bits."""
        same = self.plan.tensor(span.tensor).same
        representatives = dict.fromkeys(model if model == BASE else same[model] for model in models)
        tensors = [self.source(span.tensor, representative) for representative in representatives]
        # Private tensors may have other shapes: each is read to its own end.
        ranges = [(min(span.start, tensor.num_elements), min(span.stop, tensor.num_elements)) for tensor in tensors]
        taken: list[RangeDigest] = []

        def on_read(tensor: StoredTensor, data: np.ndarray) -> None:
            if digests:  # while the bytes are in the cache
                start_byte = span.start * tensor.item_bytes
                last = start_byte + data.size >= tensor.num_elements * tensor.item_bytes
                taken.append(digest_range(data, start_byte, last=last))

        found, stacked = read_models(tensors, ranges, self.reader, self.buffers, ("raw", place), on_read)
        self.on_bytes(sum(data.size for data in found))
        rows = as_tensor(stacked, tensors[0].dtype).view(len(tensors), -1) if stacked is not None else None
        own = rows if rows is not None else [as_tensor(data, t.dtype) for data, t in zip(found, tensors, strict=True)]
        return Raw(span, dict(zip(representatives, own, strict=True)), rows, dict(zip(representatives, taken)))

    def will_need(self, span: Span, models: Sequence[int]) -> None:
        for model in models:
            self.reader.will_need(self.source(span.tensor, model), span.start, span.stop)

    def own(self, raw: Raw, task: int) -> Tensor:
        return raw.bits[self.plan.tensor(raw.span.tensor).same[task]]

    def on_device(self, values: Tensor) -> Tensor:
        return self.buffers.upload(values, self.device).to(torch.float32)

    def where(self, span: Span, low: int, tasks: Sequence[int]) -> Where:
        names = tuple(self.plan.tasks[task].name for task in tasks)
        shape, block = self.plan.tensor(span.tensor).shape, self.block_of[span.tensor]
        return Where(tasks=names, tensor=span.tensor, start=span.start + low, shape=shape, block=block)

    def rows_of(self, raw: Raw, tasks: Sequence[int]) -> Tensor | None:
        """Return the tasks' bits as one matrix [k, n], if they lie like that."""
        if raw.rows is None:
            return None
        order = list(raw.bits)
        first = order.index(self.plan.tensor(raw.span.tensor).same[tasks[0]])
        return raw.rows[first : first + len(tasks)] if order[first : first + len(tasks)] == list(tasks) else None

    # Merging

    def deltas_in_place(self, raw: Raw, tasks: Sequence[int]) -> Tensor:
        """Return the task vectors of the whole range like `deltas`, where possible in the memory of its bits, which are
        then lost: half of the memory is touched."""
        rows = self.rows_of(raw, tasks)
        if rows is None or rows.dtype is not torch.float32 or self.device.type != "cpu":
            return self.deltas(raw, tasks, 0, raw.span.stop - raw.span.start)
        return rows.sub_(self.on_device(raw.bits[BASE]))

    def deltas(self, raw: Raw, tasks: Sequence[int], low: int, high: int, place: int = 0) -> Tensor:
        """Return float32(θ_k) - float32(θ_base) of elements [low, high) of the range, [k, n]. Valid until the next
        call."""
        size = len(tasks) * (high - low) * 4
        on_cpu = as_tensor(self.buffers.get(("deltas", place), size)[:size], "F32").view(len(tasks), high - low)
        deltas = on_cpu if self.device.type == "cpu" else torch.empty_like(on_cpu, device=self.device)
        rows, bits = self.rows_of(raw, tasks), raw.bits[BASE][low:high]
        if rows is not None and rows.dtype is not torch.float32 and self._subtracts(bits, rows[:, low:high], deltas):
            return deltas
        base = self.on_device(bits)
        if rows is not None:
            # One operation for all tasks takes a third of the time of one for each.
            if rows.dtype is not torch.float32 and self.device.type == "cpu":
                return deltas.copy_(rows[:, low:high]).sub_(base)
            return torch.sub(self.on_device(rows[:, low:high]), base, out=deltas)
        for row, task in enumerate(tasks):
            torch.sub(self.on_device(self.own(raw, task)[low:high]), base, out=deltas[row])
        return deltas

    def _subtracts(self, base: Tensor, rows: Tensor, deltas: Tensor) -> bool:
        """Subtract the base from rows of another dtype in one pass through memory, if native.c can; return whether it
        did."""
        names = [name_of(bits.dtype) for bits in (base, rows)]
        if native.lib is None or self.device.type != "cpu" or not {*names} <= native.TYPES.keys():
            return False
        types = np.array([native.TYPES[name] for name in names])
        native.lib.flexmerge_deltas(
            base.data_ptr(), rows.data_ptr(), types.ctypes.data, *rows.shape, rows.stride(0), deltas.data_ptr()
        )
        return True

    def stepped(
        self, chain: Chain, deltas: Tensor, where: Where, tasks: Sequence[int], upto: int | None = None
    ) -> Tensor:
        """Return [k, n] after the first `upto` steps; the tensor itself if there are none."""
        for step, by_domain in zip(chain.steps[:upto], chain.step_stats):
            stats = None
            if by_domain is not None:
                assert step.statistics is not None
                stats = by_domain[self.domain(step.statistics.scope, where.tensor)].take(list(tasks))
            shaped = shape_for(deltas, step.scope_of(where.tensor, where.shape), where)
            deltas = flat(step(shaped, where, stats))
        return deltas

    def all_stepped(self, chain: Chain, deltas: Tensor, span: Span, tasks: Sequence[int], upto: int) -> Tensor:
        """Apply the first `upto` steps to the task vectors of a whole range: in place, tile by tile, where possible."""
        if not upto:
            return deltas
        shape = self.plan.tensor(span.tensor).shape
        scope = widest(step.scope_of(span.tensor, shape) for step in chain.steps[:upto])
        if not runs_in_tiles(scope, shape, span):
            return self.stepped(chain, deltas, self.where(span, 0, tasks), tasks, upto)
        for low, high in tiles(span.stop - span.start, span.run):
            tile, where = deltas[:, low:high].contiguous(), self.where(span, low, tasks)
            deltas[:, low:high] = self.stepped(chain, tile, where, tasks, upto)
        return deltas

    def tiles(self, chain: Chain, span: Span) -> list[tuple[int, int]]:
        """List the parts [low, high) of a range that the chain may merge one after another."""
        shape, count = self.plan.tensor(span.tensor).shape, span.stop - span.start
        in_tiles = runs_in_tiles(chain.scope_of(span.tensor, shape), shape, span)
        return tiles(count, span.run) if in_tiles else [(0, count)]

    def value(self, group: StoredGroup, raw: Raw, low: int, high: int, whole: Any = None) -> tuple[Any, Tensor]:
        """Return what the method makes of the group here (a flat tensor, or a Centre), and the unstepped task vectors.

        whole: what a method of scope `block` has made of this tensor.
        """
        chain = self.chain(group)
        deltas = self.deltas(raw, group.tasks, low, high)
        if chain.call is None:
            return torch.zeros(high - low, device=self.device), deltas
        where = self.where(raw.span, low, group.tasks)
        if whole is None:
            stepped = self.stepped(chain, deltas, where, group.tasks)
            scope = chain.call.scope_of(where.tensor, where.shape)
            shaped = shape_for(stepped, scope, where)
            unstepped = shaped if stepped is deltas else shape_for(deltas, scope, where)
            whole = chain.call(shaped, where, chain.stats(group.tasks, where.tensor), unstepped)
        if isinstance(whole, Tensor):
            if chain.calibrate is not None and chain.calibrate.scope_of(where.tensor, where.shape) == "tensor":
                vectors = shape_for(deltas, "tensor", where)
                whole = chain.calibrate(whole.reshape(where.shape).double(), vectors, where)
            whole = whole.flatten()
        return whole, deltas

    def block_values(self, group: StoredGroup, raws: Mapping[str, Raw]) -> dict[str, Tensor]:
        """Apply a method of scope `block` to all tensors of a unit. Returns the merged task vector by name."""
        chain = self.chain(group)
        assert chain.call is not None
        deltas, unstepped = {}, {}
        for place, (name, raw) in enumerate(sorted(raws.items())):
            where = self.where(raw.span, 0, group.tasks)
            flat_kn = self.deltas(raw, group.tasks, 0, raw.span.stop, place)
            deltas[name] = shape_for(self.stepped(chain, flat_kn, where, group.tasks), "tensor", where)
            unstepped[name] = shape_for(flat_kn, "tensor", where)
        names = tuple(self.plan.tasks[task].name for task in group.tasks)
        first = next(iter(raws))
        block = self.block_of[first]
        where = Where(tasks=names, tensor=block, start=0, shape=(), block=block)
        found: dict[str, Tensor] = chain.call(deltas, where, chain.stats(group.tasks, first), unstepped)
        # A method may return what it got, which is this thread's buffer and is reused for the next group.
        return {name: value.clone() for name, value in found.items()}

    def chain(self, group: StoredGroup) -> Chain:
        assert group.method is not None
        return self.chains[group.method]

    def domain(self, scope: str, tensor: str) -> str:
        """Return the domain over which a statistic is measured: the model, a block, or a tensor."""
        return {"model": "", "block": self.block_of[tensor], "tensor": tensor}[scope]

    def rounded(self, delta: Tensor, dtype: str) -> Tensor:
        """Return float32 as it will be read back from `dtype`."""
        return cast(delta.float(), dtype).float() + 0.0


def runs_in_tiles(scope: Scope, shape: tuple[int, ...], span: Span) -> bool:
    """Return whether a chain of this scope may see a range piece by piece, whose pieces end where runs do."""
    return scope == "element" or (scope == "row" and span.run == row_elements(shape))


def shape_for(deltas: Tensor, scope: Scope, where: Where) -> Tensor:
    """Return [k, n] in the shape that methods of a scope take."""
    if scope == "row":
        return deltas.view(len(deltas), -1, max(1, row_elements(where.shape)))
    return deltas.view(len(deltas), *where.shape) if scope in ("tensor", "block") else deltas


def cast(values: Tensor, dtype: str) -> Tensor:
    """Cast values to a dtype; returns the same tensor if nothing changes."""
    return values.to(torch_dtype(dtype))
