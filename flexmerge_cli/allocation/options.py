"""The ways to store a family, one row each: bytes on disk, bytes when served, and the command that builds it. Pure."""

import math
import shlex
from dataclasses import dataclass

from flexmerge_cli.allocation.allocation import copies
from flexmerge_cli.allocation.auto_allocation import auto, smallest_factor
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.methods.products import merges_products
from flexmerge_cli.methods.registry import all_methods
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.size import parse_size

AUTO_SIZES = (0.75, 1, 1.5, 2)

_CODED_MEAN = "gain=norm,centre=average,centre_bits=8,scales=bfloat16,clip=search"

# Name of a row -> method.
COMMON = {
    **{name: name for name in ("average", "task_arithmetic", "ties", "emr", "consensus")},
    "mean + 2 bits per task": "low_bit:bits=2",
    "mean in 8 bits + 2 bits per task": f"low_bit:bits=2,{_CODED_MEAN}",
    "mean in 8 bits + 1 bit per task": f"low_bit:bits=1,{_CODED_MEAN}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOption:
    """One row."""

    name: str
    disk_bytes: int
    """Σ st_size of all its files."""
    served_bytes: int
    """Memory with every task loaded: a value that tasks share counts once, what must be decoded once per task."""
    tensor_bytes: int
    command: str | None
    """None for what is there already."""


def check_methods(choice: str) -> None:
    """Raises UsageError."""
    if choice not in ("common", "all"):
        raise UsageError(f"--methods {choice} is not known", hint="one of: common, all")


def storage_options(pricer: Pricer, plan_path: str, *, methods: str = "common") -> list[StorageOption]:
    """`auto` at some sizes, if the plan has what it needs; copies as found, a cast, exact deduplication, and methods at
    their smallest on the order: `common` or `all`."""
    plan, pricer = pricer.plan, pricer.asked(MergeRequest())  # others are padded to the same length
    found = sum(member.source_bytes for member in plan.readers)
    side = sum(sum(file.bytes for file in member.files.values()) - member.own_file_bytes for member in plan.readers)
    command = f"flexmerge merge {shlex.quote(plan_path)}"
    rows = _auto(pricer, command)
    rows += [
        StorageOption(
            name="copies as found", disk_bytes=found + side, served_bytes=found, tensor_bytes=found, command=None
        ),
    ]
    if plan.tasks:
        rows.append(way("cast to bf16", pricer.layout(copies(plan, "BF16")), f"{command} --dtype bf16 -o bundle/"))
    rows.append(way("exact deduplication", pricer.layout(copies(plan)), f"{command} -o bundle/"))
    if not plan.tasks:  # adapters alone: nothing to merge
        return rows
    rest = {name: name for name in all_methods() if name not in COMMON} if methods == "all" else {}
    for name, method in (COMMON | rest).items():
        use = parse_use(method)
        if plan.pools_lora and not merges_products(use.call):
            continue
        layout = pricer.layout(Cutter(pricer, use).smallest())
        rows.append(way(name, layout, f"{command} --method {shlex.quote(method)} -o bundle/"))
    return rows


def _auto(pricer: Pricer, command: str) -> list[StorageOption]:
    """At its smallest, if that is more than the first size, then at all sizes that it reaches."""
    plan = pricer.plan
    if plan.settings.statistics != "all" or not plan.blocks:
        return []
    search = auto(pricer, Limits())
    smallest, one = search.smallest().layout, max(1, plan.one_model_bytes)
    count = len(plan.reader_names)
    sizes = [f"{size}x" for size in AUTO_SIZES if smallest.tensor_bytes <= size * one and size <= count]
    if smallest.tensor_bytes > AUTO_SIZES[0] * one and smallest_factor(smallest) <= count:
        sizes.insert(0, f"{smallest_factor(smallest):g}x")
    rows = []
    for text in sizes:
        found = search.cut(plan.target(parse_size(text))).layout
        rows.append(way(f"auto at {text}", found, f"{command} --method auto --size {text} -o bundle/"))
    return rows


def way(name: str, layout: BundleLayout, command: str) -> StorageOption:
    return StorageOption(
        name=name,
        disk_bytes=layout.total_bytes,
        served_bytes=served_bytes(layout),
        tensor_bytes=layout.tensor_bytes,
        command=command,
    )


def served_bytes(layout: BundleLayout) -> int:
    """Memory of all tasks at once."""
    total = 0
    for storage in layout.storages.values():
        tensor = storage.tensor
        if tensor.class_ is TensorClass.TIED:
            continue
        of_base = layout.plan.base_readers(tensor)
        total += sum(
            part.num_bytes
            for part in storage.parts
            if part.array.role == "dense" or (of_base and of_base[0] in part.readers)
        )
        if tensor.base_form is not None:
            computed = sum(member.computes(tensor.name) for member in layout.plan.readers)
            total += computed * math.prod(tensor.base_form[1]) * ITEM_BYTES[tensor.base_form[0]]
        total += sum(
            tensor.num_elements * ITEM_BYTES[layout.allocation.dtype or tensor.dtype_of(task)]
            for group in storage.groups
            if group.form.decoder is not None
            for task in group.tasks
        )
    return total
