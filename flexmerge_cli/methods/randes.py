"""RanDeS: the sum of the task vectors under random signs, which each task undoes for itself."""

from typing import Annotated, Any

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.method import Centre, Range, Where, method, per_element
from flexmerge_cli.methods.reductions import sum_tasks
from flexmerge_cli.residuals import mask as masks


@method(
    paper="Zhou et al. 2025",
    scope="element",
    form="superposed",
    when="two models' worth of bytes, however many tasks; what is lost is noise",
    workspace=per_element(13, 16),
)
def randes(deltas: Tensor, where: Where, *, seed: Annotated[int, Range(least=0)] = 0) -> Any:
    """Superpose the task vectors under random signs: S = Σ s_k ⊙ τ_k, and s_k ⊙ S for task k. [k, n] float32 -> Centre.

    The signs of a task are drawn from the seed, its name and the tensor's, so they take no bytes. Task k gets τ_k plus
    the other tasks' vectors under signs that are random to it: noise of the energy of all of them. The paper draws one
    sign for each column of a matrix, and exchanges layers of equal shape at random, too; here each element has a sign,
    and layers stay.
    """
    n = deltas.shape[1]
    plus = torch.stack(
        [torch.from_numpy(masks.drawn(seed, task, where.tensor, where.start, n)) for task in where.tasks]
    ).to(deltas.device)
    return Centre(sum_tasks(torch.where(plus, deltas, -deltas)), lambda _deltas, _unified: plus)
