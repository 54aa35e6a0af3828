"""Defines steps, which change the task vectors before a method, and calibrations, which change the merged one.

    @step(paper="Yu et al. 2024", scope="element")
    def dare(deltas: Tensor, where: Where, *, p: Rate = 0.9, seed: Seed = 0) -> Tensor: ...

Both are pure functions with keyword arguments, declared and written like methods (method.py). Steps see all tasks of
the family, whatever the groups, and their values are rounded to float32. Scopes and shapes of deltas are those of
method.py without `block`. Statistics of a step or method are measured on the deltas that the steps before it return.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.method import (
    UNTOLD,
    Call,
    Method,
    Parameter,
    Scope,
    Statistic,
    Where,
    Workspace,
    nothing,
    nowhere,
    parameters_of,
    takes,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The function: deltas -> deltas of the same shape."""

    name: str
    function: Callable[..., "Tensor"]
    paper: str
    scope: Scope | Callable[..., Scope]
    elementwise: Callable[..., bool]
    """As for methods (method.py)."""
    statistics: Callable[..., Statistic | None]
    """The first pass, per task, since a step knows no groups."""
    workspace: Workspace
    """As for methods (method.py)."""
    check: Callable[..., None]
    parameters: dict[str, Parameter]
    wants_where: bool
    wants_stats: bool

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCall:
    """A step with all its arguments. Calls with the same text are equal."""

    step: Step = field(compare=False)
    args: Mapping[str, Any] = field(compare=False)
    text: str
    """`NAME:key=value,…` with every argument, defaults included."""
    short: str = field(compare=False)
    """The same text without arguments that have their default values."""

    def __reduce__(self) -> tuple[Any, ...]:
        from flexmerge_cli.methods.registry import parse_step

        return parse_step, (self.text,)

    @property
    def scope(self) -> Scope:
        scope = self.step.scope
        return scope(**self.args) if callable(scope) else scope

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        """The scope for this tensor. A filter of matrices leaves the others alone."""
        return "element" if self.step.elementwise(tensor, shape, **self.args) else self.scope

    def workspace(self, num_tasks: int, shape: tuple[int, ...]) -> int:
        """Bytes that one call on this shape takes, beside its deltas."""
        return self.step.workspace(num_tasks, shape, **self.args)

    @property
    def statistics(self) -> Statistic | None:
        return self.step.statistics(**self.args)

    def __call__(self, deltas: "Tensor", where: Where, stats: Any = None) -> "Tensor":
        """Apply the step: float32 in, float32 out."""
        extra: dict[str, Any] = {"where": where} if self.step.wants_where else {}
        extra |= {"stats": stats} if self.step.wants_stats else {}
        return self.step.function(deltas, **extra, **self.args).to(deltas.dtype)


def step(
    *,
    paper: str,
    scope: Scope | Callable[..., Scope],
    name: str = "",
    elementwise: Callable[..., bool] = nowhere,
    statistics: Callable[..., Statistic | None] = nothing,
    workspace: Workspace = UNTOLD,
    check: Callable[..., None] = nothing,
) -> Callable[[Callable[..., "Tensor"]], Step]:
    """Make a Step of a function; its name is the function's, or the one given where a method has that name too."""

    def wrap(function: Callable[..., "Tensor"]) -> Step:
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
class Calibration:
    """The function: (merged [*shape] float64, task vectors before any step [k, *shape] float32) -> merged."""

    name: str
    function: Callable[..., "Tensor"]
    paper: str
    elementwise: Callable[..., bool]
    """(name, shape, arguments) -> whether it leaves this tensor unchanged. It takes other tensors whole."""
    workspace: Workspace
    """Bytes that it takes on a tensor that it changes."""
    refuse: Callable[[Method], str | None]
    """Why it cannot follow a method; None if it can."""
    parameters: dict[str, Parameter]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCall:
    """A calibration with all its arguments. Calls with the same text are equal."""

    calibration: Calibration = field(compare=False)
    args: Mapping[str, Any] = field(compare=False)
    text: str
    """`NAME:key=value,…` with every argument, defaults included."""
    short: str = field(compare=False)
    """The same text without arguments that have their default values."""

    def __reduce__(self) -> tuple[Any, ...]:
        from flexmerge_cli.methods.registry import parse_calibrate

        return parse_calibrate, (self.text,)

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        return "element" if self.calibration.elementwise(tensor, shape, **self.args) else "tensor"

    def workspace(self, num_tasks: int, shape: tuple[int, ...]) -> int:
        """Bytes that one call on a whole tensor of this shape takes."""
        return self.calibration.workspace(num_tasks, shape, **self.args)

    def require_after(self, call: Call) -> None:
        """Raise UsageError if it cannot follow this method."""
        reason = self.calibration.refuse(call.method)
        if reason:
            raise UsageError(
                f"`{self.calibration.name}` cannot follow `{call.method.name}`: {reason}",
                hint="leave out --calibrate, or use another method",
            )

    def __call__(self, merged: "Tensor", unstepped: "Tensor", where: Where) -> "Tensor":
        if self.calibration.elementwise(where.tensor, where.shape, **self.args):
            return merged
        return self.calibration.function(merged, unstepped, **self.args)


def calibration(
    *,
    paper: str,
    elementwise: Callable[..., bool] = nowhere,
    workspace: Workspace = UNTOLD,
    refuse: Callable[[Method], str | None],
) -> Callable[[Callable[..., "Tensor"]], Calibration]:
    """Make a Calibration of a function; its name is the function's."""

    def wrap(function: Callable[..., "Tensor"]) -> Calibration:
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
