"""One range of one tensor: read, merge, encode, decode what was encoded, write. What the threads of `merge` run.

Knows nothing of order, sums over ranges, or files; materialise.py hands out the ranges and joins the pieces.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.bill import Bill
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup, effective_dtype
from flexmerge_cli.checkpoint.digest import RangeDigest, digest_range
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, TO_TORCH
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.device import as_tensor, to_bytes
from flexmerge_cli.engine.output import Output
from flexmerge_cli.engine.pool import Buffers
from flexmerge_cli.engine.spans import Span, tiles
from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.method import Where
from flexmerge_cli.residuals import mask as masks

# Elements that are merged at once: task vectors, sums and results of eight tasks stay in the second-level cache.
# Repeat: python -m tests.bench merge
TILE_ELEMENTS = 1 << 16

BASE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the weights lie, by aligned name."""

    base: Mapping[str, StoredTensor]
    tasks: tuple[Mapping[str, StoredTensor], ...]
    describe: tuple[str, ...]
    """Per task, then the base: what to call it in an error."""


@dataclass(slots=True)
class Piece:
    """What one range adds."""

    written: list[tuple[Part, int, np.ndarray]] = field(default_factory=list)
    """(part, first byte, bytes)."""
    sources: dict[int, RangeDigest] = field(default_factory=dict)
    """Task, or BASE."""
    decoded: dict[int, RangeDigest] = field(default_factory=dict)
    """Task -> digest of what a reader will get; tasks whose bits are their source's are left out."""
    errors: dict[int, float] = field(default_factory=dict)
    """Task -> Σ (θ̂ - θ)², float64."""


@dataclass(slots=True)
class Raw:
    """The bits of one range, per model; tasks with equal bits share the first one's."""

    span: Span
    bits: dict[int, Tensor]
    """In the source's dtype, one axis, on the CPU: valid until this thread reads again."""
    rows: Tensor | None
    """[models, n], in the order of `bits`, where all have one dtype and length; the same memory."""


class Worker:
    """Reads and merges ranges. Thread-safe: what changes is the thread's own."""

    def __init__(self, bill: Bill, sources: Sources, reader: Reader, output: Output, device: torch.device) -> None:
        self.bill, self.plan, self.sources = bill, bill.plan, sources
        self.reader, self.output, self.device = reader, output, device
        self.cast = bill.allocation.dtype
        self.buffers = Buffers()
        self.unit_of = {name: unit.name for unit in bill.allocation.units for name in unit.tensors}
        self.statistics: Callable[[StoredGroup, str], Any] = lambda _group, _tensor: None
        """Finished statistics of a group's method for one tensor; set once they are."""
        self.gamma: dict[tuple[str, Tasks], np.ndarray] = {}
        """(unit, tasks) -> float32 [k]."""
        self.on_bytes: Callable[[int], None] = lambda _count: None

    # Reading

    def source(self, name: str, model: int) -> StoredTensor:
        return self.sources.base[name] if model == BASE else self.sources.tasks[model][name]

    def models(self, storage: Storage) -> tuple[int, ...]:
        """What has to be read of a tensor: of equal tasks the first, and the base if something merges."""
        leaders = sorted({storage.tensor.same[task] for group in storage.groups for task in group.tasks})
        merges = any(group.kind != "copy" for group in storage.groups)
        return (*leaders, BASE) if merges else tuple(leaders)

    def read(self, span: Span, models: Sequence[int]) -> Raw:
        same = self.plan.tensor(span.tensor).same
        leaders = dict.fromkeys(model if model == BASE else same[model] for model in models)
        tensors = [self.source(span.tensor, leader) for leader in leaders]
        # Private tensors of other shapes: each ends where it ends.
        ranges = [(min(span.start, tensor.num_elements), min(span.stop, tensor.num_elements)) for tensor in tensors]
        sizes = [(high - low) * tensor.item_bytes for tensor, (low, high) in zip(tensors, ranges)]
        starts = [sum(-(-size // 64) * 64 for size in sizes[:row]) for row in range(len(sizes))]
        buffer = self.buffers.get("raw", starts[-1] + sizes[-1])
        bits = {}
        for leader, tensor, (low, high), start, size in zip(leaders, tensors, ranges, starts, sizes):
            found = self.reader.read(tensor, low, high, buffer[start : start + size])
            bits[leader] = as_tensor(found, tensor.dtype)
            self.on_bytes(size)
        rows = None
        if len({tensor.dtype for tensor in tensors}) == 1 and len(set(sizes)) == 1 and sizes[0] % 64 == 0:
            rows = as_tensor(buffer[: starts[-1] + sizes[-1]], tensors[0].dtype).view(len(sizes), -1)
        return Raw(span, bits, rows)

    def will_need(self, storage: Storage, span: Span) -> None:
        for model in self.models(storage):
            self.reader.will_need(self.source(span.tensor, model), span.start, span.stop)

    def own(self, raw: Raw, task: int) -> Tensor:
        return raw.bits[self.plan.tensor(raw.span.tensor).same[task]]

    def deltas(self, raw: Raw, tasks: Sequence[int], low: int, high: int) -> Tensor:
        """float32(θ_k) - float32(θ_base) of elements [low, high) of the range, [k, n]. Valid until the next call."""
        buffer = self.buffers.get("deltas", len(tasks) * (high - low) * 4)[: len(tasks) * (high - low) * 4]
        on_cpu = as_tensor(buffer, "F32").view(len(tasks), high - low)
        deltas = on_cpu if self.device.type == "cpu" else torch.empty_like(on_cpu, device=self.device)
        base = self.on_device(raw.bits[BASE][low:high])
        same, order = self.plan.tensor(raw.span.tensor).same, list(raw.bits)
        first = order.index(same[tasks[0]])
        if raw.rows is not None and order[first : first + len(tasks)] == list(tasks):
            # One operation for all tasks takes a third of the time of one for each.
            return torch.sub(self.on_device(raw.rows[first : first + len(tasks), low:high]), base, out=deltas)
        for row, task in enumerate(tasks):
            torch.sub(self.on_device(self.own(raw, task)[low:high]), base, out=deltas[row])
        return deltas

    def on_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.float32)

    def where(self, span: Span, low: int, tasks: Sequence[int]) -> Where:
        names = tuple(self.plan.tasks[task].name for task in tasks)
        return Where(tasks=names, tensor=span.tensor, start=span.start + low, shape=self.plan.tensor(span.tensor).shape)

    # Merging

    def piece(self, storage: Storage, span: Span) -> Piece:
        """All that one range of a tensor stores."""
        piece = Piece()
        raw = self.read(span, self.models(storage))
        for model, bits in raw.bits.items():
            item_bytes = self.source(span.tensor, model).item_bytes
            piece.sources[model] = digest_range(to_bytes(bits), span.start * item_bytes)
        for group in storage.groups:
            if group.kind == "copy":
                self._copy(storage, group, raw, piece)
            elif group.kind == "merged":
                self._merge(storage, group, raw, piece)
            else:
                self._mask(storage, group, raw, piece)
        base = next((part for part in storage.parts if part.array.role == "base"), None)
        if base is not None:
            # A copy: the buffer that was read into is the next item's, and the hash is taken later.
            self._emit(base, span.start, cast(raw.bits[BASE], base.array.dtype).clone(), piece)
        return piece

    def group_value(self, group: StoredGroup, raw: Raw, low: int, high: int) -> tuple[Any, Tensor]:
        """What the method makes of the group here, and the task vectors it was made from."""
        assert group.method is not None
        deltas = self.deltas(raw, group.tasks, low, high)
        where = self.where(raw.span, low, group.tasks)
        return self.bill.calls[group.method](deltas, where, self.statistics(group, raw.span.tensor)), deltas

    def rounded(self, delta: Tensor, dtype: str) -> Tensor:
        """float32 as it will be read back from `dtype`."""
        return cast(delta.float(), dtype).float().add_(0.0)

    def _copy(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        for part in group.parts:
            if part.readers[0] not in group.tasks:
                continue  # written with the group of its first reader
            values = self.own(raw, part.readers[0])
            stored = cast(values, part.array.dtype)
            data = self._emit(part, raw.span.start, stored.clone() if stored is values else stored, piece)
            if stored is not values:
                error = sum(
                    float(self.squared((stored[low:high].float() - values[low:high].float())[None])[0])
                    for low, high in tiles(len(values), TILE_ELEMENTS)
                )
                digest = digest_range(data, raw.span.start * ITEM_BYTES[part.array.dtype])
                for task in part.readers:
                    piece.errors[task], piece.decoded[task] = error, digest

    def _merge(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        part = group.parts[0]
        count = raw.span.stop - raw.span.start
        stored = torch.empty(count, dtype=torch_dtype(part.array.dtype))
        dtypes = [effective_dtype(storage.tensor.dtype_of(task), self.cast) for task in group.tasks]
        errors = np.zeros(len(group.tasks))
        for low, high in tiles(count, TILE_ELEMENTS):
            found, deltas = self.group_value(group, raw, low, high)
            base = self.on_device(raw.bits[BASE][low:high])
            # -0 is written as +0: adding 0 makes it so, before the sum and, where rounding can give it, after it.
            stored[low:high].copy_(base + found.float().add_(0.0))
            if stored.dtype is not torch.float32:
                stored[low:high].add_(0.0)
            for dtype in set(dtypes):
                rows = [row for row, own in enumerate(dtypes) if own == dtype]
                lost = deltas if len(rows) == len(dtypes) else deltas[rows]
                # Of the task vectors, not of the weights: what is lost is as small as they are, or smaller.
                lost.sub_(self.on_device(cast(stored[low:high], dtype)) - base)
                errors[rows] += self.squared(lost)
        self._check_finite(stored, group, raw.span)
        data = self._emit(part, raw.span.start, stored, piece)
        digests: dict[str, RangeDigest] = {}
        for row, (task, dtype) in enumerate(zip(group.tasks, dtypes)):
            if dtype not in digests:
                mine = (
                    data if dtype == part.array.dtype else to_bytes(self._finite(cast(stored, dtype), group, raw.span))
                )
                digests[dtype] = digest_range(mine, raw.span.start * ITEM_BYTES[dtype])
            piece.decoded[task], piece.errors[task] = digests[dtype], float(errors[row])

    def _mask(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        unified_part, base_part = array(group, "unified"), array(group, "base")
        mask_parts = {part.task: part for part in group.parts if part.array.role == "mask"}
        count, start = raw.span.stop - raw.span.start, raw.span.start
        stored = torch.empty(count, dtype=torch_dtype(unified_part.array.dtype))
        dtypes = [effective_dtype(storage.tensor.dtype_of(task), self.cast) for task in group.tasks]
        decoded = [torch.empty(count, dtype=torch_dtype(dtype)) for dtype in dtypes]
        taken = np.empty((len(group.tasks), count), bool)
        gamma = self.gamma.get((self.unit_of[raw.span.tensor], group.tasks), np.ones(len(group.tasks), np.float32))
        errors = [0.0] * len(group.tasks)
        for low, high in tiles(count, TILE_ELEMENTS):
            found, deltas = self.group_value(group, raw, low, high)
            unified = self.rounded(found.delta, unified_part.array.dtype)
            stored[low:high].copy_(unified)
            base = cast(self.on_device(raw.bits[BASE][low:high]), base_part.array.dtype).float()
            takes = found.mask(deltas, unified)
            taken[:, low:high] = takes.cpu().numpy()
            for row, task in enumerate(group.tasks):
                # As residuals/mask.py decodes: one product, one sum, both float32.
                shifted = base + unified * torch.tensor(gamma[row], device=self.device)
                decoded[row][low:high].copy_(torch.where(takes[row], shifted, base))
                lost = self.on_device(decoded[row][low:high]) - self.on_device(self.own(raw, task)[low:high])
                errors[row] += self.squared(lost[None])[0]
        self._emit(unified_part, start, self._finite(stored, group, raw.span), piece)
        packed = masks.pack(taken)
        for row, task in enumerate(group.tasks):
            self._emit_bytes(mask_parts[task], start // 8, packed[row], piece)
            mine = to_bytes(self._finite(decoded[row], group, raw.span))
            piece.decoded[task] = digest_range(mine, start * ITEM_BYTES[dtypes[row]])
            piece.errors[task] = float(errors[row])

    def squared(self, lost_kN: Tensor) -> np.ndarray:
        """Σ x² of each row of float32 [k, n], in float64: [k]."""
        if lost_kN.device.type != "cpu":
            return lost_kN.double().square().sum(1).cpu().numpy()
        size = lost_kN.numel() * 8
        wide_kN = as_tensor(self.buffers.get("wide", size)[:size], "F64").view(lost_kN.shape).copy_(lost_kN)
        return np.array([float(torch.dot(row, row)) for row in wide_kN])

    def _finite(self, values: Tensor, group: StoredGroup, span: Span) -> Tensor:
        self._check_finite(values, group, span)
        return values

    def _check_finite(self, values: Tensor, group: StoredGroup, span: Span) -> None:
        # A sum is finite only if every term is, unless huge terms overflow; then the slow question decides.
        if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
            return
        assert group.method is not None
        index = span.start + int((~torch.isfinite(values)).nonzero()[0, 0])
        place = [int(axis) for axis in np.unravel_index(index, self.plan.tensor(span.tensor).shape)]
        names = ", ".join(self.plan.tasks[task].name for task in group.tasks)
        raise DataError(
            f"`{self.bill.calls[group.method].method.name}` gives a value that is not finite in `{span.tensor}` at "
            f"{place}, tasks {names}",
            hint="use a smaller scale, or a wider dtype",
        )

    def _emit(self, part: Part, start: int, values: Tensor, piece: Piece) -> np.ndarray:
        data = to_bytes(values)
        self._emit_bytes(part, start * ITEM_BYTES[part.array.dtype], data, piece)
        return data

    def _emit_bytes(self, part: Part, start_byte: int, data: np.ndarray, piece: Piece) -> None:
        if data.size:  # a private tensor may end before another task's
            self.output.write(part, start_byte, data)
            piece.written.append((part, start_byte, data))


def array(group: StoredGroup, role: str) -> Part:
    return next(part for part in group.parts if part.array.role == role)


def torch_dtype(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, TO_TORCH[dtype])
    return found


def cast(values: Tensor, dtype: str) -> Tensor:
    """The same tensor where nothing changes."""
    return values.to(torch_dtype(dtype))
