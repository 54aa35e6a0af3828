"""Computes how similar the tasks are in one block, from its measurements. Numpy only; no tensors, files or groups.

High is similar; a distance is a negative similarity. linkage.py compares groups of tasks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from flexmerge_cli.errors import UsageError

# M tasks, always in code-point order of name

# Similarities are compared as multiples of this. Float32 products and another order of summation move a cosine by
# less (about 2^-24), so they do not move a merge. The plan stores similarities unrounded.
COMPARISON_STEP = 2.0**-20


class Similarity(StrEnum):
    """How two task vectors are compared, over all tensors of a block."""

    COSINE = "cosine"
    EUCLIDEAN = "euclidean"
    SIGN = "sign"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockMeasure:
    """The measurements of one block that the order needs."""

    name: str
    """The plan's name for the block; used only in messages."""
    gram: np.ndarray
    """[M, M] float64, ⟨τ_i, τ_j⟩ over all tensors of the block; finite, exactly symmetric."""
    num_elements: int
    """The number of elements of one task, over all tensors of the block."""
    identical: np.ndarray
    """[M, M] bool: every tensor of the block is bit-identical in both tasks; true on the diagonal."""
    agreement: np.ndarray | None = None
    """[M, M] integers: the number of elements whose signs in {-1, 0, 1} are equal, so zero agrees with zero. Only for
    similarity `sign`."""

    def __post_init__(self) -> None:
        shape = (self.num_tasks, self.num_tasks)
        for what, array in (("gram", self.gram), ("identical", self.identical), ("agreement", self.agreement)):
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{what} of block {self.name} has shape {array.shape}, not {shape}")
            if not np.isfinite(array).all() or not np.array_equal(array, array.T):
                raise ValueError(f"{what} of block {self.name} is not finite and symmetric")
        if not self.identical.diagonal().all():
            raise ValueError(f"a task of block {self.name} is not identical to itself")

    @property
    def num_tasks(self) -> int:
        """The number of tasks, M."""
        return len(self.gram)


def similarity(measure: BlockMeasure, how: Similarity) -> np.ndarray:
    """Compute the similarity of every two tasks in this block: [M, M] float64, symmetric, unrounded.

    cosine     ⟨a, b⟩ / (‖a‖ ‖b‖), in [-1, 1]; two zero vectors: 1, a zero and a non-zero one: 0
    euclidean  minus the root mean square of a - b, at most 0. From a Gram matrix, so near-duplicates lose digits
    sign       the fraction of elements of equal sign in {-1, 0, 1}, in [0, 1]

    Bit-identical tasks have 1 (euclidean: 0), whatever rounding did to the Gram matrix.
    Raises UsageError for `sign` if the signs of the block were not counted.
    """
    squared_M = measure.gram.diagonal()
    match how:
        case Similarity.COSINE:
            similarity_MM = cosine(measure.gram, squared_M[:, None], squared_M)
        case Similarity.EUCLIDEAN:
            similarity_MM = -rms_distance(measure.gram, squared_M[:, None], squared_M, measure.num_elements)
        case Similarity.SIGN:
            similarity_MM = _agreement(measure) / max(measure.num_elements, 1)
    return np.where(measure.identical, similarity_of_identical(how), similarity_MM)


def similarity_of_identical(how: Similarity) -> float:
    """Return the greatest possible similarity."""
    return 0.0 if how is Similarity.EUCLIDEAN else 1.0


def cosine(inner: np.ndarray, left_squared: np.ndarray, right_squared: np.ndarray) -> np.ndarray:
    """Compute cosines from inner products and squared norms, which broadcast; in [-1, 1]. A squared norm <= 0 means a
    zero vector.

    There is no epsilon: the released code's 1e-8 shrinks the similarities of small task vectors, and so reorders
    blocks.
    """
    left_zero, right_zero = left_squared <= 0, right_squared <= 0
    # The product of the roots, not the root of the product: squares of squares leave float64's range.
    norms = np.sqrt(np.where(left_zero, 1.0, left_squared)) * np.sqrt(np.where(right_zero, 1.0, right_squared))
    value = np.clip(inner / norms, -1.0, 1.0)
    return np.where(left_zero | right_zero, (left_zero & right_zero).astype(np.float64), value)


def rms_distance(
    inner: np.ndarray, left_squared: np.ndarray, right_squared: np.ndarray, num_elements: int
) -> np.ndarray:
    """Compute sqrt(mean((a - b)²)) from inner products and squared norms, which broadcast; at least 0."""
    squared = np.maximum(left_squared + right_squared - 2.0 * inner, 0.0)
    found: np.ndarray = np.sqrt(squared / max(num_elements, 1))
    return found


def comparison_unit(measures: Iterable[BlockMeasure], how: Similarity) -> float:
    """Return the unit that similarities are divided by before comparison: 1, or for `euclidean` the largest distance.

    Distances have the scale of the weights; without this a step of 2^-20 would be coarse for one family and
    fine for another. It is positive: a family of equal tasks has unit 1.
    """
    if how is not Similarity.EUCLIDEAN:
        return 1.0
    largest = max((-float(similarity(measure, how).min(initial=0.0)) for measure in measures), default=0.0)
    return largest or 1.0


def comparable(similarities: np.ndarray | float, unit: float) -> np.ndarray:
    """Round similarities for comparison: in `unit`, to the nearest multiple of 2^-20, half to even."""
    return np.rint(similarities / unit / COMPARISON_STEP) * COMPARISON_STEP


def _agreement(measure: BlockMeasure) -> np.ndarray:
    if measure.agreement is None:
        raise UsageError(
            f"similarity `sign` needs the signs of block `{measure.name}`, and they were not counted",
            hint="plan from the sources again with `--similarity sign`",
        )
    return measure.agreement
