"""Merges a plan at several sizes, into a bundle for each size at `OUTPUT/SIZE`.

All bundles are written in one read of the weights, and what several store is computed once. Only a statistic of groups
is measured for each size that has other groups. What a killed run has finished is recognised, and the same command
writes the rest.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, is_bundle
from flexmerge_cli.bundle.publish import mend
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.verify import verify_bundle
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.merging import merge_all
from flexmerge_cli.request.choices import Exact
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.size import Size

DECIDING = (
    "plan",
    "request",
    "generator",
    "calibration",
    "methods",
    "allocation",
    "build",
    "gate",
    "router",
    "surgery",
    "wemoe",
)


def at_sizes(request: MergeRequest, sizes: tuple[Size, ...]) -> dict[str, MergeRequest]:
    """Return the request at each size, by the text of the size. Raises UsageError for a choice that has no size."""
    if isinstance(request.choice, Exact):
        raise UsageError("--sizes requires a method that chooses what is lost", hint="add --method NAME")
    return {size.text: request.at(size) for size in sizes}


def merge_sizes(
    plan: Plan,
    bundles: Mapping[str, tuple[MergeRequest, BundleLayout]],
    output: Path,
    *,
    force: bool = False,
    device: str = "auto",
    **options: Any,
) -> dict[str, Measured]:
    """Write a bundle of each size, and return what was measured of those that were not there yet.

    bundles: maps each size to its request and layout. options: those of `merging.merge_all`. Raises UsageError, before
    any weight is read, if something else is in the place of one.
    """
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.product import build_of

    where = choose_device(device)
    for size in bundles:
        mend(output / size, resumes=True)
    missing = {
        size: (request, layout)
        for size, (request, layout) in bundles.items()
        if not is_there(output / size, layout, build_of(layout, where))
    }
    places = {output / size: bundle for size, bundle in missing.items()}
    measured = merge_all(plan, places, force=force, device=device, **options) if missing else []
    return dict(zip(missing, measured))


def is_there(folder: Path, layout: BundleLayout, build: str) -> bool:
    """Return whether a folder is exactly the bundle that this layout makes, with every file sound."""
    if not is_bundle(folder):
        return False
    try:
        found = verify_bundle(Bundle.look(folder))
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (FlexmergeError, OSError, ValueError):
        return False
    wanted = json.loads(layout.manifest(Measured(build=build)))
    same = all(manifest.get(key) == wanted.get(key) for key in DECIDING)
    return same and not found.bad
