"""Adds up the records of a block's tensors to what the merge order needs to know. Numpy only."""

from collections.abc import Sequence

import numpy as np

from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.order.similarity import BlockMeasure


def block_measure(name: str, tensors: Sequence[PlanTensor]) -> BlockMeasure:
    """Return what the order needs to know about a block: its tensors' Gram matrices, added in the block's order."""
    count = len(tensors[0].same)
    gram, identical = np.zeros((count, count)), np.ones((count, count), bool)
    agreement = np.zeros((count, count), np.int64) if all(t.agreement is not None for t in tensors) else None
    for tensor in tensors:
        gram = gram + np.array(tensor.gram, np.float64)
        same = np.array(tensor.same)
        identical &= same[:, None] == same[None, :]
        if agreement is not None:
            agreement += np.array(tensor.agreement, np.int64)
    elements = sum(tensor.num_elements for tensor in tensors)
    return BlockMeasure(name=name, gram=gram, num_elements=elements, identical=identical, agreement=agreement)
