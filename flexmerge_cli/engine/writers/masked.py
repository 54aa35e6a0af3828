"""Writes the unified delta of a masked or superposed group, and the mask of each task unless it is drawn."""

import numpy as np

from flexmerge_cli.allocation.storage import Storage, StoredGroup
from flexmerge_cli.engine.device import torch_dtype
from flexmerge_cli.engine.encode import Encoder, Piece, array, room_for_errors
from flexmerge_cli.engine.runs import sizes, squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.work import Raw, cast
from flexmerge_cli.engine.writers.writer import UnitValues, Work, Writer
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.call import Call
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.stored.masked import SUPERPOSED


def _write(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    worker, start, count = encoder.worker, raw.span.start, raw.span.stop - raw.span.start
    unified_part, base_part = array(group, "unified"), array(group, "base")
    mask_parts = {part.task: part for part in group.parts if part.array.role == "mask"}
    stored = torch.empty(count, dtype=torch_dtype(unified_part.array.dtype))
    dtypes = encoder.dtypes(storage, group)
    decoded = [torch.empty(count, dtype=torch_dtype(dtype)) for dtype in dtypes]
    taken = np.empty((len(group.tasks), count), bool)
    key = encoder.unit_of[raw.span.tensor], group.tasks
    gamma = encoder.of_units.get(key, np.ones(len(group.tasks), np.float32))
    run, errors = raw.span.run, room_for_errors(len(group.tasks), raw)
    is_signed = group.form is SUPERPOSED
    for low, high in encoder.tiles(group, raw, None):
        found, deltas = worker.value(group, raw, low, high)
        unified = worker.rounded(found.delta.flatten(), unified_part.array.dtype)
        stored[low:high].copy_(unified)
        base = cast(worker.on_device(raw.bits[BASE][low:high]), base_part.array.dtype).float()
        takes = found.mask(deltas, unified)
        taken[:, low:high] = takes.cpu().numpy()
        for row, task in enumerate(group.tasks):
            # As residuals/mask.py decodes: one product, one sum, both float32.
            shift = unified * torch.tensor(gamma[row], device=worker.device)
            decoded[row][low:high].copy_(torch.where(takes[row], base + shift, base - shift if is_signed else base))
            lost = worker.on_device(decoded[row][low:high]) - worker.on_device(worker.own(raw, task)[low:high])
            errors[row, low // run : -(-high // run)] = squares(lost[None], run)[0]
    encoder.emit(unified_part, start, encoder.finite(stored, group, raw), piece)
    packed = masks.pack(taken)
    for row, task in enumerate(group.tasks):
        if task in mask_parts:
            encoder.emit_bytes(mask_parts[task], start // 8, packed[row], piece)
        encoder.decoded(task, decoded[row], dtypes[row], group, raw, piece)
        piece.errors[task] = errors[row]


def _sums(encoder: Encoder, group: StoredGroup, raw: Raw) -> np.ndarray:
    """Return Σ |δ| of each task, and of what its mask takes from the unified delta."""
    worker, span, found = encoder.worker, raw.span, []
    chain, dtype = worker.chain(group), encoder.dtype_of(span.tensor, group)
    for low, high in worker.tiles(chain, span):
        centre, deltas = worker.value(group, raw, low, high)
        unified = worker.rounded(centre.delta.flatten(), dtype)
        taken = torch.where(centre.mask(deltas, unified), unified, 0.0)
        stepped = worker.stepped(chain, deltas, worker.where(span, low, group.tasks), group.tasks)
        found.append(np.stack([sizes(stepped, span.run), sizes(taken, span.run)]))
    return np.concatenate(found, axis=2)


def _factors(call: Call, sums: np.ndarray, num_elements: np.ndarray) -> np.ndarray:
    assert call.gain is not None
    of_deltas, of_masked = sums
    return call.gain(of_deltas, of_masked, num_elements).astype(np.float32)


def _bytes(work: Work) -> int:
    n, t, k = work.n, work.t, len(work.group.tasks)
    return work.merging + 17 * k * t + sum(n * item + n + n // 8 for item in work.items)


MASKS = Writer(write=_write, workspace=_bytes, of_unit=UnitValues(sums=_sums, values=_factors))
