"""Writes the unified delta of a masked or superposed group, and the mask of each task unless it is drawn."""

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.engine.device import name_of, to_bytes, torch_dtype
from flexmerge_cli.engine.encode import Encoder, Piece, array, digest_of, room_for_errors
from flexmerge_cli.engine.runs import RUN_ELEMENTS, sizes, squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.work import Raw, Worker, cast
from flexmerge_cli.engine.writers.writer import UnitValues, Work, Writer
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.one_pass import elects
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.stored.masked import SUPERPOSED


def _write(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    start, count = raw.span.start, raw.span.stop - raw.span.start
    unified_part = array(group, "unified")
    mask_parts = {part.task: part for part in group.parts if part.array.role == "mask"}
    stored = torch.empty(count, dtype=torch_dtype(unified_part.array.dtype))
    dtypes = encoder.dtypes(storage, group)
    dtype, *others = {*dtypes}
    # Rows of one matrix, if they have one dtype: native.c writes all of them.
    room = [torch.empty(count, dtype=torch_dtype(each)) for each in dtypes] if others else None
    decoded = room or [*torch.empty(len(dtypes), count, dtype=torch_dtype(dtype))]
    key = encoder.unit_of[raw.span.tensor], group.tasks
    gamma = encoder.of_units.get(key, np.ones(len(group.tasks), np.float32))
    errors = room_for_errors(len(group.tasks), raw)
    packed = None if others else _elected(encoder, group, raw, stored, decoded, gamma, errors)
    if packed is None:
        packed = _taken(encoder, group, raw, stored, decoded, gamma, errors, is_plain=not others and dtype == "F32")
    encoder.emit(unified_part, start, encoder.finite(stored, group, raw), piece)
    if not np.isfinite(errors).all():  # they cover every value that a task gets
        for values in decoded:
            encoder.check_finite(values, group, raw)
    for row, task in enumerate(group.tasks):
        if task in mask_parts:
            encoder.emit_bytes(mask_parts[task], start // 8, packed[row], piece)
        piece.decoded[task] = digest_of(to_bytes(decoded[row]), raw, dtypes[row])
        piece.errors[task] = errors[row]


def _elected(
    encoder: Encoder,
    group: StoredGroup,
    raw: Raw,
    stored: Tensor,
    decoded: list[Tensor],
    gamma: np.ndarray,
    errors: np.ndarray,
) -> np.ndarray | None:
    """Merge and decode a range as `_taken` does, in one pass through memory; None if native.c cannot."""
    found = _one_pass(encoder, group, raw, name_of(stored.dtype), name_of(decoded[0].dtype))
    if found is None or array(group, "base").array.dtype != name_of(raw.bits[BASE].dtype):
        return None
    rows, types, room = found
    packed = np.empty((len(rows), masks.packed_bytes(len(stored))), np.uint8)
    assert native.lib is not None
    native.lib.flexmerge_elect(
        raw.bits[BASE].data_ptr(), rows.data_ptr(), types.ctypes.data, len(rows), len(stored), rows.stride(0),
        room.ctypes.data, None, gamma.ctypes.data, stored.data_ptr(), packed.ctypes.data, packed.shape[1],
        decoded[0].data_ptr(), len(stored), errors.ctypes.data, errors.shape[1],
    )  # fmt: skip
    return packed


def _one_pass(
    encoder: Encoder, group: StoredGroup, raw: Raw, *dtypes: str
) -> tuple[Tensor, np.ndarray, np.ndarray] | None:
    """Return the tasks' bits [k, n], and what `flexmerge_elect` gets as types and room; None if it cannot merge this.

    dtypes: of the unified delta and, if they are written, of the decoded tensors.
    """
    worker, base = encoder.worker, raw.bits[BASE]
    chain, rows = worker.chain(group), worker.rows_of(raw, group.tasks)
    names = [name_of(base.dtype), *dtypes]
    plain = native.lib is not None and worker.device.type == "cpu" and raw.span.run == RUN_ELEMENTS
    plain = plain and chain.call is not None and elects(chain.call) and not chain.steps
    if not plain or rows is None or rows.dtype is not base.dtype or not {*names} <= native.TYPES.keys():
        return None
    types = np.array([native.TYPES[name] for name in names])
    return rows, types, worker.buffers.get("runs", 8 * len(rows) * RUN_ELEMENTS)


def _taken(
    encoder: Encoder,
    group: StoredGroup,
    raw: Raw,
    stored: Tensor,
    decoded: list[Tensor],
    gamma: np.ndarray,
    errors: np.ndarray,
    *,
    is_plain: bool,
) -> np.ndarray:
    """Merge a range and decode it again, tile by tile, and return the packed masks.

    is_plain: whether `decoded` are rows of one float32 matrix. stored, decoded and errors are filled.
    """
    worker, base_part, run = encoder.worker, array(group, "base"), raw.span.run
    unified_dtype, is_signed = array(group, "unified").array.dtype, group.form is SUPERPOSED
    taken = np.empty((len(group.tasks), len(stored)), bool)
    for low, high in encoder.tiles(group, raw, None):
        found, deltas = worker.value(group, raw, low, high)
        unified = worker.rounded(found.delta.flatten(), unified_dtype)
        stored[low:high].copy_(unified)
        base = cast(worker.on_device(raw.bits[BASE][low:high]), base_part.array.dtype).float()
        takes = found.mask(deltas, unified)
        taken[:, low:high] = takes.cpu().numpy()
        done = 0
        if is_plain:
            done = _decode_runs(worker, group, raw, base, unified, taken, gamma, is_signed, decoded, errors, low)
        if low + done == high:
            continue
        for row, task in enumerate(group.tasks):
            # As residuals/mask.py decodes: one product, one sum, both float32.
            shift, there = unified[done:] * torch.tensor(gamma[row], device=worker.device), slice(low + done, high)
            elsewhere = base[done:] - shift if is_signed else base[done:]
            decoded[row][there].copy_(torch.where(takes[row, done:], base[done:] + shift, elsewhere))
            lost = worker.on_device(decoded[row][there]) - worker.on_device(worker.own(raw, task)[there])
            errors[row, (low + done) // run : -(-high // run)] = squares(lost[None], run)[0]
    return masks.pack(taken)


def _decode_runs(
    worker: Worker,
    group: StoredGroup,
    raw: Raw,
    base: Tensor,
    unified: Tensor,
    taken: np.ndarray,
    gamma: np.ndarray,
    is_signed: bool,
    decoded: list[Tensor],
    errors: np.ndarray,
    low: int,
) -> int:
    """Decode the whole runs of a tile that begins at `low`, and measure their errors, in one pass through memory where
    native.c can; return how many elements. The bits are those of the general path.

    decoded: rows of one float32 matrix.
    """
    rows, run = worker.rows_of(raw, group.tasks), raw.span.run
    plain = worker.device.type == "cpu" and run == RUN_ELEMENTS and rows is not None and rows.dtype is torch.float32
    if native.lib is None or not plain or rows is None:
        return 0
    runs = len(unified) // run
    native.lib.flexmerge_masked(
        base.data_ptr(), rows[:, low:].data_ptr(), len(rows), runs, rows.stride(0), unified.data_ptr(),
        taken[:, low:].ctypes.data, taken.shape[1], gamma.ctypes.data, is_signed, decoded[0][low:].data_ptr(),
        taken.shape[1], errors[:, low // run :].ctypes.data, errors.shape[1],
    )  # fmt: skip
    return runs * run


def _sums(encoder: Encoder, group: StoredGroup, raw: Raw) -> np.ndarray:
    """Return Σ |δ| of each task, and of what its mask takes from the unified delta."""
    worker, span, found = encoder.worker, raw.span, []
    at_once = _one_pass(encoder, group, raw, encoder.dtype_of(span.tensor, group))
    if at_once is not None and native.lib is not None:
        rows, types, room = at_once
        total = np.empty((2, len(rows), -(-rows.shape[1] // span.run)))
        native.lib.flexmerge_elect(
            raw.bits[BASE].data_ptr(), rows.data_ptr(), types.ctypes.data, len(rows), rows.shape[1], rows.stride(0),
            room.ctypes.data, total.ctypes.data, None, None, None, 0, None, 0, None, 0,
        )  # fmt: skip
        return total
    chain, dtype = worker.chain(group), encoder.dtype_of(span.tensor, group)
    for low, high in worker.tiles(chain, span):
        centre, deltas = worker.value(group, raw, low, high)
        unified = worker.rounded(centre.delta.flatten(), dtype)
        stepped = worker.stepped(chain, deltas, worker.where(span, low, group.tasks), group.tasks)
        taken = sizes(unified.expand_as(deltas), span.run, centre.mask(deltas, unified))
        found.append(np.stack([sizes(stepped, span.run), taken]))
    return np.concatenate(found, axis=2)


def _factors(call: Call, sums: np.ndarray, num_elements: np.ndarray) -> np.ndarray:
    assert call.gain is not None
    of_deltas, of_masked = sums
    return call.gain(of_deltas, of_masked, num_elements).astype(np.float32)


def _bytes(work: Work) -> int:
    n, t, k = work.n, work.t, len(work.group.tasks)
    return work.merging + 17 * k * t + sum(n * item + n + n // 8 for item in work.items)


MASKS = Writer(write=_write, workspace=_bytes, of_unit=UnitValues(sums=_sums, values=_factors))
