"""Holds a method as the engine applies it: steps, the call that makes a value, calibration, coding, and their
statistics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flexmerge_cli.allocation.allocation import Tasks
from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.engine.spans import widest
from flexmerge_cli.methods.call import Calibrated, Call
from flexmerge_cli.methods.coded import Coded
from flexmerge_cli.methods.method import Scope
from flexmerge_cli.methods.products import product_call, product_workspace
from flexmerge_cli.methods.step import CalibrationCall, StepCall
from flexmerge_cli.methods.use import MethodUse


@dataclass(slots=True, kw_only=True)
class Chain:
    """A method in use: its steps, the call that makes the value, calibration, and how residuals are coded."""

    steps: tuple[StepCall, ...]
    call: Call | None
    """The call that makes a group's one value: the method itself, or the centre of a coded one. None if the centre is
    the base, or if there is none."""
    calibrate: CalibrationCall | None
    coded: Coded | None
    calibration: Calibrated | None = None
    """What was measured on examples, if residuals are rounded by it."""
    products: Call | None = None
    """The call that merges the products of the factors that `call` gets; None if tensors merge by themselves."""
    step_stats: list[Any] = field(default_factory=list)
    """The finished statistics of each step: domain -> value per task."""
    stats: Callable[[Tasks, str], Any] = lambda _tasks, _tensor: None
    """Returns the finished statistics of the call, for a group's tasks and a tensor."""
    expert_stats: Callable[[Tasks, str], Any] = lambda _tasks, _tensor: None

    def scope_of(self, tensor: str, shape: tuple[int, ...]) -> Scope:
        """Return what one call must see of a tensor."""
        scopes: list[Scope] = [step.scope_of(tensor, shape) for step in self.steps]
        scopes += [self.call.scope_of(tensor, shape)] if self.call else []
        scopes += [self.calibrate.scope_of(tensor, shape)] if self.calibrate else []
        return widest(scopes)

    def block_workspace(self, num_tasks: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the bytes that one call on all tensors of a unit takes, beside their deltas."""
        if self.products is not None:
            return product_workspace(self.products, num_tasks, shapes)
        return sum(self.call.workspace(num_tasks, shape) for shape in shapes.values()) if self.call is not None else 0


def chains_of(layout: BundleLayout) -> list[Chain]:
    """Return the chains of an allocation's methods, in its order."""
    # Rounding with feedback brings outputs nearer and weights farther, so it would miss a distance that was asked for.
    is_by_distance = layout.request is not None and layout.request.is_by_distance
    rounds_by = None if is_by_distance else layout.calibration
    return [
        Chain(steps=(), call=product_call(use.call), calibrate=None, coded=None, products=use.call)
        if layout.plan.merges_products
        else _chain(use, layout.calibration, rounds_by)
        for use in layout.allocation.methods
    ]


def _chain(use: MethodUse, calibration: Calibrated | None, rounds_by: Calibrated | None) -> Chain:
    call = use.maker
    if call is not None and call.method.reads:
        call = replace(call, source=calibration)
    return Chain(steps=use.steps, call=call, calibrate=use.calibrate, coded=use.coded, calibration=rounds_by)
