"""Iso-C and Iso-CTS: make all singular values equal, of the common directions alone or of task-specific ones too."""

from typing import Annotated

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_other, merge_matrices, of_matrices
from flexmerge_cli.methods.method import Range, Where, method
from flexmerge_cli.methods.reductions import sum_tasks
from flexmerge_cli.methods.svd import CUT, Svd, polar, svd


def _flat(parts: list[Svd]) -> Tensor:
    """Multiply the polar factors by the mean singular value; 0 if there is no triple."""
    s = torch.cat([part.s for part in parts])
    u, vt = torch.cat([part.u for part in parts], 1), torch.cat([part.vt for part in parts], 0)
    return polar(u) @ polar(vt) * (s.mean() if len(s) else 0.0)


def merge_common(tasks: Tensor) -> Tensor:
    """Merge tasks by Iso-C. [k, m, n] float64 -> [m, n]."""
    common = svd(sum_tasks(tasks))
    return common.u @ common.vt * (common.s.mean() if len(common.s) else 0.0)


def ranks(smallest: int, num_tasks: int, fraction: float) -> tuple[int, int]:
    """Return the numbers of triples of the sum and of each task, at most min(m, n) in all."""
    common = int(smallest * fraction)
    own = min(round((smallest - common) / num_tasks), smallest // num_tasks)
    return smallest - num_tasks * own, own


def merge_common_and_specific(tasks: Tensor, fraction: float) -> Tensor:
    """Merge tasks by Iso-CTS. [k, m, n] float64 -> [m, n]."""
    num_common, num_own = ranks(min(tasks.shape[1:]), len(tasks), fraction)
    common = svd(sum_tasks(tasks)).first(num_common)
    parts = [common]
    for task in tasks if num_own else ():
        largest = svd(task).s[:1].sum().item()
        # The cut is that of the task, not of its remainder: a task inside the common span leaves only noise.
        parts.append(svd(task - common.u @ (common.u.T @ task)).above(CUT * largest).first(num_own))
    return _flat(parts)


@method(
    paper="Marczak et al. 2025",
    scope="tensor",
    elementwise=is_other,
    when="similar tasks; weak directions of the sum count as much as strong ones",
    workspace=of_matrices(1, 4, small=3),
)
def iso_c(deltas: Tensor, where: Where, *, scale: Scale = 1.0, matrices: Matrices = "linear") -> Tensor:
    """Take the mean singular value times U Vᵀ of the sum of the task vectors. [k, *shape] float32 -> [*shape].

    Its norm grows with k; the authors search scale up to 3. Tensors that are not matrices get the mean.
    Source: danielm1405/iso-merging, which gives the null directions of a sum of low rank (LoRA) full weight on an
    arbitrary basis. Here they are dropped, and the mean is over the others. LoRA deltas that were merged into 16-bit
    weights have full rank by rounding, so that noise gets full weight here too: prefer tsv_m.
    """
    return merge_matrices(deltas, where, matrices, merge_common, scale)


@method(
    paper="Marczak et al. 2025",
    scope="tensor",
    elementwise=is_other,
    when="like iso_c, for many or different tasks",
    workspace=of_matrices(2, 8, small=4),
)
def iso_cts(
    deltas: Tensor,
    where: Where,
    *,
    fraction: Annotated[float, Range(least=0, most=1)] = 0.8,
    scale: Scale = 1.0,
    matrices: Matrices = "linear",
) -> Tensor:
    """Merge like iso_c, with part of the rank for what each task has outside the common span. [k, *shape] -> [*shape].

    fraction: the part of the rank that is common; the rest is shared out evenly, and if it is nothing, this is iso_c.
    Source: danielm1405/iso-merging, whose count of common triples is negative for small matrices and many tasks.
    """
    return merge_matrices(deltas, where, matrices, lambda tasks: merge_common_and_specific(tasks, fraction), scale)
