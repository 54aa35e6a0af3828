"""MagMax: takes, for each element, the largest change of any task."""

from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.method import Positive, method, per_element


@method(
    paper="Marczak et al. 2024",
    scope="element",
    when="tasks that change different parts of the weights",
    workspace=per_element(0, 40),
)
def magmax(deltas: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """Take the delta of largest magnitude, element by element; of x and -x, x > 0. [k, n] float32 -> [n].

    scale: the authors use 0.5 for independent fine-tunes.
    Source: tanganke/fusion_bench, where the later task wins a tie, so that the result depends on the order of tasks.
    """
    highest, lowest = deltas.amax(0).double(), deltas.amin(0).double()
    return scale * highest.where(highest >= -lowest, lowest)
