"""Makes the one pass of `plan`: reads every weight once, and measures all that a cut needs.

It measures, per tensor, the Gram matrix of the task vectors, which tasks hold the same bits, the digests, any values
that are not finite, and how well it can be coded in few bits (survey_codes.py). Memory: threads x (M + 1) x about
1 MiB (2 MiB for F64), and a row, whatever the size of the models.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flexmerge_cli import native
from flexmerge_cli.checkpoint.digest import RangeDigest, TensorDigest, digest_range
from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.device import as_tensor, name_of, single_threaded, to_bytes, torch_dtype
from flexmerge_cli.engine.pool import ALIGNMENT, Buffers, ordered_map, with_fallback
from flexmerge_cli.engine.read_models import read_models
from flexmerge_cli.engine.survey_codes import RowRange, measure_rows
from flexmerge_cli.engine.survey_item import (
    CHUNK_ELEMENTS,
    PRODUCT_ELEMENTS,
    TILE_ELEMENTS,
    Measure,
    SurveyItem,
    models_of,
    range_of,
    view_of,
)
from flexmerge_cli.residuals.coding_error import CodingError, CodingErrorSum, RowErrors

# The number of terms that are added in float32: a sum of 2^16 is off by up to 2e-5, more than the 2^-20 to which
# similarities are compared; one of 2^12 by 2e-7, in two thirds of the time. (k = 8, bf16 fine-tunes, torch 2.13)
SUM_ELEMENTS = 1 << 12
EQUALITY_PROBE_BYTES = 256  # different tensors nearly always differ in their first bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """What one range adds to its tensor's measure."""

    digests: list[RangeDigest]
    classes: list[int]
    """For each model, the base last: the first model with the same bits in this range."""
    is_base: list[bool]
    grams: np.ndarray | None
    agreement: np.ndarray | None
    base_energies: list[float]
    not_finite: list[tuple[int, int]]
    rows: RowErrors | None = None


def survey(
    items: Sequence[SurveyItem],
    *,
    device: torch.device,
    threads: int,
    signs: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> list[Measure]:
    """Measure all items. chunk_elements: a multiple of PRODUCT_ELEMENTS. on_bytes is called with the number of bytes
    read."""
    assert chunk_elements % PRODUCT_ELEMENTS == 0
    ranges = list(_ranges(items, chunk_elements))
    buffers = Buffers()
    sums = [CodingErrorSum(i.name, view_of(models_of(i)[0].shape)) if i.codes else None for i in items]
    measures = []
    with Reader() as reader, single_threaded():

        def work(place: int) -> _Part:
            for ahead in ranges[place + threads + 1 : place + threads + 2]:
                for tensor in models_of(items[ahead[0]]):
                    reader.will_need(tensor, ahead[1], ahead[2])
            index, start, stop = ranges[place]
            item, of_item, cpu = items[index], sums[index], torch.device("cpu")
            return with_fallback(
                lambda: _measure(item, of_item, start, stop, reader, buffers, device, signs),
                lambda: _measure(item, of_item, start, stop, reader, buffers, cpu, signs),
                warnings.warn,
            )

        parts: list[_Part] = []
        digests: dict[int, TensorDigest] = {}
        with ordered_map(range(len(ranges)), work, threads=threads, device=device) as found:
            for (index, start, stop), part in zip(ranges, found):
                of_item = sums[index]
                if of_item is not None and part.rows is not None:
                    of_item.add(part.rows)
                for position, digest in enumerate(part.digests):
                    digests.setdefault(position, TensorDigest()).add(digest)
                # Rows can be as large as a narrow tensor, and the digests of ranges shorter than a piece hold the whole
                # range.
                parts.append(replace(part, rows=None, digests=[]))
                on_bytes(sum((stop - start) * tensor.item_bytes for tensor in models_of(items[index])))
                if stop == models_of(items[index])[0].num_elements:
                    coding = of_item.finish() if of_item is not None else None
                    measures.append(_join(items[index], parts, [d.hexdigest() for d in digests.values()], coding))
                    parts, digests = [], {}
    return measures


def _ranges(items: Sequence[SurveyItem], chunk_elements: int) -> Iterator[tuple[int, int, int]]:
    for index, item in enumerate(items):
        total, chunk = models_of(item)[0].num_elements, range_of(item, chunk_elements)
        for start in range(0, max(total, 1), chunk):
            yield index, start, min(start + chunk, total)


def _measure(
    item: SurveyItem,
    sums: CodingErrorSum | None,
    start: int,
    stop: int,
    reader: Reader,
    buffers: Buffers,
    device: torch.device,
    signs: bool,
) -> _Part:
    models = models_of(item)
    rows = RowRange.starting_in(view_of(models[0].shape), start, stop) if sums is not None else RowRange(0, 0, 0)
    end = max(stop, rows.end)
    raw: list[np.ndarray] = []
    digests: list[RangeDigest] = []

    def on_read(tensor: StoredTensor, data: np.ndarray) -> None:
        """Digest the bytes while they are in the cache."""
        raw.append(data[: (stop - start) * tensor.item_bytes])
        digests.append(digest_range(raw[-1], start * tensor.item_bytes, last=stop == tensor.num_elements))

    longer, stacked = read_models(models, [(start, end)] * len(models), reader, buffers, on_read=on_read)
    dtypes = [tensor.dtype for tensor in models]
    classes = _classes(raw, dtypes)
    is_base = _are_base(raw, dtypes, classes) if item.base is not None else [False] * len(item.tasks)
    if not item.gram:
        floats = [position for position, tensor in enumerate(models) if tensor.dtype in FLOATING]
        seen = [_first_bad(raw[position], models[position].dtype, position, start) for position in floats]
        return _Part(digests, classes, is_base, None, None, [], [place for place in seen if place is not None])
    values = [as_tensor(data, tensor.dtype) for data, tensor in zip(longer, models)]
    rows_kN = as_tensor(stacked, models[0].dtype).view(len(models), -1) if stacked is not None else None
    grams, agreements, energies = [], [], []
    width = -(-min(TILE_ELEMENTS, stop - start) // ALIGNMENT) * ALIGNMENT  # so that each task's elements begin aligned
    # In C, the base is subtracted during multiplication. Otherwise, if nothing else needs the tasks' own values any
    # more, the deltas take their place. Both save passes through memory.
    lie = rows_kN is not None and device.type == "cpu"
    fused = lie and not signs and native.lib is not None and len(values) - 1 <= native.MOST_TASKS
    fused = fused and dtypes[0] in native.TYPES
    in_place = lie and dtypes[0] == "F32" and not fused and sums is None
    columns = 0 if fused or in_place else width
    size = 4 * (len(values) - 1) * columns
    deltas = as_tensor(buffers.get("deltas", size)[:size], "F32").view(len(values) - 1, columns)
    if device.type != "cpu":
        deltas = torch.empty_like(deltas, device=device)
    for low in range(0, stop - start, TILE_ELEMENTS):
        high = min(low + TILE_ELEMENTS, stop - start)
        base = buffers.upload(values[-1][low:high], device).to(torch.float32)
        block = rows_kN[:-1, low:high] if rows_kN is not None and not columns else deltas[:, : high - low]
        if fused:
            pass
        elif rows_kN is not None:
            torch.sub(buffers.upload(rows_kN[:-1, low:high], device).to(torch.float32), base, out=block)
        else:
            for position, value in enumerate(values[:-1]):
                torch.sub(buffers.upload(value[low:high], device).to(torch.float32), base, out=block[position])
        of_products, of_base = _products(block, base, subtracted=not fused)
        grams += of_products
        energies += of_base
        if signs:
            agreements.append(_agreement(block))
    stack = np.stack(grams) if grams else np.zeros((0, len(values) - 1, len(values) - 1))
    bad: list[tuple[int, int]] = []
    if not np.isfinite(stack).all() or not np.isfinite(energies).all():
        fresh = read_models(models, [(start, stop)] * len(models), reader, Buffers())[0] if in_place else raw
        found = [
            _first_bad(data, tensor.dtype, position, start)
            for position, (data, tensor) in enumerate(zip(fresh, models))
        ]
        bad = [(-1 if place[0] == len(models) - 1 else place[0], place[1]) for place in found if place is not None]
    counts = np.sum(agreements, axis=0) if agreements else np.zeros(stack.shape[1:], np.int64)
    agreement = counts if signs else None
    coded = None
    if sums is not None and rows.stop > rows.first:
        coded = measure_rows(sums, rows, start, values, device, buffers)
    return _Part(digests, classes, is_base, stack, agreement, energies, bad, coded)


def _products(
    block_kN: torch.Tensor, base_N: torch.Tensor, *, subtracted: bool = True
) -> tuple[list[np.ndarray], list[float]]:
    """Compute Gram matrices, one per PRODUCT_ELEMENTS, and the base's energies there.

    Uses float32 in runs of SUM_ELEMENTS, and float64 where fewer elements are left or float32 overflows. block_kN: task
    vectors or, if they are multiplied in C, weights from which the base is not yet subtracted.
    """
    n = block_kN.shape[1]
    whole = n // PRODUCT_ELEMENTS * PRODUCT_ELEMENTS
    grams: list[np.ndarray] = []
    energies: list[float] = []

    def wide(low: int, high: int) -> None:
        base = base_N[low:high]
        deltas = (block_kN[:, low:high] if subtracted else block_kN[:, low:high] - base).double()
        grams.append((deltas @ deltas.T).cpu().numpy())
        energies.append(float(torch.dot(base.double(), base.double())))

    if whole:
        for place, gram in enumerate(gram_sums(block_kN, None if subtracted else base_N, whole)):
            low, high = place * PRODUCT_ELEMENTS, (place + 1) * PRODUCT_ELEMENTS
            energy = float(torch.dot(base_N[low:high], base_N[low:high]))
            if np.isfinite(gram).all() and np.isfinite(energy):
                grams.append(gram)
                energies.append(energy)
            else:
                wide(low, high)
    if whole < n:
        wide(whole, n)
    return grams, energies


def gram_sums(block_kN: torch.Tensor, base_N: torch.Tensor | None, whole: int) -> np.ndarray:
    """Return [whole / PRODUCT_ELEMENTS, k, k] float64, summed in float32 in runs of SUM_ELEMENTS."""
    k, pieces = len(block_kN), whole // PRODUCT_ELEMENTS
    if native.lib is not None and block_kN.device.type == "cpu" and k <= native.MOST_TASKS:
        found = np.empty((pieces, k, k))
        native.lib.flexmerge_products(
            base_N.data_ptr() if base_N is not None else None, block_kN.data_ptr(),
            native.TYPES[name_of(block_kN.dtype)], k, pieces, PRODUCT_ELEMENTS, block_kN.stride(0), found.ctypes.data,
        )  # fmt: skip
        return found
    parts = block_kN[:, :whole].reshape(k, -1, SUM_ELEMENTS).transpose(0, 1)
    products = torch.bmm(parts, parts.transpose(1, 2)).cpu().numpy()
    sums: np.ndarray = products.reshape(pieces, -1, k, k).sum(1, dtype=np.float64)
    return sums


def _agreement(deltas_kN: torch.Tensor) -> np.ndarray:
    """Count the elements of equal sign, [k, k]: both positive, both negative or both zero."""
    total = np.zeros((len(deltas_kN), len(deltas_kN)), np.int64)
    for of in (deltas_kN > 0, deltas_kN < 0, deltas_kN == 0):
        signs = of.to(torch.float32)  # counts up to 2^16 are exact in float32
        total += (signs @ signs.T).cpu().numpy().astype(np.int64)
    return total


def _classes(raw: list[np.ndarray], dtypes: list[str]) -> list[int]:
    """Return, for each model, the first one with the same dtype and bytes."""
    first: list[int] = []
    alike: dict[tuple[str, bytes], list[int]] = {}  # representatives that begin alike; hardly ever more than one
    for position, (data, dtype) in enumerate(zip(raw, dtypes)):
        representatives = alike.setdefault((dtype, data[:EQUALITY_PROBE_BYTES].tobytes()), [])
        equal = next(
            (representative for representative in representatives if np.array_equal(raw[representative], data)), None
        )
        if equal is None:
            representatives.append(position)
        first.append(position if equal is None else equal)
    return first


def _are_base(raw: list[np.ndarray], dtypes: list[str], classes: list[int]) -> list[bool]:
    """Return, for each task, whether the base, the last of raw, has its bits once a reader casts it to the task's
    dtype."""
    *tasks, base = raw
    of_base = as_tensor(base, dtypes[-1])
    cast: dict[str, np.ndarray] = {}
    found = []
    for data, dtype, own in zip(tasks, dtypes, classes):
        if dtype == dtypes[-1] or not {dtype, dtypes[-1]} <= set(FLOATING):
            found.append(own == classes[-1])
            continue
        probe = EQUALITY_PROBE_BYTES // ITEM_BYTES[dtype]
        if np.array_equal(_cast_bits(of_base[:probe], dtype), data[:EQUALITY_PROBE_BYTES]):
            if dtype not in cast:
                cast[dtype] = _cast_bits(of_base, dtype)
            found.append(np.array_equal(cast[dtype], data))
        else:
            found.append(False)
    return found


def _cast_bits(values: torch.Tensor, dtype: str) -> np.ndarray:
    return to_bytes(values.float().to(torch_dtype(dtype)))


def _first_bad(data: np.ndarray, dtype: str, position: int, start: int) -> tuple[int, int] | None:
    finite = torch.isfinite(as_tensor(data, dtype))
    return None if bool(finite.all()) else (position, start + int((~finite).nonzero()[0, 0]))


def _join(item: SurveyItem, parts: list[_Part], digests: list[str], coding: CodingError | None) -> Measure:
    models = models_of(item)
    # Models are the same over all ranges if their keys are equal; a key says what a model equals in each range.
    keys = [tuple(part.classes[position] for part in parts) for position in range(len(models))]
    first = [keys.index(key) for key in keys]
    count = len(item.tasks)
    gram = None
    if item.gram:
        gram = np.zeros((count, count))
        for part in parts:
            for block in part.grams if part.grams is not None else ():
                gram += block
        gram = (gram + gram.T) / 2
    agreement = [part.agreement for part in parts if part.agreement is not None]
    bad: dict[int, int] = {}
    for part in parts:
        for position, index in part.not_finite:
            bad.setdefault(position, index)
    return Measure(
        digests=digests[:count],
        base_digest=digests[count] if item.base is not None else None,
        same=first[:count],
        is_base=[all(part.is_base[position] for part in parts) for position in range(count)],
        gram=gram,
        agreement=np.sum(agreement, axis=0) if agreement else None,
        base_energy=float(sum(energy for part in parts for energy in part.base_energies)),
        not_finite=sorted(bad.items()),
        coding=coding,
    )
