"""The run of `merge`: source weights in, the arrays of a bill out, and what was lost on the way.

Each weight is read once here; statistics of a method, and factors of masks, read it before. Threads take ranges of one
tensor over base and tasks (work.py); one thread takes hashes and sums, in order, so that neither bytes nor numbers
depend on threads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.bill import Bill
from flexmerge_cli.allocation.manifest import Measured
from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.checkpoint.digest import TensorDigest
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.engine.device import single_threaded
from flexmerge_cli.engine.output import Output
from flexmerge_cli.engine.pool import ordered_map
from flexmerge_cli.engine.spans import Span, cut, tiles
from flexmerge_cli.engine.statistics import Domains, run_statistics
from flexmerge_cli.engine.work import BASE, TILE_ELEMENTS, Piece, Sources, Worker, array
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass

# Elements of one work item, per model: 2 MiB of float32 is a large request for a disk, and whole pieces of the digest.
CHUNK_ELEMENTS = 1 << 19

__all__ = ["CHUNK_ELEMENTS", "Sources", "materialise"]


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
        worker = Worker(bill, sources, reader, output, device)
        worker.on_bytes = on_bytes
        run = _Run(worker, threads, chunk_elements, on_stage)
        run.statistics()
        run.gains()
        measured = run.write()
        measured.sha256 = output.finish()
        return measured


class _Run:
    """One run: what is read when, and how pieces are joined."""

    def __init__(self, worker: Worker, threads: int, chunk_elements: int, on_stage: Callable[[str], None]) -> None:
        self.worker, self.bill, self.plan, self.output = worker, worker.bill, worker.plan, worker.output
        self.threads, self.chunk_elements, self.on_stage = threads, chunk_elements, on_stage

    def spans(self, name: str) -> list[Span]:
        tensor = self.plan.tensor(name)
        # Private tensors may differ in shape; each task's own length is cut alike.
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in tensor.shapes or () if shape is not None]
        return cut(name, max([tensor.num_elements, *sizes]), tensor.shape, "element", self.chunk_elements)

    # Before the first element

    def statistics(self) -> None:
        """What methods must know of a whole scope, for every method that some group uses."""
        domains = Domains({name: block.name for block in self.plan.blocks for name in block.tensors})
        names = sorted(t.name for t in self.plan.tensors if t.class_ is TensorClass.MERGEABLE)
        spans = [span for name in names for span in self.spans(name)]
        finished: dict[int, dict[Any, Any]] = {}
        scopes: dict[int, tuple[str, str]] = {}
        for index, call in enumerate(self.bill.calls):
            first = call.statistics
            groups = [
                (storage.tensor.name, group)
                for storage in self.bill.storages.values()
                for group in storage.groups
                if group.method == index and group.kind != "copy"
            ]
            if first is None or not groups:
                continue
            per_group = getattr(first, "per", "task") == "group"
            wanted: dict[str, list[Tasks]] = {}
            for name, group in groups:
                sets = wanted.setdefault(domains.of(first.scope, name), [])
                tasks = group.tasks if per_group else self.plan.all_tasks
                if tasks not in sets:
                    sets.append(tasks)

            def told(number: int, name: str = call.method.name) -> None:
                self.on_stage(f"{name}: statistics, pass {number}")

            finished[index] = run_statistics(
                first,
                wanted,
                spans,
                domains,
                self._read_deltas,
                lambda span, tasks: self.worker.where(span, 0, tasks),
                threads=self.threads,
                on_pass=told,
            )
            scopes[index] = (first.scope, "group" if per_group else "task")

        def of_group(group: StoredGroup, tensor: str) -> Any:
            if group.method not in finished:
                return None
            scope, per = scopes[group.method]
            domain = domains.of(scope, tensor)
            if per == "group":
                return finished[group.method][domain, group.tasks]
            return finished[group.method][domain, self.plan.all_tasks].take(list(group.tasks))

        self.worker.statistics = of_group

    def _read_deltas(self, span: Span, tasks: Tasks) -> torch.Tensor:
        raw = self.worker.read(span, (*tasks, BASE))
        return self.worker.deltas(raw, tasks, 0, span.stop - span.start)

    def gains(self) -> None:
        """The factors of masked methods: sums over each unit, known before its masks are decoded."""
        jobs = [
            (group, span)
            for storage in self.bill.storages.values()
            for group in storage.groups
            if group.kind == "masked" and group.method is not None and self.bill.calls[group.method].gain is not None
            for span in self.spans(storage.tensor.name)
        ]
        if not jobs:
            return
        self.on_stage("factors of the masks")

        def work(job: tuple[StoredGroup, Span]) -> np.ndarray:
            group, span = job
            raw = self.worker.read(span, (*group.tasks, BASE))
            sums = np.zeros((2, len(group.tasks)))
            for low, high in tiles(span.stop - span.start, TILE_ELEMENTS):
                centre, deltas = self.worker.group_value(group, raw, low, high)
                unified = self.worker.rounded(centre.delta, array(group, "unified").array.dtype)
                taken = torch.where(centre.mask(deltas, unified), unified, 0.0)
                for kind, values in enumerate((deltas, taken)):
                    sums[kind] += [float(row.abs().sum(dtype=torch.float64)) for row in values]
            return sums

        sums: dict[tuple[str, Tasks, int], dict[str, np.ndarray]] = {}
        for (group, span), part in zip(jobs, ordered_map(jobs, work, threads=self.threads)):
            assert group.method is not None
            per_tensor = sums.setdefault((self.worker.unit_of[span.tensor], group.tasks, group.method), {})
            per_tensor[span.tensor] = per_tensor[span.tensor] + part if span.tensor in per_tensor else part
        for (unit, tasks, method), per_tensor in sums.items():
            gain = self.bill.calls[method].gain
            assert gain is not None
            delta_kT, masked_kT = np.stack(list(per_tensor.values()), axis=-1)
            sizes = np.array([self.plan.tensor(name).num_elements for name in per_tensor], np.float64)
            self.worker.gamma[unit, tasks] = gain(delta_kT, masked_kT, sizes).astype(np.float32)

    # The pass that writes

    def write(self) -> Measured:
        self.on_stage("merge")
        measured = Measured()
        storages = [storage for storage in self.bill.storages.values() if storage.parts]
        # The order of parts in their files, so that files are mostly written, and hashed, front to back.
        storages.sort(key=lambda storage: (-ITEM_BYTES[storage.parts[0].array.dtype], storage.parts[0].name))
        items = [(storage, span) for storage in storages for span in self.spans(storage.tensor.name)]
        errors: dict[tuple[str, int], float] = {}
        sources: dict[int, TensorDigest] = {}
        decoded: dict[int, TensorDigest] = {}

        def work(place: int) -> Piece:
            for storage, span in items[place + self.threads + 1 : place + self.threads + 2]:
                self.worker.will_need(storage, span)
            return self.worker.piece(*items[place])

        for (storage, span), piece in zip(items, ordered_map(range(len(items)), work, threads=self.threads)):
            for part, start_byte, data in piece.written:
                self.output.hashed(part, start_byte, data)
            for into, found in ((sources, piece.sources), (decoded, piece.decoded)):
                for model, digest in found.items():
                    into.setdefault(model, TensorDigest()).add(digest)
            for task, error in piece.errors.items():
                errors[span.tensor, task] = errors.get((span.tensor, task), 0.0) + error
            if span.last:
                self._check_sources(storage, sources)
                measured.digests[span.tensor] = {
                    task: decoded[task].hexdigest() if task in decoded else str(storage.tensor.digests[task])
                    for task in storage.tensor.present
                }
                sources, decoded = {}, {}
        self._write_gamma()
        for storage in self.bill.storages.values():
            tensor = storage.tensor
            if tensor.class_ is TensorClass.TIED:
                target = measured.digests.get(tensor.reason, {})
                measured.digests[tensor.name] = {task: target[task] for task in tensor.present}
        self._distances(measured, errors)
        return measured

    def _check_sources(self, storage: Storage, digests: dict[int, TensorDigest]) -> None:
        tensor = storage.tensor
        for model, digest in digests.items():
            expected = tensor.base_digest if model == BASE else tensor.digests[model]
            if digest.hexdigest() != expected:
                stored, who = self.worker.source(tensor.name, model), self.worker.sources.describe[model]
                raise DataError(
                    f"{who} has changed since the plan: `{stored.name}` of {stored.path}", hint="make the plan again"
                )

    def _write_gamma(self) -> None:
        parts = {
            (part.tensor, part.task): part
            for file in self.bill.files
            for part in file.parts
            if part.array.role == "gamma"
        }
        for (unit, tasks), gamma in self.worker.gamma.items():
            for row, task in enumerate(tasks):
                data = np.frombuffer(gamma[row : row + 1].tobytes(), np.uint8)
                self.output.write(parts[unit, task], 0, data)
                self.output.hashed(parts[unit, task], 0, data)

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


def _distance(error: float, energy: float) -> float | None:
    """‖θ̂ - θ‖ / ‖τ‖; 0 if exact, else None where ‖τ‖ = 0."""
    if error == 0:
        return 0.0
    return float(np.sqrt(error / energy)) if energy > 0 else None
