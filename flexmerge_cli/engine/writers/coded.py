"""Writes a centre as it is stored and, for each task, its coded difference from the centre."""

from collections.abc import Mapping, Sequence

import numpy as np

from flexmerge_cli.allocation.storage import Part, Storage, StoredGroup
from flexmerge_cli.checkpoint.digest import RangeDigest
from flexmerge_cli.checkpoint.dtypes import promote
from flexmerge_cli.engine.chain import Chain
from flexmerge_cli.engine.encode import Encoder, Piece, lost_squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.work import Raw, cast
from flexmerge_cli.engine.writers.dense import write_copies
from flexmerge_cli.engine.writers.writer import Work, Writer
from flexmerge_cli.errors import DataError
from flexmerge_cli.formats.calibration import AGAIN as CALIBRATE
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.coded import CodedForm
from flexmerge_cli.methods.method import Scope
from flexmerge_cli.residuals import feedback
from flexmerge_cli.residuals.coder import Coder, Matrix


def _write(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    if group.bits is None:
        _write_alike(encoder, storage, group, raw, piece, whole)
    else:
        _write_by_bits(encoder, storage, group, raw, piece)


def _write_alike(
    encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece, whole: Tensor | None
) -> None:
    """Write a centre as it is stored and, for each task, its coded difference from the centre."""
    worker, span = encoder.worker, raw.span
    chain, dtypes = worker.chain(group), encoder.dtypes(storage, group)
    coded = chain.coded
    assert coded is not None
    form = coded.form(storage.tensor.name, storage.tensor.shape, tuple(dtypes))
    shared = {part.array.role: part for part in group.parts if part.task is None}
    dtype = promote(dtypes)
    centre = None
    if coded.centre != "none":
        centre = _centre(encoder, form, _plain(encoder, group, raw, whole), shared, dtype, group, raw, piece)
    factors = None
    base = deltas = torch.empty(0)
    if coded.expert is not None:
        factors = coded.expert.factors(chain.expert_stats(group.tasks, span.tensor))
        base, deltas = worker.on_device(raw.bits[BASE]), worker.deltas(raw, group.tasks, 0, span.stop - span.start)
    for row, task in enumerate(group.tasks):
        own = worker.on_device(worker.own(raw, task))
        residual = own if centre is None else own - centre
        if coded.expert is not None and factors is not None and centre is not None:
            shape = storage.tensor.shape
            vectors = (deltas[row].view(shape), base.view(shape), centre.view(shape))
            residual = coded.expert.residual(*vectors, float(factors[row])).flatten()
        mine = {part.array.role: part for part in group.parts if part.task == task}
        value = None if centre is None else centre.cpu()
        if form.residual is not None:
            back = _code(encoder, form.residual, residual, form.matrix, raw, dtypes[row], mine, piece)
            value = torch.from_numpy(back) if value is None else value + torch.from_numpy(back)
        assert value is not None
        decoded_task = cast(value, dtypes[row])
        encoder.decoded(task, decoded_task, dtypes[row], group, raw, piece)
        piece.errors[task] = lost_squares(decoded_task.float() - own.cpu(), span.run)


def _write_by_bits(encoder: Encoder, storage: Storage, group: StoredGroup, raw: Raw, piece: Piece) -> None:
    """Write the same where each task has bits of its own, including 0 and exact copies; equal tasks are coded once."""
    worker, dtypes = encoder.worker, encoder.dtypes(storage, group)
    chain, shape = worker.chain(group), storage.tensor.shape
    coded, bits_of = chain.coded, dict(zip(group.tasks, group.bits or ()))
    assert coded is not None
    write_copies(encoder, group, raw, piece)
    shared = {part.array.role: part for part in group.parts if part.task is None and part.array.role != "dense"}
    centre = None
    if coded.centre != "none":
        form = coded.form_of_bits(shape, 0)
        centre = _centre(encoder, form, _plain(encoder, group, raw), shared, promote(dtypes), group, raw, piece)
    found: dict[tuple[int, float], tuple[RangeDigest, np.ndarray]] = {}
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
                alike = [other for other in group.tasks if (storage.tensor.same[other], bits_of[other]) == key]
                moments = _moments(encoder, group, raw, alike, form)
                back = _code(encoder, form.residual, residual, form.matrix, raw, dtype, mine, piece, moments)
                value = torch.from_numpy(back) if value is None else value + torch.from_numpy(back)
            assert value is not None
            decoded = cast(value, dtype)
            encoder.decoded(task, decoded, dtype, group, raw, piece)
            found[key] = piece.decoded[task], lost_squares(decoded.float() - own.cpu(), raw.span.run)
        piece.decoded[task], piece.errors[task] = found[key]


def _centre(
    encoder: Encoder,
    form: CodedForm,
    plain: Tensor,
    shared: Mapping[str, Part],
    dtype: str,
    group: StoredGroup,
    raw: Raw,
    piece: Piece,
) -> Tensor:
    """Write what residuals are taken against, and return it as it is read back: float32, on the device.

    plain: float32, before it is coded or rounded; shared: its parts, by role.
    """
    if form.centre is not None:
        decoded = _code(encoder, form.centre, plain, form.matrix, raw, dtype, shared, piece)
        return encoder.worker.on_device(torch.from_numpy(decoded))
    if "base" in shared:  # written once, for all groups
        return cast(plain, shared["base"].array.dtype).float()
    stored = cast(plain, shared["unified"].array.dtype) + 0.0
    encoder.emit(shared["unified"], raw.span.start, encoder.finite(stored, group, raw).cpu(), piece)
    return stored.float()


def _code(
    encoder: Encoder,
    coder: Coder,
    values: Tensor,
    matrix: Matrix,
    raw: Raw,
    dtype: str,
    parts: Mapping[str, Part],
    piece: Piece,
    moments: np.ndarray | None = None,
) -> np.ndarray:
    """Encode whole rows, write them, and decode them: float32, flat. Raises DataError for a scale out of range.

    moments: those of the layer's inputs, [n, n], for rounding with feedback; the rows are then the whole matrix.
    """
    rows = _rows(matrix, raw)
    chunk = values.view(rows[1] - rows[0], matrix[1])
    try:
        if moments is not None and feedback.is_possible(coder):
            encoded = feedback.encode(chunk, coder, moments)
        else:
            encoded = coder.encode(chunk, dtype)
    except (OverflowError, feedback.UnsoundMoments) as error:
        task = next(iter(parts.values())).task
        assert task is not None
        raise DataError(
            f"`{raw.span.tensor}` of task `{encoder.plan.tasks[task].name}` cannot be coded: {error}",
            hint="scales=bfloat16 in the method, such as --method auto:scales=bfloat16"
            if isinstance(error, OverflowError)
            else CALIBRATE,
        ) from None
    by_row = {part.role: part.by_row for part in coder.parts(matrix, dtype)}
    for role, bits in encoded.items():
        data = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
        start = rows[0] * data.size // max(1, rows[1] - rows[0])  # eight rows may be one of the part
        encoder.emit_bytes(parts[role], start if by_row[role] else 0, data, piece)
    return coder.decode(encoded, matrix, dtype, rows=rows).reshape(-1)


def _moments(
    encoder: Encoder, group: StoredGroup, raw: Raw, tasks: Sequence[int], form: CodedForm
) -> np.ndarray | None:
    """Return the second moments of a layer's inputs, summed over tasks, float64 [n, n], by which its residual is coded.

    None if it is coded without: for other codes, inputs that were not measured or are all zero, and layers whose inputs
    do not lie along the columns.
    """
    worker, span = encoder.worker, raw.span
    calibration = worker.chain(group).calibration
    if calibration is None or not feedback.is_possible(form.residual):
        return None
    found = calibration.measured("inputs", worker.where(span, 0, tasks), span.stop - span.start)
    if found is None or found.layout not in ("linear", "conv2d"):
        return None
    total: np.ndarray = sum((found[place] for place in range(len(tasks))), np.zeros(1))
    return total if total.any() and len(total) == form.matrix[1] else None


def _plain(encoder: Encoder, group: StoredGroup, raw: Raw, whole: Tensor | None = None) -> Tensor:
    """Return the centre before it is coded or rounded: float32 [n], on the device. If it is the base, no copy is
    made."""
    worker = encoder.worker
    base = worker.on_device(raw.bits[BASE])
    if worker.chain(group).call is None:
        return base
    plain = torch.empty_like(base)
    for low, high in encoder.tiles(group, raw, whole):
        found, _ = worker.value(group, raw, low, high, whole)
        torch.add(base[low:high], found.float() + 0.0, out=plain[low:high])
    return plain


def _rows(matrix: Matrix, raw: Raw) -> tuple[int, int]:
    """Return the whole rows of a view that a range covers."""
    m, n = matrix
    return (raw.span.start // n, raw.span.stop // n) if n else (0, m)


def _scope(chain: Chain, storage: Storage, group: StoredGroup) -> Scope:
    tensor, coded = storage.tensor, chain.coded
    assert coded is not None
    if group.bits is not None:
        residuals = [coded.form_of_bits(tensor.shape, bits).residual for bits in {*group.bits} if bits != "exact"]
        is_measured = chain.calibration is not None and chain.calibration.scope("inputs", tensor.name) == "tensor"
        return "tensor" if is_measured and any(map(feedback.is_possible, residuals)) else "row"
    form = coded.form(tensor.name, tensor.shape, tuple(tensor.dtype_of(task) for task in group.tasks))
    if form.is_centre:
        return "element"
    return "tensor" if coded.expert or form.residual is None else form.residual.scope


def _bytes(work: Work) -> int:
    tensor, group, n = work.storage.tensor, work.group, work.n
    assert work.chain is not None
    coded = work.chain.coded
    assert coded is not None
    forms = [coded.form_of_bits(tensor.shape, bits) for bits in {*(group.bits or ())} if bits != "exact"]
    dtypes = tuple(tensor.dtype_of(task) for task in group.tasks)
    forms += [coded.form(tensor.name, tensor.shape, dtypes)] if not forms else []
    columns = forms[0].matrix[1]
    part = (n // columns if columns else forms[0].matrix[0], columns)
    coders = [coder for form in forms for coder in (form.residual, form.centre) if coder is not None]
    coding = 40 * n + max((coder.workspace(part) for coder in coders), default=0)
    if coded.expert is not None:
        coding += 32 * n
    if group.bits is not None and _scope(work.chain, work.storage, group) == "tensor":
        coding += feedback.workspace(part)
    return max(work.merging + 4 * n, coding)


RESIDUALS = Writer(write=_write, workspace=_bytes, scope=_scope)
