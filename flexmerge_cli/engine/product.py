"""Makes what one bundle stores of what is read: encodes ranges, joins their sums and digests, in order.

Several bundles may be made of the same ranges (materialise.py). A storage that several of them have in common is
computed once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.allocation.allocation import Tasks, Unit
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.allocation.storage import Part as StoredPart
from flexmerge_cli.allocation.storage import Storage
from flexmerge_cli.checkpoint.digest import TensorDigest
from flexmerge_cli.engine.chain import chains_of
from flexmerge_cli.engine.encode import Encoder, Piece
from flexmerge_cli.engine.journal import Journal
from flexmerge_cli.engine.output import Output, Sink
from flexmerge_cli.engine.runs import added
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.spans import Span, run_of
from flexmerge_cli.engine.statistics_pass import Spans, StatisticsPass
from flexmerge_cli.engine.work import Raw, Worker
from flexmerge_cli.engine.writers.table import encode, visit_scope
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.factors import factor_pairs
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Scope
from flexmerge_cli.methods.products import product_gram
from flexmerge_cli.record import NO_DIGEST
from flexmerge_cli.version import VERSION


@dataclass(slots=True, kw_only=True)
class Product:
    """A layout, where its parts are written, and what was measured of them."""

    layout: BundleLayout
    output: Sink
    journal: Journal | None = None
    """Records each tensor that is written, and knows those that an earlier run has written to the same files, which are
    not computed again; `output` must then be an Output."""
    share: Collection[str] | None = None
    """The names of the tensors to write, with all tensors of a unit or none; None for all. With a share, only the
    digests are measured."""
    on_rest: Callable[[Sequence[str]], None] = lambda _names: None
    """Gets, before anything is computed, the tensors that the journal does not have; may raise."""
    measured: Measured = field(default_factory=Measured)


@dataclass(slots=True)
class _Joined:
    """The sums and digests of the pieces so far."""

    errors: dict[tuple[str, int], float] = field(default_factory=dict)
    """Σ (θ̂ - θ)², by (tensor, task)."""
    sources: dict[int, TensorDigest] = field(default_factory=dict)
    """The digests so far of the tensor that is being read."""
    decoded: dict[int, TensorDigest] = field(default_factory=dict)


class Making:
    """A product while it is made."""

    def __init__(self, product: Product, worker: Worker) -> None:
        self.worker, self.encoder, self.output = worker, Encoder(worker, product.output), product.output
        self.layout, self.plan, self.journal = product.layout, worker.plan, product.journal
        self.share, self.measured, self._joined = product.share, product.measured, _Joined()
        self.unit_of = {name: unit for unit in self.layout.allocation.units for name in unit.tensors}
        self._scopes: dict[str, Scope] = {}
        kept = self._keep() if self.journal is not None else ()
        found = self.layout.storages.items()
        self.rest = {
            name: storage
            for name, storage in found
            if storage.parts and (self.share is None or name in self.share) and name not in kept
        }
        """The tensors that are to be written."""

    def scope(self, storage: Storage) -> Scope:
        """Return what one visit must see of a tensor."""
        name = storage.tensor.name
        if name not in self._scopes:
            self._scopes[name] = visit_scope(self.worker.chains, storage)
        return self._scopes[name]

    def measure(self, spans: Spans, threads: int, on_stage: Callable[[str], None], known: dict[Any, Any]) -> None:
        """Take the statistics that what is to be written needs. known: those of products before, which are extended."""
        if self.rest:
            StatisticsPass(self.worker, self.encoder, spans, threads, on_stage, known).measure(frozenset(self.rest))
            self._write_of_units()

    def visit(
        self, raws: Mapping[str, Raw], before: Sequence[tuple["Making", Mapping[str, Piece]]]
    ) -> dict[str, Piece]:
        """Write what is stored of these ranges. before: products that have visited them, and their pieces."""
        pieces: dict[str, Piece] = {}
        by_unit: dict[object, list[str]] = {}
        for name in raws:
            if name not in self.rest:
                continue
            twin = next((done[name] for made, done in before if made.rest.get(name) is self.rest[name]), None)
            if twin is not None:
                pieces[name] = twin
                for part, start_byte, data in twin.written:
                    self.output.write(part, start_byte, data)
            elif self.scope(self.rest[name]) != "block":
                pieces[name] = encode(self.encoder, self.rest[name], self._own(raws[name]))
            else:
                by_unit.setdefault(self.unit_of[name], []).append(name)
        for names in by_unit.values():
            pieces |= self._visit_unit({name: self._own(raws[name]) for name in names})
        return pieces

    def _own(self, raw: Raw) -> Raw:
        """Return a range with the runs that this product has alone: other products may be the reason for its extent."""
        name = raw.span.tensor
        run = run_of(self.scope(self.rest[name]), self.plan.tensor(name).shape)
        return raw if run == raw.span.run else replace(raw, span=replace(raw.span, run=run))

    def _visit_unit(self, raws: Mapping[str, Raw]) -> dict[str, Piece]:
        storages = {name: self.rest[name] for name in raws}
        values: dict[str, dict[Tasks, torch.Tensor]] = {name: {} for name in raws}
        groups = {g.tasks: g for storage in storages.values() for g in storage.groups if g.method is not None}
        for tasks, group in groups.items():
            chain = self.worker.chain(group)
            members = {
                name: raws[name]
                for name, storage in storages.items()
                if any(g.tasks == tasks and g.method is not None for g in storage.groups)
            }
            if chain.call is not None and chain.call.scope == "block":
                for name, value in self.worker.block_values(group, members).items():
                    values[name][tasks] = value
        pieces = {name: encode(self.encoder, storages[name], raws[name], values[name]) for name in raws}
        if any(chain.products is not None for chain in self.worker.chains):
            self._errors_of_products(raws, values, pieces)
        return pieces

    def _errors_of_products(
        self, raws: Mapping[str, Raw], values: dict[str, dict[Tasks, Tensor]], pieces: dict[str, Piece]
    ) -> None:
        """Compute the errors of products: the loss of ΔW counts at the B of a module, and nothing at its A."""
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

    def _keep(self) -> set[str]:
        """Return the tensors that an earlier run has written, and take over its measurements."""
        assert isinstance(self.output, Output) and self.journal is not None
        found = {
            name
            for name, done in self.journal.found.items()
            if (storage := self.layout.storages.get(name)) is not None
            and list(done.parts) == [self.output.digest(part) for part in storage.parts]
        }
        for unit in self.layout.allocation.units:  # A unit merges as one.
            if not found.issuperset(unit.tensors) and any(
                self.scope(self.layout.storages[name]) == "block" for name in unit.tensors
            ):
                found.difference_update(unit.tensors)
        for unit, parts in self._of_units():
            done = self.journal.found.get(f"\0{unit.name}")
            sound = done is not None and list(done.parts) == [self.output.digest(part) for part in parts]
            if found.issuperset(unit.tensors) and sound:
                for part in parts:
                    self.output.keep(part)
            elif found.issuperset(unit.tensors):
                found.difference_update(unit.tensors)
        for name in sorted(found):
            done = self.journal.found[name]
            for part in self.layout.storages[name].parts:
                self.output.keep(part)
            self.measured.digests[name] = done.digests
            self._joined.errors |= {(name, task): error for task, error in done.errors.items()}
        return found

    def finish(self) -> None:
        """Compute what follows from all that was measured. Nothing does for a share."""
        self.measured.files = self.output.finish()
        if self.share is not None:
            return
        for unit in self.layout.allocation.units:
            for group in unit.groups:
                self.measured.errors[unit.name, group.tasks] = {
                    task: sum((self._joined.errors.get((name, task), 0.0) for name in unit.tensors), 0.0)
                    for task in group.tasks
                }
        self.measured.build = build_of(self.layout, self.worker.device)
        complete(self.layout, self.measured)

    def join(self, span: Span, piece: Piece) -> None:
        """Take a piece's hashes and sums; at the end of its tensor, check and record its digests."""
        storage, joined, measured, journal = self.rest[span.tensor], self._joined, self.measured, self.journal
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

    def _write_of_units(self) -> None:
        journal = self.journal
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
