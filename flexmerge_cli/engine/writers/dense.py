"""Writes copies, and the one value of a merged group."""

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup
from flexmerge_cli.checkpoint.digest import RangeDigest
from flexmerge_cli.engine.device import name_of, to_bytes, torch_dtype
from flexmerge_cli.engine.encode import Encoder, Piece, all_finite, digest_of, lost_squares, room_for_errors
from flexmerge_cli.engine.runs import RUN_ELEMENTS, squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.work import Raw, cast
from flexmerge_cli.engine.writers.writer import Work, Writer
from flexmerge_cli.errors import DataError
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.one_pass import one_pass
from flexmerge_cli.random import tie_key


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
    is_done = whole is None and _merge_at_once(encoder, group, raw, dtypes, stored, errors)
    for low, high in [] if is_done else encoder.tiles(group, raw, whole):
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


def _merge_at_once(
    encoder: Encoder, group: StoredGroup, raw: Raw, dtypes: list[str], stored: Tensor, errors: np.ndarray
) -> bool:
    """Merge a range in one pass through memory, if native.c can; return whether it was.

    The bits, and the errors, are those of the general path.
    """
    worker, span = encoder.worker, raw.span
    chain, dtype = worker.chain(group), name_of(stored.dtype)
    plain = chain.call is not None and not chain.steps and chain.calibrate is None and chain.coded is None
    if native.lib is None or worker.device.type != "cpu" or not plain or span.run != RUN_ELEMENTS:
        return False
    assert chain.call is not None
    rule = one_pass(chain.call, len(group.tasks), chain.stats(group.tasks, span.tensor))
    rows, base = worker.rows_of(raw, group.tasks), raw.bits[BASE]
    if rule is None or rows is None or rows.dtype is not base.dtype or {*dtypes} != {dtype}:
        return False
    source = name_of(base.dtype)
    if not {source, dtype} <= native.TYPES.keys():
        return False
    kept, k = rule.kept, len(rows)
    least, last = kept.limits() if kept is not None else (None, None)
    types = np.array([native.TYPES[source], native.TYPES[dtype]])
    room = worker.buffers.get("runs", 4 * k * RUN_ELEMENTS * (1 if kept is None else 2))
    native.lib.flexmerge_merge(
        base.data_ptr(), rows.data_ptr(), types.ctypes.data, k, len(stored), rows.stride(0), rule.number,
        rule.divisor, rule.scale, None if least is None else least.ctypes.data,
        None if last is None else last.ctypes.data, tie_key(span.tensor), span.start,
        room.ctypes.data, stored.data_ptr(), errors.ctypes.data, errors.shape[1],
    )  # fmt: skip
    return True


def _write_copies(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    write_copies(encoder, group, raw, piece)


def _merge_bytes(work: Work) -> int:
    return work.merging + sum(work.n * item for item in {*work.items})


COPIES = Writer(write=_write_copies, workspace=lambda work: 12 * work.n if work.is_cast else 0)
MERGE = Writer(write=_merge, workspace=_merge_bytes)
