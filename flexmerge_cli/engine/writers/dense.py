"""Writes copies, and the one value of a merged group."""

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup
from flexmerge_cli.checkpoint.digest import RangeDigest
from flexmerge_cli.engine.device import to_bytes, torch_dtype
from flexmerge_cli.engine.encode import Encoder, Piece, all_finite, digest_of, lost_squares, room_for_errors
from flexmerge_cli.engine.runs import RUN_ELEMENTS, squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.work import Raw, cast
from flexmerge_cli.engine.writers.writer import Work, Writer
from flexmerge_cli.errors import DataError
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.linear import scaled_sum


def write_copies(encoder: Encoder, group: StoredGroup, raw: Raw, piece: Piece) -> None:
    """Write exact copies, or casts of them, each with the group of its first reader."""
    worker, start = encoder.worker, raw.span.start
    for part in group.parts:
        if part.array.role != "dense":
            continue
        if part.readers[0] not in group.tasks:
            continue  # written with the group of its first reader
        values = worker.own(raw, part.readers[0])
        stored = cast(values, part.array.dtype)
        if stored is not values:
            _check_cast(encoder, values, stored, part, raw)
        data = encoder.emit(part, start, stored.clone() if stored is values else stored, piece)
        if stored is not values:
            error = lost_squares(stored.float() - values.float(), raw.span.run)
            digest = digest_of(data, raw, part.array.dtype)
            for task in part.readers:
                piece.errors[task], piece.decoded[task] = error, digest


def _check_cast(encoder: Encoder, values: Tensor, stored: Tensor, part: Part, raw: Raw) -> None:
    """Raise DataError if a cast makes a finite value infinite, which would be data that nobody wrote. Values that were
    not finite may stay so."""
    if all_finite(stored):
        return
    lost = torch.isfinite(values) & ~torch.isfinite(stored)
    if bool(lost.any()):
        index = raw.span.start + int(lost.nonzero()[0, 0])
        place = [int(axis) for axis in np.unravel_index(index, part.array.shape)]
        raise DataError(
            f"task `{encoder.plan.tasks[part.readers[0]].name}` has a value in `{part.tensor}` at {place} that "
            f"{part.array.dtype} cannot hold",
            hint="cast to bf16, or leave out --dtype",
        )


def _merge(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    worker, part, count = encoder.worker, group.parts[0], raw.span.stop - raw.span.start
    stored = torch.empty(count, dtype=torch_dtype(part.array.dtype))
    dtypes = encoder.dtypes(storage, group)
    run, errors = raw.span.run, room_for_errors(len(group.tasks), raw)
    done = _merge_runs(encoder, group, raw, dtypes, stored, errors) if whole is None else 0
    for low, high in encoder.tiles(group, raw, whole):
        low = max(low, done)
        if low >= high:
            continue
        found, deltas = worker.value(group, raw, low, high, whole)
        base = worker.on_device(raw.bits[BASE][low:high])
        # Adding 0 turns -0 into +0, before the sum and, where rounding can give -0, after it.
        stored[low:high].copy_(base + (found.float() + 0.0))
        if stored.dtype is not torch.float32:
            stored[low:high].add_(0.0)
        for dtype in set(dtypes):
            rows = [row for row, own in enumerate(dtypes) if own == dtype]
            lost = deltas if len(rows) == len(dtypes) else deltas[rows]
            # These are the task vectors, not the weights: what is lost is as small as they are, or smaller.
            lost.sub_(worker.on_device(cast(stored[low:high], dtype)) - base)
            errors[rows, low // run : -(-high // run)] = squares(lost, run)
    if not np.isfinite(errors).all():  # they cover every value, as every task reads it
        for dtype in {*dtypes}:
            encoder.check_finite(cast(stored, dtype), group, raw)
    data = encoder.emit(part, raw.span.start, stored, piece)
    digests: dict[str, RangeDigest] = {}
    for row, (task, dtype) in enumerate(zip(group.tasks, dtypes)):
        if dtype not in digests:
            mine = data if dtype == part.array.dtype else to_bytes(cast(stored, dtype))
            digests[dtype] = digest_of(mine, raw, dtype)
        piece.decoded[task], piece.errors[task] = digests[dtype], errors[row]


def _merge_runs(
    encoder: Encoder, group: StoredGroup, raw: Raw, dtypes: list[str], stored: Tensor, errors: np.ndarray
) -> int:
    """Merge whole runs of a linear method in one pass through memory, where native.c can; return how many elements.

    The bits, and the errors, are those of the general path.
    """
    chain, run = encoder.worker.chain(group), raw.span.run
    rows = encoder.worker.rows_of(raw, group.tasks)
    plain = chain.call is not None and not chain.steps and chain.calibrate is None and chain.coded is None
    if native.lib is None or encoder.worker.device.type != "cpu" or not plain or rows is None or run != RUN_ELEMENTS:
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


def _write_copies(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    write_copies(encoder, group, raw, piece)


def _merge_bytes(work: Work) -> int:
    return work.merging + sum(work.n * item for item in {*work.items})


COPIES = Writer(write=_write_copies, workspace=lambda work: 12 * work.n if work.is_cast else 0)
MERGE = Writer(write=_merge, workspace=_merge_bytes)
