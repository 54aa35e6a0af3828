"""Holds what `auto` knows about the tensors of a plan, and how much each loss counts. Numpy only; sees no weights.

Everything comes from the one pass over the weights: Gram matrices, which bits are equal, and how well a tensor can be
coded (residuals/coding_error.py). The groups are those of the merge order.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.residuals.coder import Matrix, MatrixView, num_bytes
from flexmerge_cli.residuals.coding_error import RESIDUAL_BITS, CodingError
from flexmerge_cli.residuals.low_bit import GAUSS_LOSSES, weight_code
from flexmerge_cli.residuals.scales import Scales
from flexmerge_cli.residuals.sign_runs import NORMAL_LOSSES, RUNS, SignRuns, residual_code

# M tasks

Weight = float | np.ndarray
"""The weight of damages: one for all tasks, or one for each task, [M]."""

Groups = tuple[tuple[int, ...], ...]
"""A partition of the tasks, ordered by smallest task."""

# This part of a tensor's energy is far below what the float32 products of a plan can tell from zero (1e-7).
LEAST_ERROR = 1e-12

# Energies come from float32 task vectors, and the smallest float32 is 1e-45. Less can only come from a plan that was
# not measured.
SMALLEST_PRODUCT = 1e-300

# A task vector that is lost does more damage than noise of the same energy: this many times more. Anything from 48 on
# orders merged and coded bundles of three families as their scores do. See docs/benchmarks.md.
LOST = 64.0

# Parts of a name that mark a tensor as an embedding table.
TABLE_WORDS = ("wte", "shared")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorStatistics:
    """What the plan knows about one mergeable tensor."""

    name: str
    shape: tuple[int, ...]
    base_dtype: str
    dtypes: tuple[str, ...]
    """The dtype of each task."""
    gram: np.ndarray
    """The Gram matrix, [M, M] float64, ⟨τ_i, τ_j⟩."""
    same: tuple[int, ...]
    """For each task, the first task whose tensor has the same bits."""
    is_base: tuple[bool, ...]
    """For each task, whether the base, cast to the task's dtype, has its bits."""
    errors: CodingError
    base_is_stored: bool = False
    """Whether the dense base is stored anyway, for kept adapters: tasks may then read it at no cost."""
    copy_is_stored: tuple[bool, ...] = ()
    """For each task, whether that stored base is an exact copy of its tensor; empty if it is for none."""
    importance: np.ndarray | None = None
    """The cost of a squared error of one element for each task, [M] float64: the mean of its Fisher information. None
    if it was not measured."""

    @property
    def matrix(self) -> Matrix:
        """The shape of the matrix that everything is coded in."""
        return MatrixView.SQUEEZED.matrix(self.shape)

    @property
    def classes(self) -> list[list[int]]:
        """Lists of tasks with the same bits, which are stored once, ordered by first task."""
        return [
            [k for k, first in enumerate(self.same) if first == representative]
            for representative in sorted(set(self.same))
        ]

    def num_classes(self, group: tuple[int, ...]) -> int:
        return len({self.same[task] for task in group})

    @property
    def code_bytes(self) -> dict[float, int]:
        """The bytes of the matrix in each code of weights, by its bits."""
        return {bits: num_bytes(weight_code(bits).parts(self.matrix, "F32")) for bits in RESIDUAL_BITS}

    def residual_bytes(self, scales: Scales) -> dict[float, int]:
        """Return the bytes of a residual in each code, by its bits."""
        codes = {bits: residual_code(bits, scales, self.matrix[0]) for bits in (*RUNS, *RESIDUAL_BITS)}
        return {bits: num_bytes(code.parts(self.matrix, "F32")) for bits, code in codes.items()}

    @property
    def residual_losses(self) -> dict[float, float]:
        """The part of a residual's energy that each code loses, by its bits: measured, and below one bit predicted from
        the loss at one bit."""
        measured = self.errors.ratio
        return {bits: SignRuns(run=run).loss(measured[1]) for bits, run in RUNS.items()} | dict(measured)

    def decoded_loss(self, bits: float) -> float:
        """Return the error of decoded rows as a part of a residual's energy: more than the loss if rows decode longer.

        For unit vectors u, v with cosine c, ‖g·u - v‖² is 1 - 2·g·c + g².
        """
        loss = max(self.residual_losses[bits], LEAST_ERROR)
        usual = NORMAL_LOSSES[RUNS[bits]] if bits < 1 else GAUSS_LOSSES[int(bits)] if bits <= 2 else None
        if usual is None:
            return loss
        longer, cosine = (1 - min(loss, usual)) ** (-1 / 3), max(0.0, 1 - loss) ** 0.5
        return float(1 - 2 * longer * cosine + longer**2)

    def price(self, loss: float) -> float:
        """Return the damage of losing a part of a residual's energy, in [0, 1], as a multiple of that energy: at most
        LOST.

        In embedding tables it is the squared error, since most rows are of words that a task hardly ever sees.
        """
        return loss if self.may_drop else loss / max(1 - loss, 1 / LOST)

    def dense_bytes(self, dtype: str) -> int:
        return math.prod(self.shape) * ITEM_BYTES[dtype]

    @property
    def energy(self) -> float:
        """The mean of ‖τ_k‖² over the tasks."""
        return float(np.maximum(np.diag(self.gram), 0.0).mean())

    @property
    def is_unchanged(self) -> bool:
        """Whether no fine-tune has changed the tensor. Any loss would be out of proportion to the saving, so it is
        stored exactly.

        A Gram matrix of zeros alone does not imply that all tasks have the same bits: see `is_free`.
        """
        return all(base or energy <= 0 for base, energy in zip(self.is_base, np.diag(self.gram)))

    def is_free(self, task: int) -> bool:
        """Return whether the dense base equals the task's tensor bit by bit. Readers cast by way of float32, so F64
        loses bits."""
        return self.is_base[task] and not self.base_dtype == self.dtypes[task] == "F64"

    @property
    def least_error(self) -> float:
        """The least error that a code is assumed to have, so that a code predicted to lose nothing never equals a
        copy."""
        return LEAST_ERROR * self.energy

    @property
    def may_drop(self) -> bool:
        """Whether a residual may have 0 bits: only in embedding tables, where most rows have not changed.

        Without this floor, accuracy falls by up to 17 points at small sizes.
        """
        m, n = self.matrix
        words = self.name.lower().split(".")
        return m >= 1000 and m >= 2 * n and any("embed" in word or word in TABLE_WORDS for word in words)


def weights(tensors: Iterable[TensorStatistics], block_of: Mapping[str, str]) -> dict[str, Weight]:
    """Return the weight w of each tensor's damages; 0 for unchanged tensors.

    With the Fisher information, each task has its own weight, [M]: a task's weighted error is, to second order, the
    part of the base's loss of predictions that it still has, so all tasks count alike. Tensors for which it was not
    measured keep their plain weight, times a common factor.
    """
    tensors = list(tensors)
    plain = _plain_weights(tensors, block_of)
    known = {t.name: t.importance for t in tensors if t.importance is not None and plain[t.name] > 0}
    if not known:
        return dict(plain)
    energies = {tensor.name: np.maximum(np.diag(tensor.gram), 0.0) for tensor in tensors}
    of_base_M: np.ndarray = np.sum([importance * energies[name] for name, importance in known.items()], axis=0)
    share_M = np.divide(1.0, of_base_M, out=np.zeros_like(of_base_M), where=of_base_M > SMALLEST_PRODUCT)
    share_M[share_M == 0] = share_M.mean()  # This is for a task that equals the base.
    found = {name: importance * share_M for name, importance in known.items()}
    factor = float(np.median([found[name].mean() / plain[name] for name in found]))
    return {name: found.get(name, factor * weight) for name, weight in plain.items()}


def _plain_weights(tensors: Iterable[TensorStatistics], block_of: Mapping[str, str]) -> dict[str, float]:
    """Return the weight w of each tensor: 1/√(energy of the block · energy of the tensor), energies being means over
    the task vectors; 0 for unchanged tensors.

    Unweighted errors starve tensors with small task vectors, which costs 2 points of accuracy at the size of one model.
    """
    energy = {tensor.name: 0.0 if tensor.is_unchanged else tensor.energy for tensor in tensors}
    of_block: dict[str, float] = {}
    for name, value in energy.items():
        of_block[block_of[name]] = of_block.get(block_of[name], 0.0) + value
    return {
        name: 1 / math.sqrt(max(of_block[block_of[name]] * b, SMALLEST_PRODUCT)) if b > 0 else 0.0
        for name, b in energy.items()
    }


def partitions(num_tasks: int, merges: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[int, Groups]:
    """Map each number of groups, from M - 1 to 1, to the groups after the merge that leaves so many. merges: (left,
    right) tasks, of one block's dendrogram."""
    groups: dict[int, tuple[int, ...]] = {task: (task,) for task in range(num_tasks)}
    levels: dict[int, Groups] = {}
    for left, right in merges:
        groups[min(left)] = tuple(sorted((*left, *right)))
        del groups[min(right)]
        levels[len(groups)] = tuple(groups[first] for first in sorted(groups))
    return levels
