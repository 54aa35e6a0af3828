"""Merges a plan at several sizes, into a bundle for each size at `OUTPUT/SIZE`.

The bundles are written one after another. Each takes from the one before it what both store, without reading a source
for it. What a killed run has finished is recognised, and the same command writes the rest.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, is_bundle
from flexmerge_cli.bundle.publish import bundle_files, check_target, mend
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.unchanged import Unchanged, unchanged
from flexmerge_cli.bundle.verify import verify_bundle
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.merging import merge
from flexmerge_cli.request.choices import Exact
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.size import Size

DECIDING = ("plan", "request", "generator", "calibration", "methods", "allocation", "build", "gate", "router")


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
) -> Iterator[tuple[str, Measured | None, Unchanged | None]]:
    """Write a bundle of each size, and yield what was measured and what was taken from the bundle before.

    bundles: maps each size to its request and layout. A size whose bundle is already there is not written, so nothing
    is measured for it. options: those of `merging.merge`. Raises UsageError, before any weight is read, if something
    else is there.
    """
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.materialise import build_of

    where = choose_device(device)
    builds = {size: build_of(layout, where) for size, (_, layout) in bundles.items()}
    for size in bundles:
        mend(output / size, resumes=True)
    there = {size for size, (_, layout) in bundles.items() if is_there(output / size, layout, builds[size])}
    for size in bundles:
        if size not in there:
            check_target(output / size, force=force, ours=bundle_files, resumes=True)
    before: Path | None = None
    for size, (request, layout) in bundles.items():
        measured = old = None
        if size not in there:
            if before is not None and layout.calibration is None:
                old = unchanged(Bundle.open(before), layout, builds[size])
            measured = merge(
                plan, request, output / size, layout=layout, old=old, force=force, device=device, **options
            )[1]
        yield size, measured, old
        before = output / size


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
