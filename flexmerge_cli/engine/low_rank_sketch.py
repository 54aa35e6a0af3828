"""Tests whether a fine-tune is its base plus low-rank matrices, as a merged LoRA is, from blocks of a few matrices.

A block of a matrix of rank r has rank r if it is large enough, and never more. Rounding to the dtype adds a matrix of
full rank and known size, so the singular values above it are counted. Cost per task: 2 · MATRICES reads of SIDE rows
and as many decompositions of SIDE², 15 ms for 4096 columns, whatever the size of the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import NUMPY, to_float32
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.tensor import StoredTensor

MATRICES = 4
"""The number of matrices tested, evenly spread. More would agree, or the first already differs."""
SIDE = 128
LARGEST_PART = 4
"""The fraction of the block's side, 1 / LARGEST_PART, above which a rank is not called low."""
ABOVE_NOISE = 2.0
"""The threshold, in multiples of the largest singular value that rounding alone would give."""
EXPLAINED = 0.9
"""The least part of the energy that the counted values must hold; with less, rounding hides the rank."""
EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A matrix of a task, and that of the base."""

    base: StoredTensor
    task: StoredTensor


def low_rank_of(pairs: Sequence[Pair], reader: Reader) -> int | None:
    """Return the rank that bounds all tested matrices; None if one of them has no low rank. pairs: the matrices that
    differ."""
    wide = [pair for pair in pairs if len(pair.task.shape) >= 2 and min(matrix_shape(pair.task)) >= 2 * LARGEST_PART]
    if not wide:
        return None
    ranks = []
    for place in np.linspace(0, len(wide) - 1, min(MATRICES, len(wide))).round().astype(int):
        base, task = (_block(reader, tensor) for tensor in (wide[place].base, wide[place].task))
        rank = numerical_rank(base, task, wide[place].task.dtype)
        if rank is None:
            return None
        ranks.append(rank)
    return max(ranks)


def numerical_rank(base: np.ndarray, task: np.ndarray, dtype: str) -> int | None:
    """Return the rank of task - base, from float64 blocks; None if it is not low, or rounding hides it. dtype: the
    task's."""
    delta = task - base
    size = np.maximum(np.abs(task), np.finfo(np.float32).tiny)
    # Rounding errors are uniform within half a unit in the last place: that of the weight, and that of the terms of the
    # float32 sum.
    unit = EPSILON[dtype] * 2.0 ** np.floor(np.log2(size))
    noise = math.sqrt(float(np.mean(unit**2)) / 12 + (EPSILON["F32"] ** 2) * float(np.mean(delta**2)))
    floor = ABOVE_NOISE * noise * (math.sqrt(delta.shape[0]) + math.sqrt(delta.shape[1]))
    values = np.linalg.svd(delta, compute_uv=False)
    rank = int((values > floor).sum())
    energy = float((values**2).sum())
    if not 0 < rank <= min(delta.shape) // LARGEST_PART or not math.isfinite(energy):
        return None
    return rank if float((values[:rank] ** 2).sum()) >= EXPLAINED * energy else None


def matrix_shape(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.shape[0], math.prod(tensor.shape[1:])


def _block(reader: Reader, tensor: StoredTensor) -> np.ndarray:
    """Read rows from the middle on, in one read, and pick columns evenly spread: float64, at most SIDE × SIDE."""
    rows, columns = matrix_shape(tensor)
    count = min(SIDE, rows)
    first = (rows - count) // 2
    buffer = np.empty(count * columns * tensor.item_bytes, np.uint8)
    bits = reader.read(tensor, first * columns, (first + count) * columns, buffer).view(NUMPY[tensor.dtype])
    picked = np.linspace(0, columns - 1, min(SIDE, columns)).round().astype(int)
    block = bits.reshape(count, columns)[:, picked]
    return block if tensor.dtype == "F64" else to_float32(block, tensor.dtype).astype(np.float64)
