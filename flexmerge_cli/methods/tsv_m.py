"""TSV-Merge: orthogonalises the leading singular vectors of each task against those of the others."""

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, Scale, is_other, merge_matrices, of_matrices
from flexmerge_cli.methods.method import Where, method
from flexmerge_cli.methods.svd import polar, svd


def merge_singular_vectors(tasks: Tensor) -> Tensor:
    """Merge tasks by TSV-Merge. [k, m, n] float64 -> [m, n]."""
    rank = max(1, min(tasks.shape[1:]) // len(tasks))
    parts = [svd(task).first(rank).alone() for task in tasks]
    u = torch.cat([part.u for part in parts], 1)
    s = torch.cat([part.s for part in parts])
    vt = torch.cat([part.vt for part in parts], 0)
    return (polar(u) * s) @ polar(vt)


@method(
    paper="Gargiulo et al. 2025",
    scope="tensor",
    elementwise=is_other,
    when="a strong single model without data; keeps the directions of every task",
    workspace=of_matrices(1, 5.5, small=6),
)
def tsv_m(deltas: Tensor, where: Where, *, scale: Scale = 1.0, matrices: Matrices = "linear") -> Tensor:
    """Multiply polar(U) · S · polar(Vᵀ) of the tasks' leading singular triples. [k, *shape] float32 -> [*shape].

    Each of the k tasks of the group gives max(1, min(m, n) // k) triples. Tensors that are not matrices get the mean.
    scale: applies to all tensors; the paper selects it on validation data, up to 3. A zero task takes its share of the
    rank. Source: AntoAndGar/task_singular_vectors, compute_and_sum_svd_mem_reduction. There int(n·(1/k)) is 0 for
    k = n = 49, more tasks than the rank give a zero matrix, and equal tasks or a zero task give an arbitrary one; here
    null directions are dropped (svd.py).
    """
    return merge_matrices(deltas, where, matrices, merge_singular_vectors, scale)
