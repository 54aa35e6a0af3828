"""One range of one tensor, as it is stored: copied, merged, masked or with residuals; and what a reader will get of it.

Every value is decoded again as the reader decodes it, so that digests and distances are of what was written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli import native
from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup, effective_dtype
from flexmerge_cli.checkpoint.digest import RangeDigest, digest_range
from flexmerge_cli.checkpoint.dtypes import FROM_TORCH, ITEM_BYTES, promote
from flexmerge_cli.engine.device import to_bytes, torch_dtype
from flexmerge_cli.engine.output import Sink
from flexmerge_cli.engine.runs import RUN_ELEMENTS, squares
from flexmerge_cli.engine.spans import tiles
from flexmerge_cli.engine.work import BASE, Raw, Worker, cast
from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.coded import Form
from flexmerge_cli.methods.linear import scaled_sum
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.coder import Coder, Matrix
from flexmerge_cli.stored.dense import COPY, MERGED
from flexmerge_cli.stored.masked import MASKED


@dataclass(slots=True)
class Piece:
    """What one range adds."""

    written: list[tuple[Part, int, np.ndarray]] = field(default_factory=list)
    """(part, first byte, bytes)."""
    sources: dict[int, RangeDigest] = field(default_factory=dict)
    """Task, or BASE."""
    decoded: dict[int, RangeDigest] = field(default_factory=dict)
    """Task -> digest of what a reader will get; tasks whose bits are their source's are left out."""
    errors: dict[int, np.ndarray] = field(default_factory=dict)
    """Task -> Σ (θ̂ - θ)² of each run."""


class Encoder:
    """Writes what the worker merges."""

    def __init__(self, worker: Worker, output: Sink) -> None:
        self.worker, self.output = worker, output
        self.plan, self.cast = worker.plan, worker.bill.allocation.dtype
        self.unit_of = {name: unit.name for unit in worker.bill.allocation.units for name in unit.tensors}
        self.gamma: dict[tuple[str, Tasks], np.ndarray] = {}
        """(unit, tasks) -> float32 [k]: factors of masks."""

    def piece(self, storage: Storage, raw: Raw, values: Mapping[Tasks, Tensor] | None = None) -> Piece:
        """All that one range of a tensor stores. values: what methods of scope `block` made of it, by group."""
        piece, span = Piece(sources=raw.digests), raw.span
        for group in storage.groups:
            whole = (values or {}).get(group.tasks)
            if group.form is COPY:
                self._copy(group, raw, piece)
            elif group.form is MERGED:
                self._merge(storage, group, raw, piece, whole)
            elif group.form is MASKED:
                self._mask(storage, group, raw, piece)
            elif group.bits is not None:
                self._bits(storage, group, raw, piece)
            else:
                self._residuals(storage, group, raw, piece, whole)
        for base in (part for part in storage.parts if part.array.role == "base"):
            # A copy: the buffer that was read into is the next item's, and the hash is taken later.
            self._emit(base, span.start, cast(raw.bits[BASE], base.array.dtype).clone(), piece)
        return piece

    def _copy(self, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        worker, start = self.worker, raw.span.start
        for part in group.parts:
            if part.array.role != "dense":
                continue
            if part.readers[0] not in group.tasks:
                continue  # written with the group of its first reader
            values = worker.own(raw, part.readers[0])
            stored = cast(values, part.array.dtype)
            if stored is not values:
                self._check_cast(values, stored, part, raw)
            data = self._emit(part, start, stored.clone() if stored is values else stored, piece)
            if stored is not values:
                error = _lost(stored.float() - values.float(), raw.span.run)
                digest = _digest(data, raw, part.array.dtype)
                for task in part.readers:
                    piece.errors[task], piece.decoded[task] = error, digest

    def _merge(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None) -> None:
        worker, part, count = self.worker, group.parts[0], raw.span.stop - raw.span.start
        stored = torch.empty(count, dtype=torch_dtype(part.array.dtype))
        dtypes = self._dtypes(storage, group)
        run, errors = raw.span.run, _errors(len(group.tasks), raw)
        done = self._merge_runs(group, raw, dtypes, stored, errors) if whole is None else 0
        for low, high in self._tiles(group, raw, whole):
            low = max(low, done)
            if low >= high:
                continue
            found, deltas = worker.value(group, raw, low, high, whole)
            base = worker.on_device(raw.bits[BASE][low:high])
            # -0 is written as +0: adding 0 makes it so, before the sum and, where rounding can give it, after it.
            stored[low:high].copy_(base + (found.float() + 0.0))
            if stored.dtype is not torch.float32:
                stored[low:high].add_(0.0)
            for dtype in set(dtypes):
                rows = [row for row, own in enumerate(dtypes) if own == dtype]
                lost = deltas if len(rows) == len(dtypes) else deltas[rows]
                # Of the task vectors, not of the weights: what is lost is as small as they are, or smaller.
                lost.sub_(worker.on_device(cast(stored[low:high], dtype)) - base)
                errors[rows, low // run : -(-high // run)] = squares(lost, run)
        if not np.isfinite(errors).all():  # they are of every value, as every task reads it
            for dtype in {*dtypes}:
                self._check_finite(cast(stored, dtype), group, raw)
        data = self._emit(part, raw.span.start, stored, piece)
        digests: dict[str, RangeDigest] = {}
        for row, (task, dtype) in enumerate(zip(group.tasks, dtypes)):
            if dtype not in digests:
                mine = data if dtype == part.array.dtype else to_bytes(cast(stored, dtype))
                digests[dtype] = _digest(mine, raw, dtype)
            piece.decoded[task], piece.errors[task] = digests[dtype], errors[row]

    def _merge_runs(self, group: StoredGroup, raw: Raw, dtypes: list[str], stored: Tensor, errors: np.ndarray) -> int:
        """Merge whole runs of a linear method in one go through memory, where native.c can; returns how many elements.

        The bits, and the errors, are those of the way that all methods go.
        """
        chain, run = self.worker.chain(group), raw.span.run
        rows = self.worker.rows_of(raw, group.tasks)
        plain = chain.call is not None and not chain.steps and chain.calibrate is None and chain.coded is None
        if native.lib is None or self.worker.device.type != "cpu" or not plain or rows is None or run != RUN_ELEMENTS:
            return 0
        assert chain.call is not None
        linear = scaled_sum(chain.call, len(group.tasks))
        if linear is None or {*dtypes} != {"F32"} or raw.bits[BASE].dtype is not torch.float32:
            return 0
        runs, base = len(stored) // run, raw.bits[BASE]
        native.lib.flexmerge_merge(
            base.data_ptr(), rows.data_ptr(), len(rows), runs, rows.stride(0), *linear,
            stored.data_ptr(), errors.ctypes.data, errors.shape[1],
        )  # fmt: skip
        return runs * run

    def _mask(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        worker, start, count = self.worker, raw.span.start, raw.span.stop - raw.span.start
        unified_part, base_part = array(group, "unified"), array(group, "base")
        mask_parts = {part.task: part for part in group.parts if part.array.role == "mask"}
        stored = torch.empty(count, dtype=torch_dtype(unified_part.array.dtype))
        dtypes = self._dtypes(storage, group)
        decoded = [torch.empty(count, dtype=torch_dtype(dtype)) for dtype in dtypes]
        taken = np.empty((len(group.tasks), count), bool)
        gamma = self.gamma.get((self.unit_of[raw.span.tensor], group.tasks), np.ones(len(group.tasks), np.float32))
        run, errors = raw.span.run, _errors(len(group.tasks), raw)
        for low, high in self._tiles(group, raw, None):
            found, deltas = worker.value(group, raw, low, high)
            unified = worker.rounded(found.delta.flatten(), unified_part.array.dtype)
            stored[low:high].copy_(unified)
            base = cast(worker.on_device(raw.bits[BASE][low:high]), base_part.array.dtype).float()
            takes = found.mask(deltas, unified)
            taken[:, low:high] = takes.cpu().numpy()
            for row, task in enumerate(group.tasks):
                # As residuals/mask.py decodes: one product, one sum, both float32.
                shifted = base + unified * torch.tensor(gamma[row], device=worker.device)
                decoded[row][low:high].copy_(torch.where(takes[row], shifted, base))
                lost = worker.on_device(decoded[row][low:high]) - worker.on_device(worker.own(raw, task)[low:high])
                errors[row, low // run : -(-high // run)] = squares(lost[None], run)[0]
        self._emit(unified_part, start, self._finite(stored, group, raw), piece)
        packed = masks.pack(taken)
        for row, task in enumerate(group.tasks):
            self._emit_bytes(mask_parts[task], start // 8, packed[row], piece)
            self._decoded(task, decoded[row], dtypes[row], group, raw, piece)
            piece.errors[task] = errors[row]

    def _residuals(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None) -> None:
        """A centre as it is stored, and per task what is missing to it, coded."""
        worker, span = self.worker, raw.span
        chain, dtypes = worker.chain(group), self._dtypes(storage, group)
        coded = chain.coded
        assert coded is not None
        form = coded.form(storage.tensor.shape, tuple(dtypes))
        assert form.residual is not None
        rows = _rows(form.matrix, raw)
        base = worker.on_device(raw.bits[BASE])
        plain = self._plain(group, raw, whole)
        shared = {part.array.role: part for part in group.parts if part.task is None}
        dtype = promote(dtypes)
        if coded.centre == "none":
            centre = torch.zeros_like(base)
        else:
            centre = self._centre(form, plain, shared, dtype, group, raw, piece)
        factors = None
        deltas = torch.empty(0)
        if coded.expert is not None:
            factors = coded.expert.factors(chain.expert_stats(group.tasks, span.tensor))
            deltas = worker.deltas(raw, group.tasks, 0, span.stop - span.start)
        for row, task in enumerate(group.tasks):
            own = worker.on_device(worker.own(raw, task))
            residual = own if coded.centre == "none" else own - centre
            if coded.expert is not None and factors is not None:
                shape = storage.tensor.shape
                vectors = (deltas[row].view(shape), base.view(shape), centre.view(shape))
                residual = coded.expert.residual(*vectors, float(factors[row])).flatten()
            mine = {part.array.role: part for part in group.parts if part.task == task}
            back = self._code(form.residual, residual, form.matrix, rows, dtypes[row], mine, piece)
            value = torch.from_numpy(back) if coded.centre == "none" else centre.cpu() + torch.from_numpy(back)
            decoded_task = cast(value, dtypes[row])
            self._decoded(task, decoded_task, dtypes[row], group, raw, piece)
            piece.errors[task] = _lost(decoded_task.float() - own.cpu(), span.run)

    def _bits(self, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        """The same where each task has bits of its own, 0 and exact copies among them; equal tasks are coded once."""
        worker, dtypes = self.worker, self._dtypes(storage, group)
        chain, shape = worker.chain(group), storage.tensor.shape
        coded, bits_of = chain.coded, dict(zip(group.tasks, group.bits or ()))
        assert coded is not None
        self._copy(group, raw, piece)
        shared = {part.array.role: part for part in group.parts if part.task is None and part.array.role != "dense"}
        centre = None
        if coded.centre != "none":
            form = coded.form_of_bits(shape, 0)
            centre = self._centre(form, self._plain(group, raw), shared, promote(dtypes), group, raw, piece)
        found: dict[tuple[int, Any], tuple[RangeDigest, np.ndarray]] = {}
        for task, dtype in zip(group.tasks, dtypes):
            bits = bits_of[task]
            if bits == "exact":
                continue
            key = storage.tensor.same[task], bits
            if key not in found:
                own = worker.on_device(worker.own(raw, task))
                form = coded.form_of_bits(shape, bits)
                value = None if centre is None else centre.cpu()
                if form.residual is not None:
                    mine = {part.array.role: part for part in group.parts if part.task == task}
                    residual = own if centre is None else own - centre
                    back = self._code(form.residual, residual, form.matrix, _rows(form.matrix, raw), dtype, mine, piece)
                    value = torch.from_numpy(back) if value is None else value + torch.from_numpy(back)
                assert value is not None
                decoded = cast(value, dtype)
                self._decoded(task, decoded, dtype, group, raw, piece)
                found[key] = piece.decoded[task], _lost(decoded.float() - own.cpu(), raw.span.run)
            piece.decoded[task], piece.errors[task] = found[key]

    def _centre(
        self,
        form: Form,
        plain: Tensor,
        shared: Mapping[str, Part],
        dtype: str,
        group: StoredGroup,
        raw: Raw,
        piece: Piece,
    ) -> Tensor:
        """Write what residuals are taken against, and give it as it is read back: float32, on the device.

        plain: float32, before it is coded or rounded; shared: its parts, by role.
        """
        if form.centre is not None:
            decoded = self._code(form.centre, plain, form.matrix, _rows(form.matrix, raw), dtype, shared, piece)
            return torch.from_numpy(decoded).to(self.worker.device)
        if "base" in shared:  # written once, for all groups
            return cast(plain, shared["base"].array.dtype).float()
        stored = cast(plain, shared["unified"].array.dtype) + 0.0
        self._emit(shared["unified"], raw.span.start, self._finite(stored, group, raw).cpu(), piece)
        return stored.float()

    def _code(
        self,
        coder: Coder,
        values: Tensor,
        matrix: Matrix,
        rows: tuple[int, int],
        dtype: str,
        parts: Mapping[str, Part],
        piece: Piece,
    ) -> np.ndarray:
        """Encode whole rows, write them, and decode them again: float32, flat."""
        chunk = values.view(rows[1] - rows[0], matrix[1])
        encoded = coder.encode(chunk, dtype)
        by_row = {part.role: part.by_row for part in coder.parts(matrix, dtype)}
        for role, bits in encoded.items():
            data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
            per_row = data.size // max(1, rows[1] - rows[0])
            self._emit_bytes(parts[role], rows[0] * per_row if by_row[role] else 0, data, piece)
        return coder.decode(encoded, matrix, dtype, rows=rows).reshape(-1)

    def _decoded(self, task: int, value: Tensor, dtype: str, group: StoredGroup, raw: Raw, piece: Piece) -> None:
        data = to_bytes(self._finite(value, group, raw))
        piece.decoded[task] = _digest(data, raw, dtype)

    def dtype_of(self, tensor: str, group: StoredGroup) -> str:
        """In which a group's one value of a tensor is stored."""
        return promote(self._dtypes(self.worker.bill.storages[tensor], group))

    def _dtypes(self, storage: Storage, group: StoredGroup) -> list[str]:
        return [effective_dtype(storage.tensor.dtype_of(task), self.cast) for task in group.tasks]

    def _tiles(self, group: StoredGroup, raw: Raw, whole: Any) -> list[tuple[int, int]]:
        if whole is not None:
            return [(0, raw.span.stop - raw.span.start)]
        return self.worker.tiles(self.worker.chain(group), raw.span)

    def _plain(self, group: StoredGroup, raw: Raw, whole: Any = None) -> Tensor:
        """The centre before it is coded or rounded: float32 [n], on the device. Of the base, its own memory."""
        worker = self.worker
        base = worker.on_device(raw.bits[BASE])
        if worker.chain(group).call is None:
            return base
        plain = torch.empty_like(base)
        for low, high in self._tiles(group, raw, whole):
            found, _ = worker.value(group, raw, low, high, whole)
            torch.add(base[low:high], found.float() + 0.0, out=plain[low:high])
        return plain

    def _check_cast(self, values: Tensor, stored: Tensor, part: Part, raw: Raw) -> None:
        """What was not finite stays as it is; what becomes so would be data that nobody wrote."""
        if all_finite(stored):
            return
        lost = torch.isfinite(values) & ~torch.isfinite(stored)
        if bool(lost.any()):
            index = raw.span.start + int(lost.nonzero()[0, 0])
            place = [int(axis) for axis in np.unravel_index(index, part.array.shape)]
            raise DataError(
                f"task `{self.plan.tasks[part.readers[0]].name}` has a value in `{part.tensor}` at {place} that "
                f"{part.array.dtype} cannot hold",
                hint="cast to bf16, or leave out --dtype",
            )

    def _finite(self, values: Tensor, group: StoredGroup, raw: Raw) -> Tensor:
        self._check_finite(values, group, raw)
        return values

    def _check_finite(self, values: Tensor, group: StoredGroup, raw: Raw) -> None:
        if all_finite(values):
            return
        assert group.method is not None
        index = raw.span.start + int((~torch.isfinite(values)).nonzero()[0, 0])
        place = [int(axis) for axis in np.unravel_index(index, self.plan.tensor(raw.span.tensor).shape)]
        names = ", ".join(self.plan.tasks[task].name for task in group.tasks)
        method = self.worker.bill.calls[group.method].method.name
        raise DataError(
            f"`{method}` gives a value that is not finite as {FROM_TORCH[str(values.dtype).removeprefix('torch.')]} in "
            f"`{raw.span.tensor}` at {place}, tasks {names}",
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


def all_finite(values: Tensor) -> bool:
    # A sum is finite only if every term is, unless huge terms overflow; then the slow question decides.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def array(group: StoredGroup, role: str) -> Part:
    return next(part for part in group.parts if part.array.role == role)


def _rows(matrix: Matrix, raw: Raw) -> tuple[int, int]:
    """Whole rows of a view that a range is."""
    m, n = matrix
    return (raw.span.start // n, raw.span.stop // n) if n else (0, m)


def _digest(data: np.ndarray, raw: Raw, dtype: str) -> RangeDigest:
    """Of a range as it is in another dtype."""
    return digest_range(data, raw.span.start * ITEM_BYTES[dtype], last=raw.span.last)


def _errors(num_tasks: int, raw: Raw) -> np.ndarray:
    """Room for the errors of a span: of each task and run."""
    return np.zeros((num_tasks, -(-(raw.span.stop - raw.span.start) // raw.span.run)))


def _lost(lost: Tensor, run: int) -> np.ndarray:
    """Σ x² of each run, tile by tile."""
    return np.concatenate([squares(lost[None, low:high], run)[0] for low, high in tiles(len(lost), run)])
