"""SVC: rescales the singular values of a merged matrix so that each direction holds what the tasks hold in it on
average."""

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods.matrices import Matrices, is_other, of_matrices
from flexmerge_cli.methods.method import Method, Positive
from flexmerge_cli.methods.step import calibration
from flexmerge_cli.methods.svd import svd


def _refuse(method: Method) -> str | None:
    if method.name in ("iso_c", "iso_cts"):
        return "all singular values are equal there, so the directions to calibrate are arbitrary"
    if method.gives_masks:
        return "it calibrates one merged delta, and this method gives each task its own"
    return None


@calibration(paper="Li et al. 2026", elementwise=is_other, refuse=_refuse, workspace=of_matrices(1, 5.5, small=2.5))
def svc(merged: Tensor, unstepped: Tensor, *, alpha: Positive = 0.1, matrices: Matrices = "linear") -> Tensor:
    """Shrink directions in which the merged delta exceeds the tasks, and stretch the others. Matrices only.

    merged [*shape] float64, after the method's scale; unstepped [k, *shape] float32, the task vectors before any step.
    Direction r of the merge, a_r = σ_r v_r, holds s_i = ⟨a_r, u_rᵀτ_i⟩/‖u_rᵀτ_i‖² of task i, at least alpha (0 where
    the norm is 0); σ_r becomes k/Σ s_i times as large. Where nothing is clamped, the scale before it has no effect.
    alpha: 1, the authors' choice after tsv_m, only shrinks; they use 1/M after task_arithmetic, dare and ties.
    Source: lyymuwu/SVC, which adds an absolute 1e-12 to the norm, too much for small deltas, and whose per-task target
    is not in the paper.
    """
    tasks = unstepped.flatten(2).to(torch.float64)
    found = svd(merged.flatten(1))
    along_rn = found.s[:, None] * found.vt
    total_r = torch.zeros_like(found.s)
    for task in tasks:
        own_rn = found.u.T @ task
        square_r = own_rn.square().sum(1)
        share_r = torch.where(square_r > 0, (along_rn * own_rn).sum(1) / square_r, 0.0)
        total_r += share_r.clamp(min=alpha)
    return ((found.u * (len(tasks) / total_r)) @ along_rn).view(merged.shape)
