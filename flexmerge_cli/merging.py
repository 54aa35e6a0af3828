"""`merge`: a plan, a method and a size in, a bundle out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.allocation import Allocation, copies
from flexmerge_cli.allocation.auto_allocation import MAX_DISTANCE, Auto, Found, auto
from flexmerge_cli.allocation.auto_options import parse_auto
from flexmerge_cli.allocation.bill import Bill, Pricer
from flexmerge_cli.allocation.clusters import Cluster, cluster_channels, clusters_of_size, require_tensor_scope
from flexmerge_cli.allocation.cut import Cutter, Fit
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.allocation.plan_file import Plan
from flexmerge_cli.allocation.size import parse_size
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.methods.duplicates import near_duplicate_warning
from flexmerge_cli.methods.products import check_pooled
from flexmerge_cli.methods.registry import all_methods, resolve
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.order.similarity import Similarity, similarity
from flexmerge_cli.plan_fields import block_measure
from flexmerge_cli.reopening import open_sources
from flexmerge_cli.writing import check_apart

OnProgress = Callable[[str, int, int], None]

# Of --max-distance that `auto` aims at where it has no size: what is measured may be a little more than predicted.
PREDICTED_PART = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """What `merge` is asked, besides the plan."""

    method: str | None = None
    """`NAME:key=value`; None: nothing is merged."""
    steps: tuple[str, ...] = ()
    """What changes the task vectors before the method: `dare:p=0.9`."""
    calibrate: str | None = None
    """What follows the method: `svc`."""
    method_for: tuple[str, ...] = ()
    """`PATTERN=METHOD` for blocks of these names; METHOD `keep` merges nothing there."""
    run_files: bool = False
    """Whether `./my.py#NAME` may be run: only where a person has typed it."""
    size: str | None = None
    merges: int | None = None
    fit: Fit = Fit.TIGHT
    cluster: Cluster | None = None
    """Groups by clustering, `size` of them, instead of by a cut of the order."""
    seed: int | None = None
    """Of what `cluster` draws; None: 0."""
    dtype: str | None = None
    """F32, F16 or BF16: what floating tensors are cast to."""
    max_distance: float | None = None
    relocate: Mapping[str, str] = field(default_factory=dict)
    """Prefix of a source as the plan has it -> what stands there now."""
    access: Access = ONLINE


def check_request(request: MergeRequest, num_tasks: int) -> None:
    """What is wrong whatever the weights are, so that it is told before they are read. Raises UsageError."""
    if request.size is not None and request.merges is not None:
        raise UsageError("--size and --merges both say where to cut", hint="give one of them")
    if request.size is not None:
        parse_size(request.size, num_tasks=num_tasks, one_model_bytes=1)
    if request.cluster is not None:
        _check_cluster(request, num_tasks)
    elif request.seed is not None:
        raise UsageError("--seed is of what --cluster draws", hint="--cluster channels, or leave it out")
    if request.method is not None and parse_auto(request.method) is not None:
        _check_auto(request)
    elif request.method is not None:
        use = method_use(request, request.method)
        if request.cluster is not None:
            require_tensor_scope(use.call)
    elif request.size is not None or request.merges is not None:
        raise UsageError(
            "a size was asked for and no method: what is lost must be chosen by name",
            hint="add --method NAME, or --method auto, which chooses by itself; `flexmerge methods` lists them",
        )
    if request.max_distance is not None and not request.max_distance >= 0:
        raise UsageError(f"--max-distance {request.max_distance} is not a number of 0 or more", hint="write 0.5")


def allocate(plan: Plan, request: MergeRequest, pricer: Pricer | None = None) -> Bill:
    """Choose what the bundle stores, and price it to the byte. Reads no weights. Raises UsageError, GateError."""
    pricer = pricer or Pricer(plan)
    if plan.pools_lora:
        _check_pool(request)
    check_request(replace(request, method=request.method or "average"), len(plan.reader_names))
    size = (
        parse_size(request.size, num_tasks=len(plan.reader_names), one_model_bytes=plan.one_model_bytes)
        if request.size is not None
        else None
    )
    if request.method is None:
        if size is not None or request.merges is not None:
            raise UsageError(
                "a size was asked for and no method: what is lost must be chosen by name\n" + _offers(pricer, request),
                hint="add --method NAME, or --method auto, which chooses by itself",
            )
        return pricer.bill(copies(plan, request.dtype))
    found = auto_found(pricer, request)
    if found is not None:
        return found[1].bill
    if request.cluster is not None:
        count, use = clusters_of_size(request.size, len(plan.tasks)), method_use(request, request.method)
        return pricer.bill(cluster_channels(plan, count, use, seed=request.seed or 0, dtype=request.dtype))
    elsewhere = [_method_for(item, request) for item in request.method_for]
    cutter = Cutter(pricer, method_use(request, request.method), request.dtype, elsewhere=elsewhere)
    allocation: Allocation
    if request.merges is not None:
        allocation = cutter.prefix(request.merges)
    elif size is not None:
        allocation = cutter.cut(size, request.fit)
    else:
        allocation = cutter.smallest()
    return pricer.bill(allocation)


def _check_pool(request: MergeRequest) -> None:
    """What merges factors of LoRA adapters. Raises UsageError."""
    if request.cluster is not None or (request.method is not None and parse_auto(request.method) is not None):
        raise UsageError(
            "a pool of LoRA adapters is merged by the order, and by methods of one value a module",
            hint="--method average --size 2x; or plan with --adapters merge",
        )
    for text in (request.method, *(item.partition("=")[2] for item in request.method_for)):
        if text not in (None, "", "keep"):
            use = method_use(request, text)
            check_pooled(use.call, steps=len(use.steps), calibrate=use.calibrate is not None)


def merge(
    plan: Plan,
    request: MergeRequest,
    output: Path,
    *,
    plan_folder: Path,
    force: bool = False,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    bill: Bill | None = None,
    examine: Callable[[Path], None] = lambda _folder: None,
    on_progress: OnProgress = lambda _what, _done, _total: None,
) -> tuple[Bill, Measured]:
    """Write the bundle. plan_folder: what the plan's relative sources are relative to.

    examine: is given the folder of the finished bundle, and raises for what must not be published.

    Raises UsageError, DataError, SourceError, MachineError, and GateError if a task is farther than max_distance.
    """
    from flexmerge_cli.bundle.write import check_output, write_bundle
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.merge_memory import merge_chunk
    from flexmerge_cli.engine.pool import default_threads

    where = choose_device(device)
    threads = threads or default_threads()
    bill = bill or allocate(plan, request)
    memory = request.access.memory_left(max_memory)
    check_output(output, bill, force=force)
    sources, side_files = open_sources(plan, plan_folder, request.relocate, request.access)
    chunk = merge_chunk(bill, threads, memory, sources.located)
    check_apart(output, [found.path for found in (*sources.tasks, sources.base) if found is not None])
    fetch(sources.to_fetch(), request.access, on_progress)
    # Of a pass over all; of equal tensors, and of a base that nothing merges with, less is read.
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

    def accept(measured: Measured) -> None:
        limit = request.max_distance
        far = {
            plan.tasks[task].name: distance
            for task, distance in measured.task_distance.items()
            if limit is not None and (distance is None or distance > limit)
        }
        if far:
            told = ", ".join(f"{name} {'null' if d is None else f'{d:.4f}'}" for name, d in far.items())
            raise GateError(
                f"distance over {limit} for {told}: the bundle is not published",
                hint="a larger --size, or another method",
            )

    measured = write_bundle(
        bill,
        sources.located,
        side_files,
        output,
        force=force,
        device=where,
        threads=threads,
        chunk_elements=chunk,
        accept=accept,
        examine=examine,
        on_bytes=on_bytes,
        on_stage=on_stage,
    )
    return bill, measured


def _check_cluster(request: MergeRequest, num_tasks: int) -> None:
    clusters_of_size(request.size, num_tasks)
    of_an_order = {"--fit prefix": request.fit is not Fit.TIGHT, "--method-for": bool(request.method_for)}
    for option in (option for option, given in of_an_order.items() if given):
        raise UsageError(f"{option} is of a cut of the order, and --cluster makes none", hint="leave one of them out")


def _check_auto(request: MergeRequest) -> None:
    for option, value in {
        "--merges": request.merges, "--cluster": request.cluster, "--step": request.steps or None,
        "--calibrate": request.calibrate,
    }.items():  # fmt: skip
        if value is not None:
            raise UsageError(f"{option} says nothing to `auto`, which merges by no order", hint="leave it out")


def auto_of(pricer: Pricer, request: MergeRequest) -> Auto | None:
    """The search that a request asks for, made once a pricer; None if its method is another."""
    limits = parse_auto(request.method) if request.method is not None else None
    if limits is None:
        return None
    return auto(pricer, limits, request.dtype, tuple(_method_for(item, request) for item in request.method_for))


def auto_found(pricer: Pricer, request: MergeRequest) -> tuple[Auto, Found] | None:
    """And what it finds for the size; without one, the smallest whose predicted distance stays under the limit."""
    search = auto_of(pricer, request)
    if search is None:
        return None
    if request.size is not None:
        plan = pricer.plan
        size = parse_size(request.size, num_tasks=len(plan.reader_names), one_model_bytes=plan.one_model_bytes)
        return search, search.cut(size)
    limit = MAX_DISTANCE if request.max_distance is None else request.max_distance * PREDICTED_PART
    return search, search.within(limit)


def _method_for(item: str, request: MergeRequest) -> tuple[str, MethodUse | None]:
    pattern, equals, text = item.partition("=")
    if not equals or not pattern or not text:
        raise UsageError(f"`{item}` is not PATTERN=METHOD", hint="--method-for '*.self_attn=ties:K=0.2'")
    return pattern, None if text == "keep" else method_use(request, text)


def method_use(request: MergeRequest, text: str) -> MethodUse:
    """A method with all its arguments, and the request's steps and calibration. Raises UsageError."""
    return parse_use(text, steps=request.steps, calibrate=request.calibrate, run_files=request.run_files)


def resolutions(request: MergeRequest) -> list[str]:
    """What the names that mergekit has are taken for, to be told."""
    methods = [request.method or "", *(item.partition("=")[2] for item in request.method_for)]
    return [message for message in dict.fromkeys(resolve(text).message for text in methods) if message]


def advice(plan: Plan, bill: Bill, request: MergeRequest, pricer: Pricer | None = None) -> list[str]:
    """Warnings about a choice: an exact or cast-only bundle that is no larger than the lossy one."""
    if not bill.allocation.methods:
        return []
    found = near_duplicates(plan, bill)
    if bill.allocation.dtype is not None:
        return found
    pricer = pricer or Pricer(plan)
    for dtype, what, command in ((None, "exact deduplication", ""), ("BF16", "a cast to bf16", " --dtype bf16")):
        other = pricer.bill(copies(plan, dtype))
        if other.total_bytes <= bill.total_bytes:
            found.append(
                f"{what} takes {other.total_bytes:,} bytes, no more than the {bill.total_bytes:,} of this bundle, and "
                f"merges nothing: flexmerge merge PLAN{command} -o BUNDLE"
            )
            break
    return found


def near_duplicates(plan: Plan, bill: Bill) -> list[str]:
    """Groups of near-identical tasks that a sum form multiplies, or whose masks stay empty: told once a method."""
    told: dict[int, list[str]] = {}
    for unit in bill.allocation.units:
        groups = [group for group in unit.groups if group.method is not None and group.bits is None]
        if not groups:
            continue
        cosines = similarity(block_measure(unit.name, [plan.tensor(name) for name in unit.tensors]), Similarity.COSINE)
        for group in groups:
            assert group.method is not None
            smallest = float(cosines[np.ix_(group.tasks, group.tasks)].min())
            names = [plan.tasks[task].name for task in group.tasks]
            text = near_duplicate_warning(bill.calls[group.method], names, smallest)
            if text:
                told.setdefault(group.method, []).append(f"{text} (in {unit.name})")
    return [texts[0] + (f", and {len(texts) - 1} groups more" if len(texts) > 1 else "") for texts in told.values()]


def _offers(pricer: Pricer, request: MergeRequest) -> str:
    """Methods and the smallest size each reaches."""
    lines = []
    for name in all_methods():
        bill = pricer.bill(Cutter(pricer, parse_use(name), request.dtype).smallest())
        factor = bill.tensor_bytes / max(1, pricer.plan.one_model_bytes)
        lines.append(f"  {name:18} down to {factor:.2f}x, {bill.total_bytes:,} bytes on disk")
    return "\n".join(lines)
