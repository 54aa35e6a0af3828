"""Runs `merge`: turns source weights into the arrays of a layout, and measures what was lost.

Each weight is read once here; statistics_pass.py reads it before for what methods and forms must know about the whole.
Threads take ranges of one tensor over base and tasks (work.py); one thread takes hashes and sums, in order, so that
neither bytes nor numbers depend on the number of threads.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from flexmerge_cli.allocation.allocation import Tasks, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import NO_DIGEST, Measured
from flexmerge_cli.allocation.storage import Part as StoredPart
from flexmerge_cli.allocation.storage import Storage
from flexmerge_cli.checkpoint.digest import TensorDigest
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.engine.chain import chains_of
from flexmerge_cli.engine.device import single_threaded
from flexmerge_cli.engine.encode import Encoder, Piece
from flexmerge_cli.engine.journal import Journal
from flexmerge_cli.engine.output import Output, Sink
from flexmerge_cli.engine.pool import ordered_map, with_fallback
from flexmerge_cli.engine.runs import RUN_ELEMENTS, added
from flexmerge_cli.engine.sources import BASE, Sources
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS, Span, cut
from flexmerge_cli.engine.statistics_pass import StatisticsPass
from flexmerge_cli.engine.work import Raw, Worker
from flexmerge_cli.engine.writers.table import encode, visit_scope
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Scope
from flexmerge_cli.methods.pooled import factor_pairs, product_gram
from flexmerge_cli.version import VERSION


def materialise(
    layout: BundleLayout,
    sources: Sources,
    output: Sink,
    *,
    device: "torch.device",
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
    journal: Journal | None = None,
    share: Collection[str] | None = None,
    on_rest: Callable[[Sequence[str]], None] = lambda _names: None,
) -> Measured:
    """Write the layout's parts to `output`. Raises DataError if a source is not what the plan saw.

    chunk_elements: a multiple of RUN_ELEMENTS. on_bytes is called with the number of source bytes read. The layout may
    have only some units and groups, as in evaluation/in_memory.py: what they store does not depend on the rest.
    journal: records each tensor that is written, and knows those that an earlier run has written to the same files,
    which are not computed again; `output` must then be an Output.
    share: names of the tensors to write, with all tensors of a unit or none; then only their digests are returned.
    on_rest: gets, before anything is computed, the tensors that the journal does not have; may raise.
    """
    assert chunk_elements % RUN_ELEMENTS == 0
    with Reader() as reader, single_threaded(), output:
        worker = Worker(layout, sources, reader, device)
        worker.on_bytes = on_bytes
        run = _Run(worker, Encoder(worker, output), output, threads, chunk_elements, on_stage)
        measured = run.write(journal, share, on_rest)
        measured.sha256 = output.finish()
        return measured


@dataclass(slots=True)
class _Joined:
    """The sums and digests of the pieces so far."""

    errors: dict[tuple[str, int], float] = field(default_factory=dict)
    """Σ (θ̂ - θ)², by (tensor, task)."""
    sources: dict[int, TensorDigest] = field(default_factory=dict)
    """The digests so far of the tensor that is being read."""
    decoded: dict[int, TensorDigest] = field(default_factory=dict)


class _Run:
    """One run: what is read when, and how pieces are joined."""

    def __init__(
        self,
        worker: Worker,
        encoder: Encoder,
        output: Sink,
        threads: int,
        chunk_elements: int,
        on_stage: Callable[[str], None],
    ) -> None:
        self.worker, self.encoder, self.output = worker, encoder, output
        self.layout, self.plan = worker.layout, worker.plan
        self.threads, self.chunk_elements, self.on_stage = threads, chunk_elements, on_stage

    def spans(self, name: str, scope: Scope = "element") -> list[Span]:
        tensor = self.plan.tensor(name)
        # Private tensors may differ in shape; each task's own length is cut in the same way.
        shapes = [*(tensor.shapes or ()), tensor.base_shape]
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes if shape is not None]
        return cut(name, max([tensor.num_elements, *sizes]), tensor.shape, scope, self.chunk_elements)

    def scope(self, storage: Storage) -> Scope:
        return visit_scope(self.worker.chains, storage)

    def items(self, kept: Collection[str], share: Collection[str] | None) -> list[list[tuple[Storage, Span]]]:
        """List what is visited together: one range of a tensor or, for methods of scope `block`, all tensors of a unit.

        kept: tensors that are left out. share: those that are not; None: all.
        """
        found = self.layout.storages.items()
        wanted = {name for name, storage in found if storage.parts and (share is None or name in share)} - set(kept)
        storages = [storage for name, storage in found if name in wanted]
        # Use the order of parts in their files, so that files are mostly written, and hashed, front to back.
        storages.sort(key=lambda storage: (-ITEM_BYTES[storage.parts[0].array.dtype], storage.parts[0].name))
        scopes = {storage.tensor.name: self.scope(storage) for storage in storages}
        units: dict[str, list[tuple[Storage, Span]]] = {}
        items: list[list[tuple[Storage, Span]]] = []
        for storage in storages:
            name = storage.tensor.name
            spans = [(storage, span) for span in self.spans(name, scopes[name])]
            if scopes[name] == "block":
                of_unit = units.setdefault(self.encoder.unit_of[name], [])
                if not of_unit:
                    items.append(of_unit)
                of_unit += spans
            else:
                items += [[pair] for pair in spans]
        return items

    def _visit(self, item: Sequence[tuple[Storage, Span]]) -> list[Piece]:
        if len(item) == 1 and self.scope(item[0][0]) != "block":
            storage, span = item[0]
            return [encode(self.encoder, storage, self.worker.read(span, self.worker.models(storage), digests=True))]
        raws = {
            span.tensor: self.worker.read(span, self.worker.models(storage), place, digests=True)
            for place, (storage, span) in enumerate(item)
        }
        values: dict[str, dict[Tasks, torch.Tensor]] = {name: {} for name in raws}
        groups = {group.tasks: group for storage, _ in item for group in storage.groups if group.method is not None}
        for tasks, group in groups.items():
            chain = self.worker.chain(group)
            members = {
                storage.tensor.name: raws[storage.tensor.name]
                for storage, _ in item
                if any(g.tasks == tasks and g.method is not None for g in storage.groups)
            }
            if chain.call is not None and chain.call.scope == "block":
                for name, value in self.worker.block_values(group, members).items():
                    values[name][tasks] = value
        pieces = [encode(self.encoder, storage, raws[span.tensor], values[span.tensor]) for storage, span in item]
        if any(chain.products is not None for chain in self.worker.chains):
            self._errors_of_products(raws, values, {span.tensor: piece for (_, span), piece in zip(item, pieces)})
        self.worker.buffers.drop()  # they are buffers for each tensor of the unit, and the next unit has other tensors
        return pieces

    def _errors_of_products(
        self, raws: dict[str, Raw], values: dict[str, dict[Tasks, Tensor]], pieces: dict[str, Piece]
    ) -> None:
        """Compute the errors of a pool of LoRAs: the loss of ΔW counts at the B of a module, and nothing at its A."""
        for a, b in factor_pairs(raws):
            gram = self.plan.gram(self.plan.tensor(b))
            for piece in (pieces[a], pieces[b]):
                piece.errors = {task: np.zeros_like(error) for task, error in piece.errors.items()}
            for tasks in set(values[a]) & set(values[b]):
                for task in tasks:
                    own = [self.worker.own(raws[name], task).view(self.plan.tensor(name).shape) for name in (a, b)]
                    merged = [values[name][tasks].view(self.plan.tensor(name).shape).cpu() for name in (a, b)]
                    lost = product_gram((merged[0], own[0]), (merged[1], own[1]))
                    scale = gram[task, task] / float(lost[1, 1]) if float(lost[1, 1]) > 0 else 1.0
                    error = max(0.0, float(lost[0, 0] - 2 * lost[0, 1] + lost[1, 1])) * scale
                    pieces[b].errors[task].flat[0] = error

    def _visit_on_cpu(self, item: Sequence[tuple[Storage, Span]]) -> list[Piece]:
        with self.worker.on_cpu():
            return self._visit(item)

    def _keep(self, journal: Journal, joined: "_Joined", measured: Measured) -> set[str]:
        """Return the tensors that an earlier run has written. Its measurements go to `joined` and `measured`."""
        assert isinstance(self.output, Output)
        found = {
            name
            for name, done in journal.found.items()
            if (storage := self.layout.storages.get(name)) is not None
            and list(done.parts) == [self.output.digest(part) for part in storage.parts]
        }
        for unit in self.layout.allocation.units:  # A unit merges as one.
            if not found.issuperset(unit.tensors) and any(
                self.scope(self.layout.storages[name]) == "block" for name in unit.tensors
            ):
                found.difference_update(unit.tensors)
        for unit, parts in self._of_units():
            done = journal.found.get(f"\0{unit.name}")
            sound = done is not None and list(done.parts) == [self.output.digest(part) for part in parts]
            if found.issuperset(unit.tensors) and sound:
                for part in parts:
                    self.output.keep(part)
            elif found.issuperset(unit.tensors):
                found.difference_update(unit.tensors)
        for name in sorted(found):
            done = journal.found[name]
            for part in self.layout.storages[name].parts:
                self.output.keep(part)
            measured.digests[name] = done.digests
            joined.errors |= {(name, task): error for task, error in done.errors.items()}
        return found

    def write(
        self, journal: Journal | None, share: Collection[str] | None, on_rest: Callable[[Sequence[str]], None]
    ) -> Measured:
        measured, joined = Measured(), _Joined()
        items = self.items(self._keep(journal, joined, measured) if journal is not None else (), share)
        names = {span.tensor: None for item in items for _, span in item}
        on_rest([*names])
        if names:
            before = StatisticsPass(self.worker, self.encoder, self.spans, self.threads, self.on_stage)
            before.measure(frozenset(names))
            self._write_of_units(journal)
        self.on_stage("merge")

        def work(place: int) -> list[Piece]:
            for item in items[place + self.threads + 1 : place + self.threads + 2]:
                for storage, span in item:
                    self.worker.will_need(storage, span)
            return with_fallback(
                lambda: self._visit(items[place]), lambda: self._visit_on_cpu(items[place]), warnings.warn
            )

        with ordered_map(range(len(items)), work, threads=self.threads) as visits:
            for item, pieces in zip(items, visits):
                for (storage, span), piece in zip(item, pieces):
                    self._join(storage, span, piece, joined, measured, journal)
        if share is not None:
            return measured
        for unit in self.layout.allocation.units:
            for group in unit.groups:
                measured.errors[unit.name, group.tasks] = {
                    task: sum((joined.errors.get((name, task), 0.0) for name in unit.tensors), 0.0)
                    for task in group.tasks
                }
        measured.build = build_of(self.layout, self.worker.device)
        complete(self.layout, measured)
        return measured

    def _join(
        self,
        storage: Storage,
        span: Span,
        piece: Piece,
        joined: "_Joined",
        measured: Measured,
        journal: Journal | None,
    ) -> None:
        """Take a piece's hashes and sums; at the end of its tensor, check and record its digests."""
        for part, start_byte, data in piece.written:
            self.output.hashed(part, start_byte, data)
            if journal is not None:
                journal.hashed(part, start_byte, data)
        for into, found in ((joined.sources, piece.sources), (joined.decoded, piece.decoded)):
            for model, digest in found.items():
                into.setdefault(model, TensorDigest()).add(digest)
        for task, error in piece.errors.items():
            joined.errors[span.tensor, task] = added(joined.errors.get((span.tensor, task), 0.0), error)
        if span.last:
            self._check_sources(storage, joined.sources)
            decoded = joined.decoded
            measured.digests[span.tensor] = {
                task: decoded[task].hexdigest() if task in decoded else str(storage.tensor.digests[task])
                for task in storage.tensor.present
            }
            joined.sources, joined.decoded = {}, {}
            if journal is not None:
                name, digests = span.tensor, measured.digests[span.tensor]
                errors = {task: joined.errors[name, task] for task in digests if (name, task) in joined.errors}
                journal.finished(name, storage.parts, digests, errors)

    def _check_sources(self, storage: Storage, digests: dict[int, TensorDigest]) -> None:
        tensor = storage.tensor
        for model, digest in digests.items():
            expected = tensor.base_digest if model == BASE else tensor.digests[model]
            if digest.hexdigest() != expected:
                stored, who = self.worker.source(tensor.name, model), self.worker.sources.describe[model]
                raise DataError(
                    f"{who} has changed since the plan: `{stored.name}` of {stored.path}", hint="make the plan again"
                )

    def _of_units(self) -> list[tuple[Unit, list[StoredPart]]]:
        """Return what is stored once for all tensors of a unit, in the order of the files."""
        of_units: dict[str, list[StoredPart]] = {}
        for part in (part for file in self.layout.files for part in file.parts if part.of_unit):
            of_units.setdefault(part.tensor, []).append(part)
        return [(unit, of_units[unit.name]) for unit in self.layout.allocation.units if unit.name in of_units]

    def _write_of_units(self, journal: Journal | None) -> None:
        values: dict[tuple[str, int | None], np.ndarray] = {
            (unit, task): data[row : row + 1]
            for (unit, tasks), data in self.encoder.of_units.items()
            for row, task in enumerate(tasks)
        }
        for unit, parts in self._of_units():
            # The others belong to another part of the merge, were written before, or are taken from an older bundle.
            computed = [part for part in parts if (unit.name, part.task) in values]
            for part in computed:
                data = np.frombuffer(values[unit.name, part.task].tobytes(), np.uint8)
                self.output.write(part, 0, data)
                self.output.hashed(part, 0, data)
                if journal is not None:
                    journal.hashed(part, 0, data)
            if journal is not None and len(computed) == len(parts):
                journal.finished(f"\0{unit.name}", parts, {}, {})


def complete(layout: BundleLayout, measured: Measured) -> None:
    """Set what follows from errors and digests: digests of tied tensors, and each task's distance relative to ‖τ_k‖."""
    for storage in layout.storages.values():
        tensor = storage.tensor
        target = measured.digests.get(tensor.reason) if tensor.class_ is TensorClass.TIED else None
        if target is not None:  # It was computed.
            measured.digests[tensor.name] = {task: target[task] for task in tensor.present}
    energy = layout.plan.task_energy()
    totals = np.zeros(len(energy))
    for unit in layout.allocation.units:
        for group in unit.groups:
            errors = measured.errors[unit.name, group.tasks]
            measured.group_distance[unit.name, group.tasks] = {
                task: _distance(error, energy[task]) for task, error in errors.items()
            }
            for task, error in errors.items():
                totals[task] += error
    measured.task_distance = {task: _distance(totals[task], energy[task]) for task in layout.plan.all_tasks}


def build_of(layout: BundleLayout, device: "torch.device") -> str:
    """Digest what the stored values depend on besides sources, method and allocation; NO_DIGEST if all are copies.

    All processors and devices compute the same values by element and by row, but linear algebra may differ.
    """
    groups = [group for storage in layout.storages.values() for group in storage.groups]
    if layout.allocation.dtype is None and all(group.method is None for group in groups):
        return NO_DIGEST
    text, chains = f"{VERSION} {torch.__version__}", chains_of(layout)
    if any(visit_scope(chains, storage) in ("tensor", "block") for storage in layout.storages.values()):
        text += f" {device.type} {torch.backends.cpu.get_cpu_capability()}"
    return xxhash.xxh3_128_hexdigest(text.encode())


def _distance(error: float, energy: float) -> float | None:
    """Return ‖θ̂ - θ‖ / ‖τ‖: 0 if exact, otherwise None if ‖τ‖ = 0."""
    if error == 0:
        return 0.0
    return float(np.sqrt(error / energy)) if energy > 0 else None
