"""Sums over a tensor's elements, independently of how it was cut: first within runs, and then these sums one after
another.

A run is RUN_ELEMENTS elements, counted from the tensor's first, or a row where whole rows are visited (spans.py); no
span and no tile ends inside one.
"""

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.reductions import native_rows

# Squares of a run are summed in float32: their sum is off by 1e-7, and that of thousands of runs by less. The sums are
# kept in LANES adjacent lanes, as in native.c, so that both give the same bits.
RUN_ELEMENTS = 1 << 10
LANES = 32


def squares(values_kN: Tensor, run: int) -> np.ndarray:
    """Return Σ x² of each run of float32 [k, n] as float64 [k, ⌈n/run⌉]; the last run may be shorter.

    Sums in float32 up to RUN_ELEMENTS, which takes a fifth of the time of float64.
    """
    if values_kN.device.type != "cpu":
        return _sums_there(values_kN.double().square(), run)
    values = values_kN.numpy()
    if run > RUN_ELEMENTS:
        return _sums(np.square(values, dtype=np.float64), run)
    whole = values.shape[1] // run * run
    blocks, rest = values[:, :whole].reshape(len(values), whole // run, run), values[:, whole:]
    sums = _lanes(values, whole // run) if run == RUN_ELEMENTS else np.einsum("kbn,kbn->kb", blocks, blocks)
    return np.concatenate([sums, _sums(np.square(rest, dtype=np.float64), run)], axis=1)


def sizes(values_kN: Tensor, run: int, counts_kN: Tensor | None = None) -> np.ndarray:
    """Return Σ|x| of each run likewise, in float64 throughout. counts_kN: which elements count, bool; None: all."""
    if native.lib is not None and run == RUN_ELEMENTS and (rows := native_rows(values_kN)) is not None:
        total = np.empty((len(rows), -(-rows.shape[1] // run)))
        counts = None if counts_kN is None else counts_kN.contiguous()  # held until the call has ended
        native.lib.flexmerge_sizes(
            rows.data_ptr(), len(rows), rows.shape[1], rows.stride(0),
            None if counts is None else counts.data_ptr(), total.ctypes.data,
        )  # fmt: skip
        return total
    if counts_kN is not None:
        values_kN = torch.where(counts_kN, values_kN, 0.0)
    values_kN = values_kN.double().abs()
    return _sums(values_kN.numpy(), run) if values_kN.device.type == "cpu" else _sums_there(values_kN, run)


def added(total: float, sums: np.ndarray) -> float:
    """Return total + sums, added strictly one after another, whatever ranges they come in. sums: [R] float64."""
    if len(sums) == 1:
        return total + float(sums[0])
    return float(np.add.accumulate(np.concatenate([[total], sums]))[-1])


def _lanes(values_kN: np.ndarray, runs: int) -> np.ndarray:
    """Return Σ x² of the first `runs` runs of RUN_ELEMENTS, float64 [k, runs]."""
    k, count = len(values_kN), runs * RUN_ELEMENTS
    total = np.zeros((k, runs))
    if native.lib is not None and values_kN.strides[1] == 4:
        stride = values_kN.strides[0] // 4
        native.lib.flexmerge_squares(values_kN.ctypes.data, k, runs, stride, total.ctypes.data, runs)
        return total
    blocks = np.square(values_kN[:, :count]).reshape(k, runs, RUN_ELEMENTS // LANES, LANES)
    for lane in np.moveaxis(np.add.reduce(blocks, axis=2), 2, 0):
        total += lane
    return total


def _sums(values_kN: np.ndarray, run: int) -> np.ndarray:
    """Return the sum of each run, for float64 [k, n]."""
    k, n = values_kN.shape
    whole = n // run * run
    sums: np.ndarray = values_kN[:, :whole].reshape(k, whole // run, run).sum(2)
    return sums if whole == n else np.concatenate([sums, values_kN[:, whole:].sum(1, keepdims=True)], axis=1)


def _sums_there(values_kN: Tensor, run: int) -> np.ndarray:
    """Return the same on a GPU, which has its own order of summation."""
    k, n = values_kN.shape
    whole = n // run * run
    parts = [values_kN[:, :whole].reshape(k, whole // run, run).sum(2)]
    parts += [values_kN[:, whole:].sum(1, keepdim=True)] if whole < n else []
    found: np.ndarray = torch.cat(parts, 1).cpu().numpy()
    return found
