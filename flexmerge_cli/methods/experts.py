"""Declares how the experts of `free` are stored, which is all that a reader needs. free.py computes them, with
torch."""

from typing import Literal

from flexmerge_cli.methods.coded import Coded, Vectors, coded
from flexmerge_cli.methods.method import Fraction
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.sparse import Sparse


@coded(paper="Zheng & Wang 2025", when="as a part of free")
def free(*, density: Fraction = 0.01, select: Literal["tensor", "row"] = "tensor") -> Coded:
    """Store the largest elements of every tensor, vectors included, on the `fr` merge, with its arguments."""
    top = Sparse(density=density, select=select)
    return Coded(centre="fr", coder=lambda num_tasks: top, view=MatrixView.LAST_AXIS, vectors=Vectors.CODED)
