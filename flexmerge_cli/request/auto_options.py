"""Defines `auto:min_bits=…,max_bits=…,centres=…`: what the search of `auto` may choose."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.method import Range, method
from flexmerge_cli.methods.registry import make_call, split_call

Kind = Literal["none", "base", "average"]
"""What residuals are taken against: nothing, the base, or the average of a group."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a search may choose. Exact copies are always allowed, and the only choice for tensors that no task
    changed."""

    min_bits: int = 0
    """The fewest bits of a residual or coded copy, in [0, 8]; 0 allows residuals of less than one bit per element, and
    in embedding tables, but nowhere else, none at all."""
    max_bits: int = 8
    """The most bits of a residual or coded copy, in [1, 8]."""
    centres: tuple[Kind, ...] = KINDS
    """The kinds of centres. A tensor for which none is possible, such as an average of a single task, has no centre."""
    scales: Literal["bfloat16", "byte"] = "byte"
    """How the scales of rows are stored for residuals of up to 2 bits."""

    def allows(self, bits: float) -> bool:
        return self.min_bits <= bits <= self.max_bits


def _check(*, min_bits: int, max_bits: int, centres: str, scales: str) -> None:
    if min_bits > max_bits:
        raise UsageError(f"`auto`: min_bits={min_bits} is more than max_bits={max_bits}", hint="swap them")
    unknown = [word for word in centres.split("+") if word not in ("all", *KINDS)]
    if unknown:
        raise UsageError(
            f"`auto`: centres={centres}: no `{unknown[0]}`", hint=f"all, or some of {', '.join(KINDS)} joined by +"
        )


@method(
    paper="own construction",
    scope="element",
    check=_check,
    when="the least predicted damage for a number of bytes, without knowing methods",
)
def auto(
    *,
    min_bits: Annotated[int, Range(least=0, most=8)] = 0,
    max_bits: Annotated[int, Range(least=1, most=8)] = 8,
    centres: str = "all",
    scales: Literal["bfloat16", "byte"] = "byte",
) -> Limits:
    """Choose per tensor a centre, and per task a residual, a coded or an exact copy, for a size, from the plan alone.

    min_bits, max_bits: of residuals and coded copies; exact copies are always allowed, and min_bits=0 allows residuals
    of less than one bit, and in embedding tables none. centres: all, or some of none, base, average, joined by `+`.
    scales: of the rows of residuals of up to 2 bits.
    Without a size: the smallest bundle whose predicted distance stays under --max-distance, or 0.35.
    """
    kinds = KINDS if "all" in centres.split("+") else tuple(kind for kind in KINDS if kind in centres.split("+"))
    return Limits(min_bits=min_bits, max_bits=max_bits, centres=kinds, scales=scales)


def parse_auto(text: str) -> tuple[str, Limits] | None:
    """Parse `auto` to its text without default arguments and to what it allows; None for another method.

    Raises UsageError.
    """
    name, args = split_call(text)
    if name != "auto":
        return None
    call = make_call(auto, args)
    limits: Limits = auto.function(**call.args)
    return call.short, limits
