"""Defines a method in use, with its steps and its calibration, as an object that is parsed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.coded import Coded, declare
from flexmerge_cli.methods.registry import parse_calibrate, parse_call, parse_step, resolve
from flexmerge_cli.methods.step import CalibrationCall, StepCall


@dataclass(frozen=True, slots=True)
class MethodUse:
    """A method with the steps before it and the calibration after it. Equal if all of their texts are equal."""

    call: Call
    steps: tuple[StepCall, ...] = ()
    calibrate: CalibrationCall | None = None
    alias: str | None = field(default=None, compare=False)
    """The name of mergekit's method, if it was requested."""
    num_own_steps: int = field(default=0, compare=False)
    """The number of steps that the alias added; they come last."""

    @property
    def name(self) -> str:
        """The method as a user would write it: the alias, or the text without default arguments."""
        return self.alias or self.call.short

    @property
    def asked_steps(self) -> tuple[StepCall, ...]:
        """The steps that the user requested."""
        return self.steps[: len(self.steps) - self.num_own_steps]

    @property
    def text(self) -> str:
        """The method as `NAME:key=value,…`, with every argument."""
        return self.call.text

    @property
    def coded(self) -> Coded | None:
        """What the method stores if it keeps residuals, else None."""
        return declare(self.call)

    @property
    def maker(self) -> Call | None:
        """The method that makes a group's one value: the method itself, or its centre; None if there is no such
        value."""
        coded = self.coded
        return self.call if coded is None else coded.centre_call()

    @property
    def reads(self) -> str:
        """What it, or its centre, reads of a calibration; empty: it needs none."""
        coded = self.coded
        if coded is not None and coded.centre == "average":  # This is known without importing torch.
            return ""
        return self.maker.method.reads if self.maker is not None else ""

    @property
    def stores_per_task(self) -> bool:
        """Whether it stores something per task in addition to what a group shares."""
        return not self.call.method.gives_one_model


def parse_use(
    text: str, *, steps: Sequence[str] = (), calibrate: str | None = None, run_files: bool = False
) -> MethodUse:
    """Parse a method, its steps and its calibration, and check that they go together. Raises UsageError.

    A name that only mergekit has stands for the nearest method here. The steps that this adds come last; a step that
    the user requested replaces the same step of the alias. run_files: as in `parse_call`.
    """
    found = resolve(text)
    call = parse_call(found.method, run_files=run_files)
    parsed = [parse_step(step) for step in steps]
    asked = {step.step.name for step in parsed}
    own = [step for step in map(parse_step, found.steps) if step.step.name not in asked]
    after = parse_calibrate(calibrate) if calibrate else None
    if after is not None:
        maker = MethodUse(call).maker
        if maker is None:
            raise UsageError(
                f"`{after.calibration.name}` cannot follow `{found.method}`: that method merges nothing",
                hint="leave out --calibrate, or use centre=average",
            )
        after.require_after(maker)
    alias = text.strip().lower().replace("-", "_") if found.message else None
    return MethodUse(call, (*parsed, *own), after, alias, len(own))
