"""Finds coefficients of a plan's tasks on unlabelled examples, and writes them to a small file for `merge`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.calibration.request import CalibrationRequest, OnStep, calibration_request
from flexmerge_cli.calibration.tuners import TUNERS
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.scoring import library_versions
from flexmerge_cli.methods.coefficients import Coefficients, TunedTask, is_coefficients
from flexmerge_cli.methods.registry import complete, format_call, split_call
from flexmerge_cli.version import GENERATOR
from flexmerge_cli.writing import check_file, write_file

if TYPE_CHECKING:
    import numpy as np

    from flexmerge_cli.calibration.fitted import Fitted
    from flexmerge_cli.calibration.joint import JointModels

KINDS = ("image-classification", "text-classification", "causal-lm")
DIGITS = 6
"""The significant digits of a coefficient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What `tune` is to find. Made by `tune_request`."""

    method: str
    """`NAME:key=value,…` with every argument."""
    tuner: "Callable[[JointModels, Callable[[int, int], None]], np.ndarray]"
    examples: CalibrationRequest


def tune_request(plan_path: Path, spec_path: Path, *, method: str = "adamerging", **asked: Any) -> TuneRequest:
    """Parse the method and read plan, spec and examples. asked: as for `calibration_request`. Reads no weights.

    Raises UsageError, SourceError, DataError.
    """
    name, full = _parsed(method, adds_to_bundle=False)
    request = calibration_request(plan_path, spec_path, kinds=KINDS, **asked)
    if not request.plan.blocks:
        raise UsageError(
            f"{plan_path} has no block that merges, so there is nothing to weigh", hint="plan without --private"
        )
    return TuneRequest(method=format_call(name, full), tuner=partial(TUNERS[name].function, **full), examples=request)


def fitting_request(
    plan_path: Path, spec_path: Path, *, method: str, bundle: Bundle, **asked: Any
) -> "Callable[..., Mapping[str, Fitted]]":
    """Return the function that writes a copy of the bundle with what it fits, given its path, `force` and `on_step`.

    Parses the method, and reads plan, spec and examples. Raises UsageError, SourceError, DataError.
    """
    from flexmerge_cli.calibration.correct import correct
    from flexmerge_cli.calibration.mix import mix

    name, full = _parsed(method, adds_to_bundle=True)
    request = calibration_request(plan_path, spec_path, kinds=KINDS, **asked)
    return partial(mix if name == "wemoe" else correct, request, bundle, full)


def _parsed(method: str, *, adds_to_bundle: bool) -> tuple[str, dict[str, Any]]:
    """Return the name of a method, and all its arguments. Raises UsageError."""
    name, args = split_call(method)
    if name not in TUNERS:
        raise UsageError(f"`tune` has no method `{name}`", hint=f"one of: {', '.join(TUNERS)}")
    if TUNERS[name].adds_to_bundle and not adds_to_bundle:
        raise UsageError(f"`{name}` adds to a bundle, and none is given", hint="--bundle bundle/ -o corrected/")
    if adds_to_bundle and not TUNERS[name].adds_to_bundle:
        fitting = " or ".join(name for name, tuner in TUNERS.items() if tuner.adds_to_bundle)
        raise UsageError(f"--bundle is for {fitting}, and `{name}` takes a plan alone", hint="--method surgery:rank=16")
    return name, complete(name, TUNERS[name].parameters, args)


def tune(
    request: TuneRequest, output: Path, *, force: bool = False, on_step: OnStep = lambda *_s: None
) -> Coefficients:
    """Find the coefficients and write them. Raises DataError for changed sources and outputs that are not finite."""
    from flexmerge_cli.calibration.joint import JointModels

    of, plan = request.examples, request.examples.plan
    check_apart(output, [of.plan_path, of.spec.document.path, *of.references.folders.values()])
    check_file(output, force=force, replaceable=is_coefficients, what="a file of coefficients")
    models = JointModels.of(of, partial(on_step, "reading"))
    weight_MB = request.tuner(models, partial(on_step, "tuning"))
    by_block = {
        block.name: {name: float(f"{weight_MB[task, place]:.{DIGITS}g}") for task, name in enumerate(plan.task_names)}
        for place, block in enumerate(plan.blocks)
    }
    first, *others = by_block.values()
    found = Coefficients(
        generator=GENERATOR,
        method=request.method,
        versions=library_versions(),
        base=plan.base.fingerprint,
        tasks={
            task.name: TunedTask(weights=task.fingerprint, data=models.digests[place], n=len(models.examples[place]))
            for place, task in enumerate(plan.tasks)
        },
        weights={**(first if all(other == first for other in others) else by_block)},
    )
    write_file(output, found.dump())
    return found
