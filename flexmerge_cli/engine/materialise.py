"""The run of `merge`: source weights in, the arrays of a bill out, and what was lost on the way.

Each weight is read once here (statistics of a method read it before). Work items are ranges of one tensor over the base
and all tasks; workers read, merge, encode, decode what they encoded, and write; one thread takes the hashes and the
sums, in order. So bytes and numbers do not depend on threads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.bill import Bill
from flexmerge_cli.allocation.manifest import Measured
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup, effective_dtype
from flexmerge_cli.checkpoint.digest import RangeDigest, TensorDigest, digest_range
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, TO_TORCH
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.device import as_tensor, single_threaded, to_bytes
from flexmerge_cli.engine.output import Output
from flexmerge_cli.engine.pool import Buffers, ordered_map
from flexmerge_cli.engine.statistics import Domains, Span, run_statistics
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.methods.method import Call, Where
from flexmerge_cli.residuals import mask as masks

# Elements of one work item. 256 k elements of nine models stay in the second-level cache while they are worked on.
CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the weights lie, by aligned name."""

    base: Mapping[str, StoredTensor]
    tasks: tuple[Mapping[str, StoredTensor], ...]
    describe: tuple[str, ...]
    """Per task, then the base: what to call it in an error."""


@dataclass(slots=True, kw_only=True)
class _Piece:
    """What one range of one tensor adds."""

    written: list[tuple[Part, int, np.ndarray]] = field(default_factory=list)
    """(part, first byte, bytes), in the order of parts."""
    sources: dict[int, RangeDigest] = field(default_factory=dict)
    """Task, or -1 for the base."""
    decoded: dict[int, RangeDigest] = field(default_factory=dict)
    """Task -> digest of what a reader will get; tasks whose bits are their source's are left out."""
    errors: dict[int, float] = field(default_factory=dict)
    """Task -> Σ (θ̂ - θ)², float64."""


def materialise(
    bill: Bill,
    sources: Sources,
    folder: Path,
    *,
    device: torch.device,
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
) -> Measured:
    """Write the bill's weight files below `folder`. Raises DataError if a source is not what the plan saw.

    chunk_elements: a multiple of 8. on_bytes is told the source bytes read.
    """
    assert chunk_elements % 8 == 0
    with Reader() as reader, single_threaded(), Output(folder, bill.files, bill.total_bytes) as output:
        run = _Run(bill, sources, reader, output, device, threads, chunk_elements, on_bytes, on_stage)
        run.statistics()
        run.gains()
        measured = run.write()
        measured.sha256 = output.finish()
        return measured


class _Run:
    """State of one run; nothing of it outlives `materialise`."""

    def __init__(
        self,
        bill: Bill,
        sources: Sources,
        reader: Reader,
        output: Output,
        device: torch.device,
        threads: int,
        chunk_elements: int,
        on_bytes: Callable[[int], None],
        on_stage: Callable[[str], None],
    ) -> None:
        self.bill, self.plan, self.sources = bill, bill.plan, sources
        self.reader, self.output, self.device, self.threads = reader, output, device, threads
        self.chunk_elements, self.on_bytes, self.on_stage = chunk_elements, on_bytes, on_stage
        self.buffers = Buffers()
        self.unit_of = {name: unit.name for unit in bill.allocation.units for name in unit.tensors}
        self.domains = Domains({name: block.name for block in self.plan.blocks for name in block.tensors})
        self.stats: dict[int, dict[str, Any]] = {}
        self.gamma: dict[tuple[str, Tasks], np.ndarray] = {}
        self.gamma_parts = {
            (part.tensor, part.task): part
            for file in bill.files
            for part in file.parts
            if part.array.role == "gamma" and part.task is not None
        }

    # Before the first element

    def statistics(self) -> None:
        """What methods must know of the whole scope, for every method that some group uses."""
        used = {group.method for storage in self.bill.storages.values() for group in storage.groups}
        names = sorted(t.name for t in self.plan.tensors if t.class_ is TensorClass.MERGEABLE)
        spans = [span for name in names for span in self._spans(name)]
        for index, call in enumerate(self.bill.calls):
            first = call.statistics
            if first is None or index not in used:
                continue

            def told(number: int, name: str = call.method.name) -> None:
                self.on_stage(f"{name}: statistics, pass {number}")

            self.stats[index] = run_statistics(
                first, spans, self.domains, self._all_deltas, threads=self.threads, on_pass=told
            )

    def gains(self) -> None:
        """The factors of masked methods: sums over each unit, known before its masks are decoded."""
        jobs = [
            (storage, group)
            for storage in self.bill.storages.values()
            for group in storage.groups
            if group.kind == "masked" and group.method is not None and self.bill.calls[group.method].gain is not None
        ]
        if not jobs:
            return
        self.on_stage("factors of the masks")
        spans = [(storage, group, span) for storage, group in jobs for span in self._spans(storage.tensor.name)]

        def work(item: tuple[Storage, StoredGroup, Span]) -> np.ndarray:
            _, group, (name, start, stop) = item
            raw = self._read(name, (*group.tasks, -1), start, stop)
            deltas = self._deltas(name, group.tasks, raw)
            centre = self._call(group)(deltas, self._where(name, start, group.tasks), self._group_stats(group, name))
            unified = self._rounded(centre.delta, _array(group, "unified").array.dtype)
            taken = torch.where(centre.mask(deltas, unified), unified, 0.0)
            sums = [_sum_abs(deltas), _sum_abs(taken)]
            return torch.stack(sums).cpu().numpy()

        sums: dict[tuple[str, Tasks, int], dict[str, np.ndarray]] = {}
        for (_, group, (name, _, _)), part in zip(spans, ordered_map(spans, work, threads=self.threads)):
            assert group.method is not None
            key = (self.unit_of[name], group.tasks, group.method)
            per_tensor = sums.setdefault(key, {})
            per_tensor[name] = per_tensor[name] + part if name in per_tensor else part
        for (unit, tasks, method), per_tensor in sums.items():
            gain = self.bill.calls[method].gain
            assert gain is not None
            stack = np.stack(list(per_tensor.values()), axis=-1)
            sizes = np.array([self.plan.tensor(name).num_elements for name in per_tensor], np.float64)
            gamma = gain(stack[0], stack[1], sizes).astype(np.float32)
            self.gamma[unit, tasks] = gamma

    # The pass that writes

    def write(self) -> Measured:
        self.on_stage("merge")
        measured = Measured()
        storages = [storage for storage in self.bill.storages.values() if storage.parts]
        storages.sort(key=lambda storage: (-ITEM_BYTES[storage.parts[0].array.dtype], storage.parts[0].name))
        spans = [(storage, span) for storage in storages for span in self._spans(storage.tensor.name)]
        errors: dict[tuple[str, int], float] = {}
        source_digests: dict[int, TensorDigest] = {}
        decoded: dict[int, TensorDigest] = {}

        def work(place: int) -> _Piece:
            for storage, (name, start, stop) in spans[place + self.threads + 1 : place + self.threads + 2]:
                for model in self._models(storage):
                    self.reader.will_need(self._source(name, model), start, stop)
            return self._piece(*spans[place])

        pieces = ordered_map(range(len(spans)), work, threads=self.threads)
        for place, ((storage, (name, _, _)), piece) in enumerate(zip(spans, pieces)):
            for part, start_byte, data in piece.written:
                self.output.hashed(part, start_byte, data)
            for into, found in ((source_digests, piece.sources), (decoded, piece.decoded)):
                for model, part_digest in found.items():
                    into.setdefault(model, TensorDigest()).add(part_digest)
            for task, error in piece.errors.items():
                errors[name, task] = errors.get((name, task), 0.0) + error
            if place + 1 == len(spans) or spans[place + 1][0] is not storage:
                self._check_sources(storage, source_digests)
                measured.digests[name] = self._decoded_digests(storage, decoded)
                source_digests, decoded = {}, {}
        self._write_gamma()
        self._tied_digests(measured)
        self._distances(measured, errors)
        return measured

    def _piece(self, storage: Storage, span: Span) -> _Piece:
        name, start, stop = span
        piece = _Piece()
        raw = self._read(name, self._models(storage), start, stop)
        for model, data in raw.items():
            piece.sources[model] = digest_range(data, start * self._source(name, model).item_bytes)
        for group in storage.groups:
            if group.kind == "copy":
                self._copy(storage, group, raw, start, piece)
            else:
                self._merge(storage, group, raw, span, piece)
        base = next((part for part in storage.parts if part.array.role == "base"), None)
        if base is not None:
            values = as_tensor(raw[-1], self._source(name, -1).dtype)
            # A copy: the buffer that was read into is the next item's, and the hash is taken later.
            self._emit(base, start, _cast(values, base.array.dtype).clone(), piece)
        return piece

    def _copy(
        self, storage: Storage, group: StoredGroup, raw: dict[int, np.ndarray], start: int, piece: _Piece
    ) -> None:
        for part in group.parts:
            if part.readers[0] not in group.tasks:
                continue  # written with the group of its first reader
            leader = storage.tensor.same[part.readers[0]]
            dtype = storage.tensor.dtype_of(leader)
            if part.array.dtype == dtype:
                self._emit_bytes(part, start * ITEM_BYTES[dtype], raw[leader].copy(), piece)
                continue
            values = as_tensor(raw[leader], dtype)
            cast = _cast(values, part.array.dtype)
            data = self._emit(part, start, cast, piece)
            error = float(torch.linalg.vector_norm(cast.float() - values.float(), dtype=torch.float64)) ** 2
            for task in part.readers:
                piece.errors[task] = error
                piece.decoded[task] = digest_range(data, start * ITEM_BYTES[part.array.dtype])

    def _merge(
        self, storage: Storage, group: StoredGroup, raw: dict[int, np.ndarray], span: Span, piece: _Piece
    ) -> None:
        name, start, _ = span
        tensor, cast = storage.tensor, self.bill.allocation.dtype
        deltas = self._deltas(name, group.tasks, raw)
        base = as_tensor(raw[-1], self._source(name, -1).dtype).to(self.device, torch.float32)
        found = self._call(group)(deltas, self._where(name, start, group.tasks), self._group_stats(group, name))
        decoded: list[Tensor]
        if group.kind == "merged":
            part = group.parts[0]
            value = _no_negative_zero(base + _no_negative_zero(found.float()))
            value = _no_negative_zero(_cast(value, part.array.dtype))
            self._check_finite(value, name, start, group)
            self._emit(part, start, value, piece)
            decoded = [value] * len(group.tasks)
        else:
            part = _array(group, "unified")
            unified = self._rounded(found.delta, part.array.dtype)
            self._check_finite(unified, name, start, group)
            self._emit(part, start, _cast(unified, part.array.dtype), piece)
            stored_base = _cast(base, _array(group, "base").array.dtype).float()
            taken = found.mask(deltas, unified)
            gamma = self.gamma.get((self.unit_of[name], group.tasks), np.ones(len(group.tasks), np.float32))
            mask_parts = {part.task: part for part in group.parts if part.array.role == "mask"}
            packed = masks.pack(taken.cpu().numpy())
            decoded = []
            for row, task in enumerate(group.tasks):
                self._emit_bytes(mask_parts[task], start // 8, packed[row], piece)
                # As residuals/mask.py decodes: one product, one sum, both float32.
                shifted = stored_base + unified * torch.tensor(gamma[row], device=self.device)
                decoded.append(torch.where(taken[row], shifted, stored_base))
        shared: dict[tuple[int, str], RangeDigest] = {}
        for task, value in zip(group.tasks, decoded):
            dtype = effective_dtype(tensor.dtype_of(task), cast)
            key = (id(value), dtype)
            mine = _cast(value, dtype)
            if key not in shared:
                self._check_finite(mine, name, start, group)
                shared[key] = digest_range(to_bytes(mine), start * ITEM_BYTES[dtype])
            piece.decoded[task] = shared[key]
            own = as_tensor(raw[tensor.same[task]], tensor.dtype_of(task)).to(self.device, torch.float32)
            piece.errors[task] = float(torch.linalg.vector_norm(mine.float() - own, dtype=torch.float64)) ** 2

    # Reading

    def _spans(self, name: str) -> list[Span]:
        total = self.plan.tensor(name).num_elements
        # Private tensors differ in shape; each task's own length is cut alike.
        total = max(
            [total, *(int(np.prod(shape)) for shape in self.plan.tensor(name).shapes or () if shape is not None)]
        )
        return [
            (name, start, min(start + self.chunk_elements, total))
            for start in range(0, max(total, 1), self.chunk_elements)
        ]

    def _models(self, storage: Storage) -> tuple[int, ...]:
        """What has to be read of a tensor: of equal tasks the first, and the base if something merges."""
        leaders = sorted({storage.tensor.same[task] for group in storage.groups for task in group.tasks})
        merges = any(group.kind != "copy" for group in storage.groups)
        return (*leaders, -1) if merges else tuple(leaders)

    def _source(self, name: str, model: int) -> StoredTensor:
        return self.sources.base[name] if model < 0 else self.sources.tasks[model][name]

    def _read(self, name: str, models: Sequence[int], start: int, stop: int) -> dict[int, np.ndarray]:
        """Bytes per model; tasks with equal bits are read once, under the first one's index."""
        found = {}
        for model in models:
            leader = model if model < 0 else self.plan.tensor(name).same[model]
            if leader in found:
                continue
            tensor = self._source(name, leader)
            low, high = min(start, tensor.num_elements), min(stop, tensor.num_elements)
            buffer = self.buffers.get(leader, (high - low) * tensor.item_bytes)
            found[leader] = self.reader.read(tensor, low, high, buffer)
            self.on_bytes(found[leader].size)
        return found

    def _deltas(self, name: str, tasks: Sequence[int], raw: dict[int, np.ndarray]) -> Tensor:
        """float32(θ_k) - float32(θ_base), [k, n]."""
        tensor = self.plan.tensor(name)
        base = as_tensor(raw[-1], self._source(name, -1).dtype).to(self.device, torch.float32)
        deltas = torch.empty(len(tasks), base.numel(), device=self.device)
        for row, task in enumerate(tasks):
            own = as_tensor(raw[tensor.same[task]], tensor.dtype_of(task)).to(self.device, torch.float32)
            torch.sub(own, base, out=deltas[row])
        return deltas

    def _all_deltas(self, span: Span) -> tuple[Tensor, Where]:
        name, start, stop = span
        raw = self._read(name, (*self.plan.all_tasks, -1), start, stop)
        return self._deltas(name, self.plan.all_tasks, raw), self._where(name, start, self.plan.all_tasks)

    # Helpers

    def _call(self, group: StoredGroup) -> Call:
        assert group.method is not None
        return self.bill.calls[group.method]

    def _where(self, name: str, start: int, tasks: Sequence[int]) -> Where:
        names = tuple(self.plan.tasks[task].name for task in tasks)
        return Where(tasks=names, tensor=name, start=start, shape=self.plan.tensor(name).shape)

    def _group_stats(self, group: StoredGroup, name: str) -> Any:
        assert group.method is not None
        by_domain = self.stats.get(group.method)
        if by_domain is None:
            return None
        first = self.bill.calls[group.method].statistics
        assert first is not None
        return by_domain[self.domains.of(first.scope, name)].take(list(group.tasks))

    def _rounded(self, delta: Tensor, dtype: str) -> Tensor:
        """float32 as it will be read back from `dtype`."""
        return _no_negative_zero(_cast(delta.float(), dtype).float())

    def _emit(self, part: Part, start: int, values: Tensor, piece: _Piece) -> np.ndarray:
        data = to_bytes(values)
        self._emit_bytes(part, start * ITEM_BYTES[part.array.dtype], data, piece)
        return data

    def _emit_bytes(self, part: Part, start_byte: int, data: np.ndarray, piece: _Piece) -> None:
        if data.size:  # a private tensor may end before another task's
            self.output.write(part, start_byte, data)
            piece.written.append((part, start_byte, data))

    def _check_finite(self, value: Tensor, name: str, start: int, group: StoredGroup) -> None:
        # A sum is finite only if every term is, unless huge terms overflow; then the slow question decides.
        if bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all()):
            return
        index = start + int((~torch.isfinite(value)).nonzero()[0, 0])
        place = np.unravel_index(index, self.plan.tensor(name).shape)
        raise DataError(
            f"`{self._call(group).method.name}` gives a value that is not finite in `{name}` at "
            f"{[int(axis) for axis in place]}, tasks {', '.join(self.plan.tasks[task].name for task in group.tasks)}",
            hint="use a smaller scale, or a wider dtype",
        )

    def _check_sources(self, storage: Storage, digests: dict[int, TensorDigest]) -> None:
        tensor = storage.tensor
        for model, digest in digests.items():
            expected = tensor.base_digest if model < 0 else tensor.digests[model]
            if digest.hexdigest() != expected:
                stored = self._source(tensor.name, model)
                raise DataError(
                    f"{self.sources.describe[model]} has changed since the plan: `{stored.name}` of {stored.path}",
                    hint="make the plan again",
                )

    def _decoded_digests(self, storage: Storage, decoded: dict[int, TensorDigest]) -> dict[int, str]:
        tensor = storage.tensor
        return {
            task: decoded[task].hexdigest() if task in decoded else str(tensor.digests[task]) for task in tensor.present
        }

    def _write_gamma(self) -> None:
        for (unit, tasks), gamma in self.gamma.items():
            for row, task in enumerate(tasks):
                part, data = self.gamma_parts[unit, task], np.frombuffer(gamma[row : row + 1].tobytes(), np.uint8)
                self.output.write(part, 0, data)
                self.output.hashed(part, 0, data)

    def _tied_digests(self, measured: Measured) -> None:
        for storage in self.bill.storages.values():
            tensor = storage.tensor
            if tensor.class_ is TensorClass.TIED:
                target = measured.digests.get(tensor.reason, {})
                measured.digests[tensor.name] = {task: target[task] for task in tensor.present}

    def _distances(self, measured: Measured, errors: dict[tuple[str, int], float]) -> None:
        """Per task and per group of a unit, over ‖τ_k‖ of the whole task."""
        energy = self.plan.task_energy()
        totals = np.zeros(len(energy))
        for unit in self.bill.allocation.units:
            for group in unit.groups:
                sums = {task: sum(errors.get((name, task), 0.0) for name in unit.tensors) for task in group.tasks}
                measured.group_distance[unit.name, group.tasks] = {
                    task: _distance(error, energy[task]) for task, error in sums.items()
                }
                for task, error in sums.items():
                    totals[task] += error
        measured.task_distance = {task: _distance(totals[task], energy[task]) for task in self.plan.all_tasks}


def _array(group: StoredGroup, role: str) -> Part:
    return next(part for part in group.parts if part.array.role == role)


def _cast(values: Tensor, dtype: str) -> Tensor:
    return values.to(getattr(torch, TO_TORCH[dtype]))


def _no_negative_zero(values: Tensor) -> Tensor:
    """-0 is written as +0."""
    return values + 0.0


def _sum_abs(deltas_kN: Tensor) -> Tensor:
    return torch.stack([row.abs().sum(dtype=torch.float64) for row in deltas_kN])


def _distance(error: float, energy: float) -> float | None:
    """‖θ̂ - θ‖ / ‖τ‖; 0 if exact, else None where ‖τ‖ = 0."""
    if error == 0:
        return 0.0
    return float(np.sqrt(error / energy)) if energy > 0 else None
