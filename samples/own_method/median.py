"""A merging method in a file: flexmerge merge plan.json --method './samples/own_method/median.py#median' -o bundle/"""

from torch import Tensor

from flexmerge_cli.methods.method import Positive, method


@method(paper="own", scope="element", when="a few fine-tunes that went astray among many that did not")
def median(deltas: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """Scaled median of the task vectors, element by element. [k, n] float32 -> [n].

    Of an even number of tasks the mean of the middle two.
    """
    ordered = deltas.double().sort(dim=0).values
    middle = len(ordered) // 2
    return scale * (ordered[middle] + ordered[-1 - middle]) / 2
