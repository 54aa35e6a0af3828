"""Defines steps, which change the task vectors before a method, and calibrations, which change the merged one.

    @step(paper="Yu et al. 2024", scope="element")
    def dare(deltas: Tensor, where: Where, *, p: Rate = 0.9, seed: Seed = 0) -> Tensor: ...

Both are pure functions with keyword arguments, declared and written like methods (method.py). Steps see all tasks of
the family, whatever the groups, and their values are rounded to float32. Scopes and shapes of deltas are those of
method.py without `block`. Statistics of a step or method are measured on the deltas that the steps before it return.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor
from flexmerge_cli.methods.call import Call, Invocation, ScopedInvocation
from flexmerge_cli.methods.method import (
    UNDECLARED,
    Declared,
    Method,
    Scope,
    Scoped,
    Statistic,
    Where,
    Workspace,
    nothing,
    nowhere,
    parameters_of,
    takes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Scoped):
    """A function that maps deltas to deltas of the same shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCall(ScopedInvocation):
    """A step with all its arguments."""

    step: Step = field(compare=False)

    @property
    def declared(self) -> Step:
        return self.step

    def __reduce__(self) -> tuple[Any, ...]:
        from flexmerge_cli.methods.registry import parse_step

        return parse_step, (self.text,)

    def __call__(self, deltas: Tensor, where: Where, stats: Any = None) -> Tensor:
        """Apply the step: float32 in, float32 out."""
        extra: dict[str, Any] = {"where": where} if self.step.wants_where else {}
        extra |= {"stats": stats} if self.step.wants_stats else {}
        changed: Tensor = self.step.function(deltas, **extra, **self.args)
        return changed.to(deltas.dtype)


def step(
    *,
    paper: str,
    scope: Scope | Callable[..., Scope],
    name: str = "",
    elementwise: Callable[..., bool] = nowhere,
    statistics: Callable[..., Statistic | None] = nothing,
    workspace: Workspace = UNDECLARED,
    check: Callable[..., None] = nothing,
) -> Callable[[Callable[..., Tensor]], Step]:
    """Make a Step of a function; its name is the function's, or the given one where a method has that name too."""

    def wrap(function: Callable[..., Tensor]) -> Step:
        return Step(
            name=name or function.__name__,
            function=function,
            paper=paper,
            scope=scope,
            elementwise=elementwise,
            statistics=statistics,
            workspace=workspace,
            check=check,
            parameters=parameters_of(function),
            wants_where=takes(function, "where"),
            wants_stats=takes(function, "stats"),
        )

    return wrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(Declared):
    """A function that maps (merged [*shape] float64, task vectors before any step [k, *shape] float32) to merged.

    It leaves tensors that are `elementwise` unchanged and takes others whole.
    """

    refuse: Callable[[Method], str | None]
    """Says why it cannot follow a method; None if it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCall(Invocation):
    """A calibration with all its arguments."""

    calibration: Calibration = field(compare=False)

    @property
    def declared(self) -> Calibration:
        return self.calibration

    def __reduce__(self) -> tuple[Any, ...]:
        from flexmerge_cli.methods.registry import parse_calibrate

        return parse_calibrate, (self.text,)

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        return "element" if self.calibration.elementwise(tensor, shape, **self.args) else "tensor"

    def require_after(self, call: Call) -> None:
        """Raise UsageError if it cannot follow this method."""
        reason = self.calibration.refuse(call.method)
        if reason:
            raise UsageError(
                f"`{self.calibration.name}` cannot follow `{call.method.name}`: {reason}",
                hint="leave out --calibrate, or use another method",
            )

    def __call__(self, merged: Tensor, unstepped: Tensor, where: Where) -> Tensor:
        if self.calibration.elementwise(where.tensor, where.shape, **self.args):
            return merged
        changed: Tensor = self.calibration.function(merged, unstepped, **self.args)
        return changed


def calibration(
    *,
    paper: str,
    elementwise: Callable[..., bool] = nowhere,
    workspace: Workspace = UNDECLARED,
    refuse: Callable[[Method], str | None],
) -> Callable[[Callable[..., Tensor]], Calibration]:
    """Make a Calibration of a function; its name is the function's."""

    def wrap(function: Callable[..., Tensor]) -> Calibration:
        return Calibration(
            name=function.__name__,
            function=function,
            paper=paper,
            elementwise=elementwise,
            workspace=workspace,
            refuse=refuse,
            parameters=parameters_of(function),
        )

    return wrap
