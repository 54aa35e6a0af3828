"""Declares the methods that store a centre per group and a few bits per task: centre, coder, and what is copied.

    @coded(paper="…", when="…")
    def low_bit(*, bits: Bits = 2, centre: str = "average", …) -> Coded: ...

A declaration maps keyword arguments to a Coded, without weights. The arithmetic is in residuals/.
θ̂_k = centre + decode(residual_k), with residual_k = θ_k - centre in float32, against the centre as it is stored.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, promote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.matrices import is_matrix
from flexmerge_cli.methods.method import Fraction, Method, Range, method
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.coder import Coder, Matrix, MatrixView, num_bytes
from flexmerge_cli.residuals.low_bit import LowBit, weight_code
from flexmerge_cli.residuals.low_rank import LowRank
from flexmerge_cli.residuals.scales import Scales
from flexmerge_cli.residuals.sign_runs import RUNS, SignRuns, residual_code
from flexmerge_cli.residuals.sparse import Sparse

if TYPE_CHECKING:
    import numpy as np

CENTRE_BITS = (2, 3, 4, 8)

Bits = Annotated[int, Range(least=1, most=8)]
CentreBits = Annotated[int, Range(least=2, most=8)] | Literal["dense"]
Rank = Annotated[int, Range(least=1)]


class Vectors(StrEnum):
    """How to store tensors that are one row by nature: biases, norms, scalars."""

    COPIES = "copies"
    """Exact copies without a centre: they are far below 1 % of a model, and do not compress."""
    BYTES = "bytes"
    """8 bits on an 8-bit centre."""
    CODED = "coded"
    """Like every other tensor."""


class Expert(Protocol):
    """Makes residuals other than θ_k - centre, from the task vectors (methods/free.py)."""

    def factors(self, group: Any) -> "np.ndarray":
        """Compute one number per task of a group, from its finished statistic: [k]."""

    def residual(self, delta: Tensor, base: Tensor, centre: Tensor, factor: float) -> Tensor:
        """Compute the residual of one task. All arrays are float32 [*shape]; centre is as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedForm:
    """How one tensor of one group is stored."""

    matrix: Matrix
    """The shape (m, n) in which every coder here sees the tensor."""
    residual: Coder | None
    """The coder of each task's residual. None: exact copies of all tasks, and no centre."""
    centre: Coder | None
    """The coder of the centre. None: the centre is dense, or there is none."""
    is_centre: bool = False
    """Whether every task reads the centre alone; `residual` is then None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A coded method with its arguments: what a group stores, from shapes and dtypes alone."""

    centre: str
    """`NAME:key=value` of a method that makes one dense value; `base`; or `none`: each task's own weights are coded."""
    centre_bits: int | Literal["dense"] = "dense"
    coder: Callable[[int], Coder]
    """The coder of the residuals, as a function of the number of tasks in the group."""
    scales: Literal["bfloat16", "byte"] = "bfloat16"
    """How scales are stored for residuals of up to 2 bits, if each task has a number of bits of its own."""
    view: MatrixView = MatrixView.FIRST_AXIS
    vectors: Vectors = Vectors.COPIES
    expert: Expert | None = None
    """Makes the residuals, and is itself a Statistic. None: they are θ_k - centre."""
    top: int | None = None
    """The number of residuals that a gate adds to the centre for an input: those of all tasks of a group are experts,
    which each of them reads. None: a task's own residual is added, whatever the input."""

    def form(self, tensor: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> CodedForm:
        """Choose the form of a tensor in a group whose tasks have these dtypes, one each. tensor: its aligned name.

        Copies are chosen where they are no larger than centre and residuals. The base costs nothing here: whether it is
        stored anyway depends on other groups, and this rule must not.
        """
        matrix = self.view.matrix(shape)
        copies = CodedForm(matrix=matrix, residual=None, centre=None)
        coder, centre_bits = self.coder(len(dtypes)), self.centre_bits
        if isinstance(coder, SignRuns):
            coder = coder.of_rows(matrix[0])
        if self.view.is_vector(shape) and self.vectors is not Vectors.CODED:
            if self.vectors is Vectors.COPIES:
                return copies
            coder, centre_bits = weight_code(8), 8
        centre = None if centre_bits == "dense" else weight_code(centre_bits)
        form = CodedForm(matrix=matrix, residual=coder, centre=centre)
        if self.top is not None and not has_gate(tensor, shape):
            form = CodedForm(matrix=matrix, residual=None, centre=None, is_centre=True)
        copies_bytes = math.prod(shape) * sum(ITEM_BYTES[dtype] for dtype in dtypes)
        return copies if copies_bytes <= self.centre_bytes(form, dtypes) + residual_bytes(form, dtypes) else form

    def form_of_bits(self, shape: tuple[int, ...], bits: float) -> CodedForm:
        """Return the form of a tensor for a task with its own number of bits, as in `auto`; vectors are coded, too.

        bits: 0 stores nothing beside the centre, and then `residual` is None. Less than 1 is possible only beside a
        centre.
        """
        matrix, code = MatrixView.SQUEEZED.matrix(shape), None
        if bits:
            is_copy = self.centre == "none"
            code = weight_code(int(bits)) if is_copy else residual_code(bits, self.scales, matrix[0])
        return CodedForm(
            matrix=matrix,
            residual=code,
            centre=None if self.centre == "none" or self.centre_bits == "dense" else weight_code(self.centre_bits),
        )

    def centre_call(self) -> Call | None:
        """Return the method that makes the centre; None if the centre is the base, or there is none."""
        return None if self.centre in ("base", "none") else _centre_call(self.centre)

    def centre_bytes(self, form: CodedForm, dtypes: tuple[str, ...]) -> int:
        """Return the bytes of one group's centre; 0 for the base, which all groups share, and if there is no centre."""
        if (form.residual is None and not form.is_centre) or self.centre in ("base", "none"):
            return 0
        dtype = promote(dtypes)
        dense = math.prod(form.matrix) * ITEM_BYTES[dtype]
        return dense if form.centre is None else num_bytes(form.centre.parts(form.matrix, dtype))


def residual_bytes(form: CodedForm, dtypes: tuple[str, ...]) -> int:
    """Return the bytes of the residuals of all tasks of a group; 0 if they are copies."""
    if form.residual is None:
        return 0
    counted = Counter(dtypes).items()
    return sum(count * num_bytes(form.residual.parts(form.matrix, dtype)) for dtype, count in counted)


def has_gate(tensor: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is, by its aligned name, the whole weight of a linear layer, which can have experts."""
    return tensor.endswith("weight") and is_matrix(tensor, shape, "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedMethod(Method):
    """A Method whose function takes arguments alone and returns a Coded; it is never called with deltas."""


@functools.lru_cache(maxsize=1024)
def _centre_call(text: str) -> Call:
    """Parse the centre's method, once, because a plan asks for it for every tensor and group."""
    from flexmerge_cli.methods.registry import parse_call  # it imports this module, and torch

    return parse_call(text)


@functools.lru_cache(maxsize=1024)
def declare(call: Call) -> Coded | None:
    """Return what a call of a coded method stores; None for other methods. Raises UsageError."""
    return call.method.function(**call.args) if isinstance(call.method, CodedMethod) else None


def coded(*, paper: str, when: str, form: str = "residual") -> Callable[[Callable[..., Coded]], CodedMethod]:
    """Make a CodedMethod of a declaration. Its name is the function's, its scope that of the coder for two tasks."""

    def wrap(function: Callable[..., Coded]) -> CodedMethod:
        def scope(**args: Any) -> Literal["row", "tensor"]:
            return function(**args).coder(2).scope

        def check(**args: Any) -> None:
            check_centre(function(**args), function.__name__)

        plain = method(paper=paper, scope=scope, form=form, check=check, when=when)(function)
        return CodedMethod(**{field.name: getattr(plain, field.name) for field in fields(plain)})

    return wrap


def check_centre(declared: Coded, name: str) -> None:
    """Raise UsageError unless `centre=` is `base`, for `low_bit` also `none`, or a method with one dense value per
    group."""
    if declared.centre == "none" and name != "low_bit":
        raise UsageError(
            f"`{name}`: centre=none leaves nothing to take residuals against", hint="use `base` or `average`"
        )
    if declared.centre == "average":  # the usual one, which is known without importing torch
        return
    call = declared.centre_call()
    if call is not None and not call.method.gives_one_model:
        raise UsageError(
            f"`{name}`: centre={declared.centre!r} stores more than one dense value",
            hint="use `base`, `average`, or another method that merges a group into one model",
        )


def _check_centre_bits(name: str, centre_bits: int | str) -> None:
    if centre_bits != "dense" and centre_bits not in CENTRE_BITS:
        raise UsageError(f"`{name}`: centre_bits={centre_bits} is not one of 2, 3, 4, 8, dense")


@coded(paper="Liu et al. 2024", when="many fine-tunes close to one base; a model is its base and one bit an element")
def bitdelta(
    *,
    scale: Literal["tensor", "row"] = "tensor",
    gain: Literal["none", "norm"] = "none",
    centre: str = "base",
) -> Coded:
    """Store the sign of every element of the residual, and its mean magnitude.

    scale: one per tensor, as in the authors' code, or one per row. gain: norm uses the root mean square of each row.
    This is the authors' method without its distillation, which needs data.
    """
    coder = BitDelta(scale=scale, gain=gain)
    return Coded(centre=centre, coder=lambda num_tasks: coder)


@coded(paper="own construction", when="a near-exact bundle at a fraction of the size")
def low_bit(
    *,
    bits: Bits = 2,
    levels: Literal["gauss", "empirical"] = "gauss",
    gain: Literal["none", "norm", "long"] = "none",
    centre: str = "average",
    centre_bits: CentreBits = "dense",
    scales: Scales = "float32",
    clip: Literal["none", "search"] = "none",
) -> Coded:
    """Store residuals in 1 to 8 bits per element, with one scale per row, on a dense centre, a coded one, or none.

    levels: up to 3 bits, the levels of a normal distribution, or levels fitted to each tensor. gain: norm keeps the
    length of each row, long is for 1 and 2 bits and makes it longer. centre: base, none, or a merging method.
    centre_bits: 2, 3, 4, 8 or dense; coded centres have bfloat16 scales and at 4 bits a clip search, and vectors have 8
    bits on 8 bits. scales: byte is for 1 and 2 bits, rounding by up to 9 %. clip: search finds the best cut at 4 bits.
    """
    if levels == "empirical" and bits > 3:
        raise UsageError(f"`low_bit`: levels=empirical supports at most 3 bits, not {bits}", hint="use levels=gauss")
    _check_centre_bits("low_bit", centre_bits)
    if centre == "none" and (gain != "none" or centre_bits != "dense"):
        raise UsageError("`low_bit`: gain and centre_bits have no effect with centre=none", hint="leave them out")
    if gain == "long" and bits > 2:
        raise UsageError("`low_bit`: gain=long is for 1 and 2 bits", hint="use gain=none")
    if scales == "byte" and (bits > 2 or centre == "none"):
        raise UsageError("`low_bit`: scales=byte is for residuals of 1 and 2 bits", hint="use scales=bfloat16")
    coder = LowBit(bits=bits, levels=levels, gain=gain, scales=scales, clip=clip)
    # Where `auto` could store the same, use its view, so that a uniform plan and one of `auto` have the same bytes.
    of_auto = centre == "none" or centre_bits != "dense"
    return Coded(
        centre=centre,
        centre_bits=centre_bits,
        coder=lambda num_tasks: coder,
        scales="byte" if scales == "byte" else "bfloat16",
        view=MatrixView.SQUEEZED if of_auto else MatrixView.FIRST_AXIS,
        vectors=Vectors.COPIES if centre_bits == "dense" else Vectors.BYTES,
    )


@coded(paper="own construction; patterns by Muller 1954", when="dozens of tasks, in less than one bit per element each")
def sign_runs(
    *,
    run: Annotated[int, Range(least=4, most=32)] = 8,
    centre: str = "average",
    centre_bits: CentreBits = "dense",
    scales: Literal["bfloat16", "byte"] = "bfloat16",
) -> Coded:
    """Store the signs of each run of elements as one of 2·run patterns: (log2(run) + 1)/run bits an element.

    run: elements of a run; 4, 8, 16 and 32 take 0.75, 0.5, 0.3125 and 0.1875 bits an element. centre: base or
    a merging method; centre_bits: 2, 3, 4, 8 or dense. Vectors are exact copies on a dense centre, and have 8 bits on 8
    bits on a coded one. scales: a byte rounds by up to 9 %, and codes of eight rows are then packed together.
    """
    if run not in RUNS.values():
        raise UsageError(f"`sign_runs`: run={run} is not one of 4, 8, 16, 32")
    _check_centre_bits("sign_runs", centre_bits)
    coder = SignRuns(run=run, scales=scales)
    return Coded(
        centre=centre,
        centre_bits=centre_bits,
        coder=lambda num_tasks: coder,
        view=MatrixView.FIRST_AXIS if centre_bits == "dense" else MatrixView.SQUEEZED,
        vectors=Vectors.COPIES if centre_bits == "dense" else Vectors.BYTES,
    )


@coded(paper="Tang et al. 2024 (SMILE, with the task known and centre=base)", when="fine-tunes made with LoRA")
def low_rank(*, rank: Rank | None = None, fraction: Fraction | None = None, centre: str = "average") -> Coded:
    """Store residuals as two thin factors, by truncated singular value decomposition.

    rank: the rank for every matrix, at most its own; fraction: the rank as a fraction of min(m, n), by default 0.125.
    """
    if rank is not None and fraction is not None:
        raise UsageError(f"`low_rank`: rank={rank} and fraction={fraction} are both given", hint="leave one out")
    coder = LowRank(rank=rank, fraction=0.125 if fraction is None else fraction)
    return Coded(centre=centre, coder=lambda num_tasks: coder)


@coded(paper="Tang et al. 2024", when="one body for inputs of any task: layers choose the task", form="mixture")
def smile(*, rank: Rank = 16, top: Rank = 1, centre: str = "base") -> Coded:
    """Store a low-rank expert per task for each linear layer, some of which a gate adds to the centre for each input.

    rank: that of every expert, at most the matrix's own; top: the number of experts that are added. Tensors that are no
    weights of linear layers are the centre's. Which experts are added differs from input to input, so that no exported
    folder can hold the model: `bundle.model`, runtimes, `serve` and `eval` compute it.
    """
    coder = LowRank(rank=rank)
    return Coded(centre=centre, coder=lambda num_tasks: coder, vectors=Vectors.CODED, top=top)


@coded(paper="Gargiulo et al. 2025 (TSV-Compress)", when="two models' worth of matrices, however many tasks")
def tsv_c() -> Coded:
    """Store task vectors as two thin factors on the base, of rank min(m, n) divided by the size of the group.

    The authors divide by the number of all tasks instead, leave convolutions whole, and store U, Σ and V apart.
    """
    return Coded(centre="base", coder=lambda num_tasks: LowRank(shared_by=num_tasks))


@coded(paper="magnitude pruning of task vectors", when="residuals of few large elements")
def sparse(
    *,
    density: Fraction = 0.05,
    rescale: Literal["none", "l1", "l2"] = "none",
    select: Literal["tensor", "row"] = "tensor",
    centre: str = "average",
) -> Coded:
    """Store the largest elements of every residual and their positions.

    density: the fraction kept, at least one element per tensor; with select=row the fraction of every row, which may
    keep none. rescale: a factor that restores a norm of the residual: l2 keeps its length; l1 makes the error larger
    than none does. centre=base,select=row is FusionBench's magnitude pruning of task vectors with prune_ratio =
    1 - density, except that it rounds the number of elements that a row keeps up, not down.
    """
    coder = Sparse(density=density, rescale=rescale, select=select)
    return Coded(centre=centre, coder=lambda num_tasks: coder)
