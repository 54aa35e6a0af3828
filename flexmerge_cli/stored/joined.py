"""The rows of a vocabulary that one task has for itself, beside those that base and all tasks have. Stored as they are.

The rows that all have are an ordinary tensor, in the base's order; a task's map says at which of its rows they stand.
Its other rows, ascending, are what is stored for it alone.
"""

import numpy as np

from flexmerge_cli.checkpoint.rows import Runs, other_rows


def join(shared: np.ndarray, own: np.ndarray | None, common: Runs, rows: int) -> np.ndarray:
    """The task's whole tensor. shared, own: [·, …]; own None: no rows. common: where `shared` stands. -> [rows, …]."""
    whole = np.empty((rows, *shared.shape[1:]), shared.dtype)
    for part, runs in ((shared, common), (own, other_rows(common, rows))):
        position = 0
        for first, count in runs:
            assert part is not None
            whole[first : first + count] = part[position : position + count]
            position += count
    return whole
