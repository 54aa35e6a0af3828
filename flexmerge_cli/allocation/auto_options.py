"""`auto:min_bits=…,max_bits=…,centres=…`: what the search may choose."""

from typing import Annotated, get_args

from flexmerge_cli.allocation.auto_centres import Kind
from flexmerge_cli.allocation.auto_table import Limits
from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.method import Call, Range, method
from flexmerge_cli.methods.registry import make_call, split_call

KINDS: tuple[Kind, ...] = get_args(Kind)


def _check(*, min_bits: int, max_bits: int, centres: str) -> None:
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
) -> Limits:
    """Per tensor a centre and per task a residual, a coded copy or an exact one, chosen for a size from the plan alone.

    min_bits, max_bits: of residuals and coded copies; exact copies are always allowed, and 0 bits in embedding tables
    alone. centres: all, or some of none, base, average, joined by `+`. Without a size: the smallest bundle whose
    predicted distance stays under --max-distance, or 0.35.
    """
    kinds = KINDS if "all" in centres.split("+") else tuple(kind for kind in KINDS if kind in centres.split("+"))
    return Limits(min_bits=min_bits, max_bits=max_bits, centres=kinds)


def auto_call(text: str) -> Call | None:
    """`auto` with all its arguments; None if the text is of another method. Raises UsageError."""
    name, args = split_call(text)
    return make_call(auto, args) if name == "auto" else None


def parse_auto(text: str) -> Limits | None:
    """The same as what it allows."""
    call = auto_call(text)
    return None if call is None else auto.function(**call.args)
