"""A merging method in a package: after `pip install ./samples/own_method/package`, `--method norm_mean`."""

from torch import Tensor

from flexmerge_cli.methods.method import Positive, method
from flexmerge_cli.methods.reductions import flat, mean_tasks


@method(paper="own", scope="tensor", when="many tasks, whose mean is much shorter than each of them")
def norm_mean(deltas: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """Mean of the task vectors, stretched to their mean length. [k, *shape] float32 -> [*shape].

    0 where the mean is 0.
    """
    mean = mean_tasks(deltas)
    length = mean.norm()
    wanted = flat(deltas).double().norm(dim=1).mean()
    return scale * mean * (wanted / length if length > 0 else 0.0)
