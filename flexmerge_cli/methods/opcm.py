"""OPCM: merges tasks one after the other, each without its part along the merge so far."""

from typing import Annotated

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_matrix, of_matrices
from flexmerge_cli.methods.method import Range, method
from flexmerge_cli.methods.svd import svd


def project(task: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """Remove the part along merged from the task. [m, n] float64.

    In the singular bases of merged, its leading corner, which holds more than alpha of the sum of singular values, and
    its diagonal are zeroed. Null directions of merged are left unchanged, so a zero matrix changes nothing.
    """
    found = svd(merged)
    if len(found.s) == 0:
        return task
    share = found.s.cumsum(0)
    past = (share / share[-1] > alpha).nonzero()
    corner = int(past[0]) if len(past) else len(found.s)
    inside = found.u.T @ task @ found.vt.T
    removed = torch.diag(inside.diagonal())
    removed[:corner, :corner] = inside[:corner, :corner]
    return task - found.u @ removed @ found.vt


def _norm(tensors: dict[str, Tensor]) -> Tensor:
    """Compute the norm of all elements together."""
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()


@method(
    paper="Tang et al. 2025",
    scope="block",
    when="for comparison with continual merging; the order of tasks matters",
    workspace=of_matrices(1.25, 5.5, small=3),
)
def opcm(
    deltas: dict[str, Tensor],
    *,
    alpha: Annotated[float, Range(least=0, most=1)] = 0.5,
    scale: Scale = 1.0,
    matrices: Matrices = "linear",
) -> dict[str, Tensor]:
    """Add the tasks in order, each projected off the merge so far, and keep the norm of a task.

    deltas {tensor: [k, *shape] float32} of a block -> {tensor: [*shape]}. Norms are over the block. The authors' are
    over the model: for those, make the plan with `--blocks model`, which takes the memory of all tasks at once. Tensors
    that are not matrices are added unchanged. Tasks come in the order of the deltas; the authors shuffle them.
    Source: tanganke/fusion_bench. There alpha=1 means 0 (argmax over no True), and for a merge of low rank a diagonal
    in an arbitrary basis of the null space is zeroed, which is left unchanged here.
    """
    names = [name for name in deltas if deltas[name][0].numel()]
    tasks = [
        {name: deltas[name][i].to(torch.float64) for name in names} for i in range(len(next(iter(deltas.values()))))
    ]
    empty = {name: deltas[name][0].to(torch.float64) for name in deltas if name not in names}
    if not names:
        return empty
    merged, kept = tasks[0], torch.ones((), dtype=torch.float64)
    norms = [_norm(tasks[0])]
    for task in tasks[1:]:
        norms.append(_norm(task))
        total = {}
        for name, delta in task.items():
            added = delta
            if is_matrix(name, tuple(delta.shape), matrices):
                added = project(delta.flatten(1), merged[name].flatten(1), alpha).view(delta.shape)
            total[name] = kept * merged[name] + added
        size, mean = _norm(total), torch.stack(norms).mean()
        kept = size / mean if size > 0 and mean > 0 else torch.ones_like(size)
        merged = {name: tensor / kept for name, tensor in total.items()}
    return empty | {name: scale * tensor for name, tensor in merged.items()}
