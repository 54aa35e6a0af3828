"""Describes what the pass of `plan` measures, what it finds, and in what pieces it reads.

Modules that compute its cost or use its results need only this; survey.py does the arithmetic. Nothing here needs
torch.
"""

from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.residuals.coder import Matrix, MatrixView
from flexmerge_cli.residuals.coding_error import CodingError

# Elements of one product. Fixed, so that the sums, and thus the plan's bytes, do not depend on how files are cut.
PRODUCT_ELEMENTS = 1 << 16
# float32 elements of one work item, per model: 1 MiB, a whole piece of the digest, and small enough for the cache.
CHUNK_ELEMENTS = 1 << 18
# Elements that are compared at once, a multiple of PRODUCT_ELEMENTS.
TILE_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyItem:
    """One tensor of the family, or of those tasks that hold it in one form."""

    name: str
    base: StoredTensor | None
    """The base's tensor; None if it is not read."""
    tasks: tuple[tuple[int, StoredTensor], ...]
    """(task index, tensor), all of one shape."""
    gram: bool
    """Whether task vectors are compared; needs the base and every task."""
    codes: bool = False
    """Whether it is also coded, for `auto`; needs `gram`."""


@dataclass(slots=True, kw_only=True)
class Measure:
    """What the pass found for one item. Rows and columns are those of `SurveyItem.tasks`."""

    digests: list[str]
    base_digest: str | None
    same: list[int]
    """The position of the first task that holds the same bits."""
    is_base: list[bool]
    """Whether the base, cast to the task's dtype, has the task's bits."""
    gram: np.ndarray | None
    """The Gram matrix, [k, k] float64."""
    agreement: np.ndarray | None
    """The number of elements of equal sign in {-1, 0, 1}, [k, k] int64."""
    base_energy: float
    """Σ θ_base²."""
    not_finite: list[tuple[int, int]]
    """Pairs of a position, or -1 for the base, and the first index in C order that is not finite."""
    coding: CodingError | None


def models_of(item: SurveyItem) -> list[StoredTensor]:
    """Return all tensors of an item, with the base last if it is read."""
    return [tensor for _, tensor in item.tasks] + ([item.base] if item.base is not None else [])


def range_of(item: SurveyItem, chunk_elements: int) -> int:
    """Return the elements of one work item, per model: chunk_elements of float32, and as many bytes of smaller ones. So
    a range holds whole pieces of the digests where all models have one dtype."""
    largest = max(tensor.item_bytes for tensor in models_of(item))
    return chunk_elements * max(1, ITEM_BYTES["F32"] // largest)


def view_of(shape: tuple[int, ...]) -> Matrix:
    """Return the shape of the rows that `auto` codes."""
    return MatrixView.SQUEEZED.matrix(shape)
