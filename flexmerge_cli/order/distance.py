"""Computes how far a linear method leaves the tasks of a group, from inner products. Numpy only; no weights are read.

The value of a linear method (average, weighted_average, task_arithmetic, model_stock) is u = Σ_j w_j τ_j, so ‖u - τ_k‖²
follows from the Gram matrix. It is the error before rounding to the stored dtype, hence shown with `≈`.
"""

import numpy as np

# M tasks, k tasks of one group


def weighted_errors(gram_kk: np.ndarray, weights_k: np.ndarray) -> np.ndarray:
    """Compute squared errors ‖u - τ_k‖² for u = Σ_j w_j τ_j: [k] float64, >= 0. gram_kk: [k, k], of the group alone."""
    cross_k = (gram_kk * weights_k).sum(axis=1)  # ⟨τ_k, u⟩
    found: np.ndarray = np.maximum(gram_kk.diagonal() - 2.0 * cross_k + (cross_k * weights_k).sum(), 0.0)
    return found
