"""Does what `merge` does: turns a plan, a method and a size into a bundle."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.card import Scores, make_card
from flexmerge_cli.bundle.unchanged import Unchanged
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.formats.calibration import CalibrationData, read_calibration
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.recorded import recorded
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.choices import Auto
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.part import Share

if TYPE_CHECKING:
    from flexmerge_cli.engine.product import Product

OnProgress = Callable[[str, int, int], None]


def calibration_of(request: MergeRequest, plan: Plan) -> CalibrationData | None:
    """Return the calibration that a request's methods read; None if they read none.

    Raises UsageError if it is not given, or lacks what they read; SourceError, DataError and IntegrityError as
    `read_calibration`.
    """
    request.require_calibration()
    if request.calibration is None:
        return None
    found = read_calibration(Path(request.calibration), plan)
    statistics = set(found.index.settings.statistics)
    missing = sorted(request.reads - statistics)
    useful = {"fisher"} if recorded(request).is_by_distance else {"fisher", "inputs"}
    if isinstance(request.choice, Auto) and not statistics & useful:
        missing = [*missing, "fisher"]
    if missing:
        raise UsageError(
            f"{request.calibration} was made without the statistic `{missing[0]}`, which the method reads",
            hint=f"flexmerge calibrate … --statistics {','.join(sorted({*statistics, *missing}))}",
        )
    return found


def merge(
    plan: Plan,
    request: MergeRequest,
    output: Path,
    *,
    plan_folder: Path,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    layout: BundleLayout | None = None,
    examine: Callable[[Path], Scores | None] = lambda _folder: None,
    card: bool = True,
    scores: Scores | None = None,
    old: Unchanged | None = None,
    part: Share | None = None,
    join: bool = False,
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> tuple[BundleLayout, Measured]:
    """Write the bundle. plan_folder: the folder that the plan's relative sources are relative to.

    relocate: prefix of a source in the plan -> what stands there now. access: how sources are downloaded. examine: gets
    the folder of the finished bundle, and raises if it must not be published; it may return the bundle's scores. card:
    whether the bundle gets a README.md. scores: the scores that the card shows, in place of examine's. old: what
    another bundle has of the layout, which is not computed again. part: write this part of the bundle and publish
    nothing; what is returned then tells nothing of the whole. join: publish what all parts have written.

    Raises UsageError, DataError, SourceError, MachineError, and GateError if a task is farther than max_distance.
    """
    layout = layout or allocate(plan, request, Pricer(plan, calibration=calibration_of(request, plan)))
    [measured] = merge_all(
        plan, {output: (request, layout)}, plan_folder=plan_folder, relocate=relocate, access=access, force=force,
        device=device, threads=threads, max_memory=max_memory, examine=examine, card=card, scores=scores, old=old,
        part=part, join=join, on_progress=on_progress,
    )  # fmt: skip
    return layout, measured


def merge_all(
    plan: Plan,
    bundles: Mapping[Path, tuple[MergeRequest, BundleLayout]],
    *,
    plan_folder: Path,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    examine: Callable[[Path], Scores | None] = lambda _folder: None,
    card: bool = True,
    scores: Scores | None = None,
    old: Unchanged | None = None,
    part: Share | None = None,
    join: bool = False,
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> list[Measured]:
    """Write several bundles of one plan, each at its place, in one read of the weights; see `merge`.

    old, part and join: for one bundle only. A GateError names the bundles that are not published; the others are.
    """
    from flexmerge_cli.bundle.parts import write_part
    from flexmerge_cli.bundle.write import check_output, writing
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.materialise import materialise_all
    from flexmerge_cli.engine.merge_memory import merge_chunk
    from flexmerge_cli.engine.pool import default_threads

    where = choose_device(device, computes=not join and old is None)  # whoever has an old one has asked before
    threads = threads or default_threads()
    memory = access.memory_left(max_memory)
    check_output({output: layout for output, (_, layout) in bundles.items()}, force=force)
    sources = open_sources(plan, plan_folder, relocate, access)
    layouts = [layout for _, layout in bundles.values()]
    chunk = merge_chunk(layouts if old is None else [old.left], threads, memory, sources.located)
    for output in bundles:
        check_apart(output, [found.path for found in (*sources.tasks, sources.base) if found is not None])
    fetch(sources.to_fetch(), access, on_progress)
    # This is one pass over everything; less is read of equal tensors, and of a base with which nothing merges.
    read = (sources.located.base, *sources.located.tasks)
    stage, done, total = "", 0, sum(tensor.num_bytes for found in read for tensor in found.values())

    def on_stage(name: str) -> None:
        nonlocal stage, done
        stage, done = name, 0
        on_progress(stage, 0, total)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    if part is not None:
        [(output, (_, layout))] = bundles.items()
        write_part(
            layout, sources.located, output, part, device=where, threads=threads, chunk_elements=chunk,
            on_bytes=on_bytes, on_stage=on_stage,
        )  # fmt: skip
        return [Measured()]

    def accept(output: Path, request: MergeRequest, measured: Measured) -> None:
        limit = request.max_distance
        far = {
            plan.tasks[task].name: distance
            for task, distance in measured.task_distance.items()
            if limit is not None and (distance is None or not distance <= limit)
        }
        if far:
            distances = ", ".join(f"{name} {'(none)' if d is None else f'{d:.4f}'}" for name, d in far.items())
            raise GateError(
                f"distance over {limit} for {distances}: {output} is not published",
                hint="a larger --size, or another method",
            )

    def finish(folder: Path, manifest: Manifest) -> None:
        found = examine(folder)
        if scores is not None:
            scores.check(manifest)
        if card:
            (folder / CARD_NAME).write_text(make_card(folder, manifest, plan, scores or found))

    failed: list[GateError] = []

    @contextmanager
    def judged(bundle: AbstractContextManager["Product"]) -> "Iterator[Product]":
        """Write a bundle. One that a gate refuses does not keep the others from being published."""
        try:
            with bundle as product:
                yield product
        except GateError as error:
            failed.insert(0, error)  # The last bundle ends first.

    with ExitStack() as stack:
        products = []
        for output, (request, layout) in bundles.items():
            bundle = writing(
                layout, sources.side_files, output, force=force, device=where, accept=partial(accept, output, request),
                examine=finish, on_stage=on_stage, on_message=access.on_message, old=old, joins=join,
            )  # fmt: skip
            products.append(stack.enter_context(judged(bundle)))
        materialise_all(
            products, sources.located, device=where, threads=threads, chunk_elements=chunk, on_bytes=on_bytes,
            on_stage=on_stage,
        )  # fmt: skip
    if len(failed) > 1:
        raise GateError("\n  ".join(error.message for error in failed), hint=failed[0].hint)
    if failed:
        raise failed[0]
    return [product.measured for product in products]
