"""The rows that one task has more than the base: of a vocabulary that was enlarged. Stored as they are.

The rows that both have are an ordinary tensor of the base's shape; only axis 0 may differ.
"""

import numpy as np

from flexmerge_cli.residuals.coder import Part


def extra_rows(shape: tuple[int, ...], base_shape: tuple[int, ...]) -> int:
    """How many rows a task's tensor has more. 0 if its shape differs in any other way, or not at all."""
    if len(shape) != len(base_shape) or not shape or shape[1:] != base_shape[1:]:
        return 0
    return max(0, shape[0] - base_shape[0])


def parts(shape: tuple[int, ...], base_shape: tuple[int, ...], dtype: str) -> tuple[Part, ...]:
    """One part in the task's dtype; nothing where there are no extra rows."""
    extra = extra_rows(shape, base_shape)
    return (Part(role="rows", dtype=dtype, shape=(extra, *shape[1:]), by_row=True),) if extra else ()


def join(shared: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The task's whole tensor, of the rows that the base has too and the extra ones."""
    return np.concatenate([shared, rows])
