"""What the order needs to know of a block, measured from task vectors in the plainest way."""

import numpy as np

from flexmerge_cli.order.similarity import BlockMeasure

# M tasks, N elements


def measure_of(deltas_MN: np.ndarray, *, name: str = "block") -> BlockMeasure:
    """Measure a block whose task vectors these are."""
    deltas_MN = np.asarray(deltas_MN, dtype=np.float64)
    signs_MN = np.sign(deltas_MN)
    return BlockMeasure(
        name=name,
        gram=deltas_MN @ deltas_MN.T,
        num_elements=deltas_MN.shape[1],
        identical=(deltas_MN[:, None] == deltas_MN[None]).all(axis=2),
        agreement=(signs_MN[:, None] == signs_MN[None]).sum(axis=2),
    )
