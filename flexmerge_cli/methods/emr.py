"""EMR: elects a unified delta; stores per task a mask of where it agrees, and a factor."""

from typing import Any, Literal

import numpy as np

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Centre, Gain, method, per_element
from flexmerge_cli.methods.reductions import largest_agreeing


def rescale(*, gamma: str) -> Gain:
    """Compute γ_k = Σ|τ_k| / Σ|m_k u| over the block, 0 if 0/0; `tensor_mean` sums the means of its tensors instead."""

    def weighted(delta_kT: np.ndarray, masked_kT: np.ndarray, elements_T: np.ndarray) -> np.ndarray:
        weight_T = np.ones_like(delta_kT[0]) if gamma == "weighted" else 1 / np.maximum(elements_T, 1)
        above, below = (delta_kT * weight_T).sum(1), (masked_kT * weight_T).sum(1)
        found: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return found

    return weighted


@method(
    paper="Huang et al. 2024",
    scope="element",
    form="masked",
    gain=rescale,
    when="one bit per task and element buys much over any single merged model",
    workspace=per_element(10, 16),
)
def emr(deltas: Tensor, *, gamma: Literal["weighted", "tensor_mean"] = "weighted") -> Any:
    """Take the largest delta of the elected sign, masked and rescaled for each task. [k, n] float32 -> Centre.

    The mask of a task holds where the task agrees. gamma: `weighted` gives all elements of a block equal weight;
    `tensor_mean`, the authors' form for eight tasks, gives a bias the weight of a matrix. A task that loses most
    elections can have γ > 1.
    Source: harveyhuang18/EMR_Merging, which gives NaN for a zero task; here γ = 0.
    """
    unified, agrees = largest_agreeing(deltas)
    return Centre(unified, lambda _deltas, _unified: agrees)
