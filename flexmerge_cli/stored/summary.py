"""Describes what a group of tasks stores of a tensor under a method: in words, and as a formula of bytes. No weights.

    k   tasks of the group
    n   elements of the tensor, m rows of c
    s   bytes of an element

⌈ ⌉ and ⌊ ⌋ round up and down. A name after a comma is defined there. `≈` marks the positions of sparse values, whose
exact bytes residuals/elias_fano.py gives. The base counts in full, though a bundle has it once for all groups of a
tensor.
"""

from dataclasses import dataclass

from flexmerge_cli.methods.coded import Coded, Vectors
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.coder import Coder
from flexmerge_cli.residuals.low_bit import LowBit, weight_code
from flexmerge_cli.residuals.low_rank import LowRank
from flexmerge_cli.residuals.sign_runs import SignRuns
from flexmerge_cli.residuals.sparse import Sparse


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a group stores of one tensor."""

    parts: str
    num_bytes: str


VECTORS = {
    Vectors.COPIES: "; tensors of one axis are copies",
    Vectors.BYTES: "; tensors of one axis take 8 bits on 8 bits",
    Vectors.CODED: "",
}


def residual_summary(coded: Coded) -> Summary:
    residual = _coder(coded.coder(2))
    centre = _centre(coded)
    found = f"k·({residual.num_bytes.replace(',', '),', 1)}" + ("" if "," in residual.num_bytes else ")")
    return Summary(
        parts=f"{centre.parts}; per task {residual.parts}{VECTORS[coded.vectors]}",
        num_bytes=f"{centre.num_bytes} + {found}" if centre.num_bytes else found,
    )


def _centre(coded: Coded) -> Summary:
    if coded.centre == "none":
        return Summary(parts="no centre", num_bytes="")
    if coded.centre_bits != "dense":
        code = _coder(weight_code(coded.centre_bits))
        return Summary(parts=f"centre in {coded.centre_bits} bits", num_bytes=code.num_bytes)
    return Summary(parts="the base" if coded.centre == "base" else "dense centre", num_bytes="s·n")


def _coder(coder: Coder) -> Summary:
    """Return the bytes of one array of m rows of c."""
    match coder:
        case LowBit():
            scale = 2 if coder.scales == "bfloat16" else 4
            levels = f" + {4 << coder.bits}" if coder.has_levels else ""
            codes = {1: "m·⌈c/8⌉", 8: "n"}.get(coder.bits, f"m·⌈{coder.bits}·c/8⌉")
            parts = f"{coder.bits} {'bit' if coder.bits == 1 else 'bits'} an element and a scale a row"
            return Summary(
                parts=parts + (", and levels" if coder.has_levels else ""), num_bytes=f"{scale}·m{levels} + {codes}"
            )
        case SignRuns():
            return Summary(
                parts=f"one of {2 * coder.run} patterns of signs for {coder.run} elements and a scale a row",
                num_bytes=f"2·m + m·⌈{coder.code_bits}·⌈c/{coder.run}⌉/8⌉",
            )
        case BitDelta():
            by_row = coder.scope == "row"
            parts = f"signs and a scale {'a row' if by_row else 'a tensor'}"
            return Summary(parts=parts, num_bytes=f"{'4·m' if by_row else '4'} + m·⌈c/8⌉")
        case LowRank():
            rank = "⌊min(m, c)/k⌋" if coder.shared_by else str(coder.rank or f"⌊{coder.fraction:g}·min(m, c)⌋")
            return Summary(parts="two factors of rank r", num_bytes=f"s·r·(m + c), r = {rank}")
        case Sparse():
            count = f"m·⌊{coder.density:g}·c⌋" if coder.select == "row" else f"⌊{coder.density:g}·n⌋"
            return Summary(
                parts="z values and where they are", num_bytes=f"s·z + p, z = {count}, p ≈ z·(2 + log2(n/z))/8"
            )
    raise TypeError(f"{coder} is not described")
