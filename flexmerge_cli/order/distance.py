"""A Gram matrix and a group in, how far a linear method leaves its tasks out. Numpy only; no weights are read.

Of a linear method (average, weighted_average, task_arithmetic, model_stock) u = Σ_j w_j τ_j, so ‖u - τ_k‖² follows from
inner products. Before rounding to the stored dtype, hence shown with `≈`.
"""

from collections.abc import Sequence

import numpy as np

# M tasks, k tasks of one group


def linear_errors(
    gram: np.ndarray, group: Sequence[int], scale: float, *, identical: np.ndarray | None = None
) -> np.ndarray:
    """Squared errors ‖u - τ_k‖² of the tasks of a group for u = scale · mean of its task vectors: [k] float64, >= 0.

    gram: [M, M] of one tensor, or of a block; group: indices of tasks. 0 for a group of one and for a group of
    identical tasks, which are copied whatever the scale. identical: [M, M] bool, who is; None: whose Gram entries are
    all equal. Copies are made per tensor, so the sum over tensors is right where the Gram matrix of a block is
    too large: by the tensors of it that are identical.
    """
    gram_kk = gram[np.ix_(group, group)]
    same_kk = gram_kk == gram_kk[:1, :1] if identical is None else identical[np.ix_(group, group)]
    if len(group) == 1 or same_kk.all():
        return np.zeros(len(group))
    return weighted_errors(gram_kk, np.full(len(group), scale / len(group)))


def weighted_errors(gram_kk: np.ndarray, weights_k: np.ndarray) -> np.ndarray:
    """Squared errors ‖u - τ_k‖² for u = Σ_j w_j τ_j: [k] float64, >= 0. gram_kk: [k, k], of the group alone."""
    cross_k = (gram_kk * weights_k).sum(axis=1)  # ⟨τ_k, u⟩
    found: np.ndarray = np.maximum(gram_kk.diagonal() - 2.0 * cross_k + (cross_k * weights_k).sum(), 0.0)
    return found
