"""Describes methods that native.c merges in one pass through memory, with the bits of the methods' own functions."""

from dataclasses import dataclass
from typing import Literal

from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.emr import emr
from flexmerge_cli.methods.linear import average, task_arithmetic
from flexmerge_cli.methods.selection import Kept
from flexmerge_cli.methods.ties import ties

HOW = ("mean", "sum", "max", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePass:
    """What `flexmerge_merge` computes in float64: scale · Σ τ / divisor, or scale times what agrees in sign."""

    how: Literal["mean", "sum", "max", "linear"] = "linear"
    divisor: float = 1.0
    scale: float
    kept: Kept | None = None
    """The elements of each task that count; None for all."""

    @property
    def number(self) -> int:
        """The number of `how` in native.c."""
        return HOW.index(self.how)


def one_pass(call: Call, num_tasks: int, stats: Kept | None) -> OnePass | None:
    """Return how native.c computes a method for some tasks; None if it cannot. stats: the method's finished
    statistics."""
    args = call.args
    if call.method is average:
        return OnePass(divisor=num_tasks, scale=1.0)
    if call.method is task_arithmetic:
        scale = args.get("scale")
        if args.get("form", "mean") == "sum":
            return OnePass(scale=0.3 if scale is None else scale)
        return OnePass(divisor=num_tasks, scale=1.5 if scale is None else scale)
    if call.method is ties:
        return OnePass(how=args["merge"], scale=args["scale"], kept=stats)
    return None


def elects(call: Call) -> bool:
    """Return whether a method's unified delta and masks are those of `flexmerge_elect`."""
    return call.method is emr
