"""Methods, steps and calibrations with all their arguments: what `NAME:key=value` means, and how it is called."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from flexmerge_cli.methods.method import Declared, Gain, Method, Reads, Scope, Scoped, Statistic, Where


class Calibrated(Protocol):
    """What was measured of the tasks' models on examples (formats/calibration.py)."""

    def scope(self, reads: Reads, tensor: str) -> Scope:
        """Return how much of a tensor a method that reads this must see."""

    def measured(self, reads: Reads, where: Where, count: int) -> Any:
        """Return what a call on `count` elements gets as `measured`; None if it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation(ABC):
    """A method, step or calibration with all its arguments. Two are equal if their texts are equal."""

    args: Mapping[str, Any] = field(compare=False)
    text: str
    """`NAME:key=value,…` with every argument, defaults included; a method from a file keeps the path as typed."""
    short: str = field(compare=False)
    """The same text without arguments that have their default values."""

    @property
    @abstractmethod
    def declared(self) -> Declared: ...

    def workspace(self, num_tasks: int, shape: tuple[int, ...]) -> int:
        """Return the bytes that one call on this shape takes, beside its deltas."""
        return self.declared.workspace(num_tasks, shape, **self.args)


class ScopedInvocation(Invocation):
    """A method or a step with all its arguments."""

    __slots__ = ()

    @property
    @abstractmethod
    def declared(self) -> Scoped: ...

    @property
    def scope(self) -> Scope:
        scope = self.declared.scope
        return scope(**self.args) if callable(scope) else scope

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        """Return the scope for this tensor: a method that takes whole matrices sees any range of other tensors."""
        return "element" if self.declared.elementwise(tensor, shape, **self.args) else self.scope

    @property
    def statistics(self) -> Statistic | None:
        return self.declared.statistics(**self.args)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call(ScopedInvocation):
    """A method with all its arguments, the meaning of `NAME:key=value`. Calls with equal text and origin are equal."""

    method: Method
    source: Calibrated | None = field(default=None, compare=False, repr=False)
    """The calibration that its method reads, where it is applied."""

    @property
    def declared(self) -> Method:
        return self.method

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        if not self.method.reads:
            return ScopedInvocation.scope_of(self, tensor, shape)
        return "element" if self.source is None else self.source.scope(self.method.reads, tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and (self.text, self.method.origin) == (other.text, other.method.origin)

    def __hash__(self) -> int:
        return hash(self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the text, which the other process parses again; for a method from a file, with the bytes that were
        run."""
        from flexmerge_cli.methods.registry import parse_call_again

        return parse_call_again, (self.text, self.method.origin)

    @property
    def gain(self) -> Gain | None:
        return self.method.gain(**self.args)

    def __call__(self, deltas: Any, where: Where, stats: Any = None, unstepped: Any = None) -> Any:
        """Call the method. unstepped: the group's task vectors before any step, if there are steps."""
        extra: dict[str, Any] = {"where": where} if self.method.wants_where else {}
        extra |= {"stats": stats} if self.method.wants_stats else {}
        extra |= {"unstepped": deltas if unstepped is None else unstepped} if self.method.wants_unstepped else {}
        if self.method.reads:
            extra["measured"] = (
                self.source.measured(self.method.reads, where, deltas[0].numel()) if self.source else None
            )
        return self.method.function(deltas, **extra, **self.args)
