"""What is common to methods of `tune` that fit something to a bundle: the checks before, and the file that is added."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexmerge_cli.bundle.added import write_added
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.card import make_card
from flexmerge_cli.bundle.manifest_file import read_manifest
from flexmerge_cli.bundle.publish import bundle_files, check_target
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.calibration.request import CalibrationRequest
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.formats.folders import ADDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What was fitted for one task: on how many examples, their digest, and the loss on them before and after."""

    examples: int
    data: str
    before: float
    after: float


def check_fitting(request: CalibrationRequest, bundle: Bundle, output: Path, *, force: bool) -> None:
    """Raise UsageError for an output that cannot be written or a bundle of other tasks than the plan's, DataError for
    one of other models."""
    check_apart(output, [request.plan_path, request.spec.document.path, bundle.path])
    check_target(output, force=force, ours=bundle_files)
    if bundle.manifest.base != request.plan.base.fingerprint or set(bundle.tasks) != set(request.plan.reader_names):
        raise UsageError(
            f"{bundle.path} was not merged from {request.plan_path}: it has another base or other tasks",
            hint="give the plan that the bundle was merged from",
        )
    for task in request.plan.tasks:
        if bundle.manifest.tasks[task.name].fingerprint != task.fingerprint:
            raise DataError(f"`{task.name}` of {bundle.path} is another model than in the plan", hint="merge it again")


def write_fitted(
    request: CalibrationRequest,
    bundle: Bundle,
    key: str,
    entry: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    found: Mapping[str, Fitted],
    output: Path,
    *,
    force: bool,
) -> None:
    """Write a copy of the bundle with these float32 arrays, and their entry in the manifest."""
    of_tasks = {name: {task: getattr(one, name) for task, one in found.items()} for name in ("examples", "data")}
    write_added(
        bundle, ADDED[key], arrays, output, key=key, entry={**entry, **of_tasks}, force=force,
        card=lambda folder: make_card(folder, read_manifest(folder), request.plan, None),
    )  # fmt: skip
