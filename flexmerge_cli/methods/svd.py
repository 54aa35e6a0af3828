"""Computes singular value decompositions and polar factors in float64 from the smaller Gram matrix.

eigh of A Aᵀ or Aᵀ A is two to three times as fast as a full decomposition, and in float64 more accurate than one in
float32 for condition numbers below 1e5; singular values up to 1e-6 of the largest are dropped anyway. LAPACK chooses
the signs of singular vectors and the bases of equal singular values; results here do not depend on the signs.
"""

from dataclasses import dataclass

from flexmerge_cli.later import Tensor, torch

# Singular values up to this fraction of the largest are noise: their vectors are an arbitrary basis of the null space.
CUT = 1e-6


@dataclass(frozen=True, slots=True)
class Svd:
    """Triples (u, s, v) by falling s, all above the cut: u [m, r], s [r], vt [r, n]. r = 0 for a zero matrix."""

    u: Tensor
    s: Tensor
    vt: Tensor

    def first(self, rank: int) -> "Svd":
        """Return the triples of the largest singular values; fewer if there are fewer."""
        return Svd(self.u[:, :rank], self.s[:rank], self.vt[:rank])

    def alone(self) -> "Svd":
        """Copy into separate memory. `first` returns a view, which keeps all triples alive."""
        return Svd(self.u.clone(), self.s, self.vt.clone())

    def above(self, size: float) -> "Svd":
        """Return the triples with s > size."""
        return self.first(int((self.s > size).sum()))

    def product(self) -> Tensor:
        """Return the product u diag(s) vt."""
        return (self.u * self.s) @ self.vt


def svd(matrix: Tensor) -> Svd:
    """Compute the thin decomposition of [m, n] in float64."""
    a = matrix.to(torch.float64)
    if a.shape[0] > a.shape[1]:
        flipped = svd(a.T)
        return Svd(flipped.vt.T, flipped.s, flipped.u.T)
    if a.numel() == 0:
        return Svd(a[:, :0], a.new_zeros(0), a.new_zeros(0, a.shape[1]))
    squares, u = torch.linalg.eigh(a @ a.T)
    s = squares.flip(0).clamp(min=0).sqrt()
    kept = int((s > CUT * s[0]).sum())
    u, s = u.flip(1)[:, :kept], s[:kept]
    return Svd(u, s, (u.T @ a) / s[:, None])


def polar(matrix: Tensor) -> Tensor:
    """Compute U Vᵀ over the triples above the cut: the partial isometry nearest to [m, n]; 0 for 0. float64.

    For a matrix of full rank it is the orthogonal factor. For lower rank the null space stays zero, which the U Vᵀ of a
    full decomposition fills with an arbitrary basis.
    """
    found = svd(matrix)
    return found.u @ found.vt
