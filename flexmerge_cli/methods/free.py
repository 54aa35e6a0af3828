"""FREE-Merging: the FR backbone and, per task, a sparse expert: its largest changes times a factor.

Expert i is μ_i · τ_i on the top set of |τ_i|, for every tensor, vectors included. μ is chosen for the outputs of the
merged model, not for its weights: experts may increase the distance to θ_i. residuals/sparse.py stores them.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.methods import experts
from flexmerge_cli.methods.coded import Coded, coded
from flexmerge_cli.methods.fr import NOISE, Coef, Cutoff, Variant, filtered
from flexmerge_cli.methods.matrices import Matrices, Scale, is_matrix
from flexmerge_cli.methods.method import Fraction, Per, Positive, StatisticScope, Where
from flexmerge_cli.methods.reductions import flat
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.quantise import row_sums
from flexmerge_cli.residuals.sparse import Sparse

Mu = Literal["code", "paper"]


@dataclass(frozen=True, slots=True)
class FreeMagnitudes:
    """Sums over a scope, per task, [k] float64, from which the factors are computed."""

    kept: np.ndarray
    """Σ|τ| over the top sets."""
    num_kept: np.ndarray
    """The number of elements in the top sets."""
    whole: np.ndarray
    """Σ|τ| over all elements."""
    passed: np.ndarray
    """Σ|G(τ)|, where G is the filter of `fr`, which leaves tensors that are not matrices unchanged."""
    num_elements: np.ndarray

    def take(self, tasks: list[int]) -> "FreeMagnitudes":
        fields = (self.kept, self.num_kept, self.whole, self.passed, self.num_elements)
        return FreeMagnitudes(*(values[tasks] for values in fields))


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeExpert:
    """Computes a task's expert from its task vector. A Statistic whose calls see whole tensors, [R, numel]."""

    top: Sparse
    mu: Mu | float
    scope: StatisticScope
    """The scope over which the means for the factor are taken."""
    replaces: bool
    """True: the top set becomes the base plus the expert, whatever the centre holds. False: the expert is added."""
    variant: Variant
    cutoff: float | None
    matrices: Matrices
    per: Per = "task"

    def measure(self, deltas: Tensor, where: Where) -> FreeMagnitudes:
        """Measure the contribution of one tensor."""
        sums = np.array([self._sums(delta.reshape(1, *where.shape), where) for delta in deltas]).T
        kept, num_kept, whole, passed = sums
        return FreeMagnitudes(kept, num_kept, whole, passed, np.full(len(deltas), float(deltas.shape[1])))

    def _sums(self, delta: Tensor, where: Where) -> list[float]:
        """Compute the fields of Magnitudes, in order, for one task. [1, *shape]; one task at a time to save memory."""
        size = flat(delta.double().abs())
        keep = self._keep(delta[0]).reshape(1, -1)
        found = [row_sums(size * keep), keep.sum(1), row_sums(size)]
        if is_matrix(where.tensor, where.shape, self.matrices):
            size = flat(filtered(delta.flatten(2), self.variant, self.cutoff).abs_())
        return [float(value) for value in (*found, row_sums(size))]

    def workspace(self, _num_tasks: int, shape: tuple[int, ...]) -> int:
        """Return the bytes that `measure` takes on a tensor: sizes, top set and spectrum of one task."""
        matrix = MatrixView.LAST_AXIS.matrix(shape)
        return 100 * math.prod(shape) + self.top.workspace(matrix)

    def combine(self, left: FreeMagnitudes, right: FreeMagnitudes) -> FreeMagnitudes:
        return FreeMagnitudes(
            left.kept + right.kept,
            left.num_kept + right.num_kept,
            left.whole + right.whole,
            left.passed + right.passed,
            left.num_elements + right.num_elements,
        )

    def finish(self, total: FreeMagnitudes) -> FreeMagnitudes:
        return total

    def factors(self, group: FreeMagnitudes) -> np.ndarray:
        """Compute μ of the tasks of a group, [k] float64. 0/0 is 0."""
        if isinstance(self.mu, float):
            return np.full(len(group.kept), self.mu)
        kept = _ratio(group.kept, group.num_kept)
        if self.mu == "code":
            passed = np.where(group.passed > NOISE * group.whole, group.passed, 0.0)
            return -math.log10(self.top.density) * _ratio(kept, _ratio(passed, group.num_elements))
        mean = _ratio(group.whole, group.num_elements)
        share = _ratio(mean, np.full_like(mean, mean.sum()))
        return -math.log(self.top.density) * _ratio(kept, share * mean)

    def residual(self, delta: Tensor, base: Tensor, centre: Tensor, factor: float) -> Tensor:
        """Compute the residual that decodes on the stored centre: float32 [*shape], 0 off the top set. Arguments are
        float32 [*shape]."""
        expert = (delta.double() * factor).float()
        value = (base + expert) - centre if self.replaces else expert
        return torch.where(self._keep(delta), value, 0.0)

    def _keep(self, delta: Tensor) -> Tensor:
        """Find the top set, bool [*shape]."""
        return self.top.keep(delta.reshape(MatrixView.LAST_AXIS.matrix(tuple(delta.shape)))).reshape(delta.shape)


@coded(paper="Zheng & Wang 2025", when="one merged model, and one percent of every task's own changes")
def free(
    *,
    density: Fraction = 0.01,
    select: Literal["tensor", "row"] = "tensor",
    mu: Positive | Mu = "code",
    mu_scope: Literal["block", "tensor", "model"] = "block",
    combine: Literal["add", "replace"] = "add",
    variant: Variant = "code",
    cutoff: Cutoff | None = None,
    coef: Coef = "eq3",
    scope: Literal["block", "tensor", "model"] = "block",
    others: Literal["coef", "mean", "base"] | None = None,
    scale: Scale | None = None,
    matrices: Matrices = "linear",
) -> Coded:
    """Store the `fr` merge and, per task, its largest changes times a factor.

    density: the fraction of a tensor's elements in an expert, at least one; select=row applies it to every run of the
    last axis, and may keep none. mu: the factor, a number or the rule of code or paper. With K the mean magnitude kept
    and all means over mu_scope, code is -log10(density) · K / mean |G(τ)|, and paper -ln(density) · K / (λ · mean |τ|)
    with λ the task's share of all magnitudes, about 2.3 times the number of tasks as large. combine: add, as in the
    paper's algorithm, or replace, as in its code. All other arguments are those of `fr`, which makes the centre;
    coef=align is the code's: on eight small vision models (docs/methods.md) it has 43.9 % accuracy, where the default
    has 88.3 %.
    Source: Zhengsh123/FREE-Merging.
    """
    from flexmerge_cli.methods.registry import format_call  # The registry imports this module.

    backbone = {"variant": variant, "cutoff": cutoff, "coef": coef, "scope": scope, "others": others, "scale": scale}
    declared: Coded = replace(
        experts.free.function(density=density, select=select),
        centre=format_call("fr", {**backbone, "matrices": matrices}),
        expert=FreeExpert(
            top=Sparse(density=density, select=select),
            mu=mu,
            scope=mu_scope,
            replaces=combine == "replace",
            variant=variant,
            cutoff=cutoff,
            matrices=matrices,
        ),
    )
    return declared


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found
