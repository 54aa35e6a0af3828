"""Defines methods: pure functions of task vectors, their arguments, and what they declare about sizes and memory.

    @method(paper="Ilharco et al. 2023", scope="element")
    def task_arithmetic(deltas: Tensor, *, scale: float = 1.5) -> Tensor: ...

Keyword arguments are the arguments of `NAME:key=value`, with type, range and default. A method sees no files, groups
or devices.

Scopes, and the deltas of a call (float32, k tasks of one group in task order):
    element  [k, n]        any range of a tensor's elements, in C order
    row      [k, r, n]     whole rows: everything under one index of axis 0; a tensor of 0 or 1 axes is one row
    tensor   [k, *shape]   a whole tensor
    block    {name: [k, *shape]}   all mergeable tensors of a block, sorted by name; returns {name: [*shape]}
A method may return float64, which the engine rounds once. call.py gives a method its arguments; step.py
defines the steps before it and the calibrations after it.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor

if TYPE_CHECKING:
    import numpy as np

Scope = Literal["element", "row", "tensor", "block"]
StatisticScope = Literal["tensor", "block", "model"]
Per = Literal["task", "group"]
Reads = Literal["", "inputs", "fisher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """The elements that a call sees."""

    tasks: tuple[str, ...]
    """Names of the tasks, in the order of the deltas' first axis."""
    tensor: str
    """The tensor's name in the base; with scope `block`, the name of the block."""
    start: int
    """Index of the first element in the whole tensor, in C order."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    block: str = ""
    """The name of the block that has the tensor."""


@dataclass(frozen=True, slots=True)
class Centre:
    """The result of a method of form `masked` or `superposed`: a unified delta, and which elements each task takes.

    mask(deltas, unified) -> bool [k, n]: deltas are the group's task vectors before any step, unified [n] is float32
    after rounding to the dtype it is stored in. A mask that was computed from the stepped deltas ignores both.
    """

    delta: Tensor
    mask: Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Statistic(Protocol):
    """One pass over a scope. Exact, of bounded memory, and independent of how the scope is cut into ranges."""

    @property
    def scope(self) -> StatisticScope: ...

    @property
    def per(self) -> Per:
        """`task`: it is measured for every task, once for all groups; `group`: for each group."""

    def measure(self, deltas: Tensor, where: Where) -> Any:
        """Measure the contribution of one range. deltas [R, n] float32: of all tasks of the family or, per group, of
        its tasks.

        Needs at most the method's workspace for TILE_ELEMENTS, or for a whole tensor if that is its scope. A method
        `memory(num_tasks, num_elements)` may give the bytes of the result for a range of that many elements, and of
        the combined results for such a scope, in this pass and the following ones; without it a few numbers per task
        are assumed.
        """

    def combine(self, left: Any, right: Any) -> Any:
        """Combine a range's contribution (right) with all before it, in order of elements, tensors by name."""

    def finish(self, total: Any) -> Any:
        """Return the next pass over the same scope, a Statistic, or the value: per task a PerTask, per group any
        type."""


class PerTask(Protocol):
    """A finished statistic of tasks."""

    def take(self, tasks: list[int]) -> Any:
        """Select the tasks at these places of the family's order."""


Gain = Callable[["np.ndarray", "np.ndarray", "np.ndarray"], "np.ndarray"]
"""Maps (Σ|τ| [k, T], Σ|m u| [k, T], elements [T]), float64, over the T tensors of a block to factors per task [k]."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number, for `Annotated`. None means no bound."""

    above: float | None = None
    least: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = (
            f"({self.above:g}" if self.above is not None else f"[{self.least:g}" if self.least is not None else "(-inf"
        )
        high = f"{self.below:g})" if self.below is not None else f"{self.most:g}]" if self.most is not None else "inf)"
        return f"{low}, {high}"


Workspace = Callable[..., int]
"""Maps (number of tasks, shape of what a call sees, **arguments) to the most bytes that it takes beside its deltas.

Results count, and for a method with a statistic the bytes of measuring such a range. Shapes: [n] for scope
`element`, [r, n] for `row`, otherwise that of a tensor.
"""


def per_element(each_task: float, once: float) -> Workspace:
    """Return a workspace of this many bytes per element and task, plus this many per element."""

    def workspace(num_tasks: int, shape: tuple[int, ...], **_args: Any) -> int:
        return math.ceil((each_task * num_tasks + once) * math.prod(shape))

    return workspace


# For methods that declare no workspace: more than any elementwise method of this package needs.
UNDECLARED = per_element(64, 64)

MAX_SHOWN = 100  # characters of a wrong argument in a message


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a bundle can record: finite, and of at most 63 bits if it is whole."""
    return value.bit_length() < 64 if type(value) is int else type(value) is float and math.isfinite(value)


Fraction = Annotated[float, Range(above=0, most=1)]
Positive = Annotated[float, Range(above=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One keyword argument."""

    name: str
    default: Any
    kinds: tuple[type, ...]
    """The type: float, int, bool, str or dict."""
    choices: tuple[str, ...]
    """The words it accepts."""
    range: Range | None

    def check(self, value: Any, method: str) -> Any:
        """Convert the value to the argument's type. Raises UsageError."""
        if isinstance(value, str) and value in self.choices:
            return value
        for kind in self.kinds:
            number = kind in (int, float) and type(value) in ((int, float) if kind is float else (int,))
            if number and is_number(value) and (self.range is None or self.range.holds(value)):
                return kind(value)
            if kind in (bool, dict, str) and isinstance(value, kind):
                return value
        raise UsageError(
            f"`{method}`: {self.name}={repr(value)[:MAX_SHOWN]} is not {self.wants()}",
            hint=f"flexmerge methods {method}",
        )

    def wants(self) -> str:
        names = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a map {name: number}"}
        numbers = [names[kind] + (f" in {self.range}" if self.range else "") for kind in self.kinds]
        return " or ".join(([f"one of {', '.join(self.choices)}"] if self.choices else []) + numbers)


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a method that is not part of flexmerge."""

    source: str
    """The name of the file, or of the installed distribution."""
    version: str
    """`sha256:` and 64 digits of the file's bytes, or the distribution's version."""
    code: bytes = field(default=b"", repr=False, compare=False)
    """The file's bytes as they were run; empty for a package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What methods, steps and calibrations declare about their function."""

    name: str
    function: Callable[..., Any]
    paper: str
    elementwise: Callable[..., bool]
    """Maps (name, shape, arguments) to whether this tensor may be processed in chunks, as with scope `element`."""
    workspace: Workspace
    parameters: dict[str, Parameter]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoped(Declared):
    """What methods and steps declare, which see deltas of a scope."""

    scope: Scope | Callable[..., Scope]
    """The scope of a call, or a function of the arguments if it depends on them."""
    statistics: Callable[..., Statistic | None]
    """The first pass that the function needs, from its arguments. For steps it is per task: they know no groups."""
    check: Callable[..., None]
    """A check that raises UsageError for arguments that do not go together."""
    wants_where: bool
    wants_stats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Scoped):
    """A function with its declarations."""

    form: str
    """How its groups are stored: `merged` returns one delta, `masked` and `superposed` a Centre; a CodedMethod is
    `residual`."""
    gain: Callable[..., Gain | None]
    """The factor per task of a method of form `masked`, from the arguments."""
    when: str
    """When to use it, in one line."""
    reads: Reads
    """What it reads of a calibration, which it gets as `measured`; empty: it needs none."""
    wants_unstepped: bool
    origin: Origin | None = None
    """Where the method comes from. None: flexmerge."""

    @property
    def gives_one_model(self) -> bool:
        """Whether all tasks of a group read one dense value, and nothing of their own."""
        return self.form == "merged"

    @property
    def gives_masks(self) -> bool:
        """Whether it returns a Centre: each task reads some elements of a unified delta, or all with signs."""
        return self.form in ("masked", "superposed")


def nothing(**_args: Any) -> None:
    """Return None: the default declaration, for no statistics, no gain and nothing to check."""


def nowhere(_tensor: str, _shape: tuple[int, ...], **_args: Any) -> bool:
    return False


def method(
    *,
    paper: str,
    scope: Scope | Callable[..., Scope],
    elementwise: Callable[..., bool] = nowhere,
    statistics: Callable[..., Statistic | None] = nothing,
    form: str = "merged",
    gain: Callable[..., Gain | None] = nothing,
    workspace: Workspace = UNDECLARED,
    check: Callable[..., None] = nothing,
    when: str = "",
    reads: Reads = "",
) -> Callable[[Callable[..., Any]], Method]:
    """Make a Method of a function; its name is the function's."""

    def wrap(function: Callable[..., Any]) -> Method:
        return Method(
            name=function.__name__,
            function=function,
            paper=paper,
            scope=scope,
            elementwise=elementwise,
            statistics=statistics,
            form=form,
            gain=gain,
            when=when,
            reads=reads,
            workspace=workspace,
            check=check,
            parameters=parameters_of(function),
            wants_where=takes(function, "where"),
            wants_stats=takes(function, "stats"),
            wants_unstepped=takes(function, "unstepped"),
        )

    return wrap


def takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the keyword-only arguments, which `NAME:key=value` can set."""
    signature = inspect.signature(function, eval_str=True)
    return {p.name: _parameter(p) for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _parameter(parameter: inspect.Parameter) -> Parameter:
    annotation, bounds, choices, kinds = parameter.annotation, None, [], []
    if parameter.default is inspect.Parameter.empty:
        raise UsageError(
            f"argument `{parameter.name}` has no default", hint="give it one: a method must run without arguments"
        )
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if union else [annotation]
    for part in parts:
        if typing.get_origin(part) is Annotated:
            part, bounds = typing.get_args(part)
        if typing.get_origin(part) is Literal:
            choices += list(typing.get_args(part))
        elif part is not type(None):
            kinds.append(typing.get_origin(part) or part)
    unknown = [kind for kind in kinds if kind not in (int, float, bool, str, dict)]
    if unknown:
        raise UsageError(
            f"argument `{parameter.name}` has type {unknown[0]}", hint="use float, int, bool, str, Literal"
        )
    return Parameter(
        name=parameter.name, default=parameter.default, kinds=tuple(kinds), choices=tuple(choices), range=bounds
    )
