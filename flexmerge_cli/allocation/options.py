"""Lists the options to store a family, one row each: bytes on disk and when served, bits per weight, the measured score
of such bundles, and the command that builds it. Pure. Imports torch only for `all_methods`."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexmerge_cli.allocation.allocation import copies
from flexmerge_cli.allocation.auto_allocation import auto, smallest_factor
from flexmerge_cli.allocation.cut import Cutter
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.aliases import PRESETS
from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import method
from flexmerge_cli.methods.products import merges_products
from flexmerge_cli.methods.registry import format_call
from flexmerge_cli.methods.use import MethodUse, parse_use
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.size import parse_size

AUTO_SIZES = (0.5, 0.75, 1, 1.5, 2)
COPIES, EXACT = "copies as found", "exact deduplication"

# Methods that store one dense value per merged block, with all arguments that the manifest records.
DENSE: Mapping[str, Mapping[str, Any]] = {"average": {}, "tsv_m": {"scale": 1.0, "matrices": "linear"}}
COMMON = (*PRESETS, *DENSE)

Points = tuple[tuple[float, float], ...]
"""Pairs of bits per weight and task, and the percent of the fine-tuned score that was kept, sorted by bits."""

Range = tuple[float, float]

# The measurements of docs/benchmarks.md: bundle -> family -> points. A method without a size is at its smallest.
MEASURED: Mapping[str, Mapping[str, Points]] = {
    "auto": {
        "digits": (
            (0.58, 74.5),
            (0.72, 97.6),
            (0.8, 98.3),
            (1.0, 99.3),
            (1.2, 99.6),
            (1.5, 99.8),
            (2.0, 99.8),
            (2.5, 99.8),
            (3.0, 100.0),
            (4.0, 100.0),
        ),
        "thirty digits": (
            (0.38, 50.5),
            (0.49, 96.9),
            (0.53, 97.3),
            (0.62, 98.3),
            (0.8, 98.2),
            (1.02, 98.7),
            (1.07, 98.6),
            (1.3, 98.8),
            (1.6, 99.4),
            (1.67, 99.5),
            (2.13, 99.8),
        ),
        "texts": (
            (0.43, 64.9),
            (0.66, 98.6),
            (1.02, 98.9),
            (1.58, 100.0),
            (2.46, 100.2),
            (3.81, 100.0),
            (5.9, 100.1),
            (9.13, 100.0),
        ),
        "MiniLM": ((1.14, 100.8),),
    },
    "residual-2bit": {"digits": ((3.34, 100.0),), "thirty digits": ((2.59, 99.6),), "texts": ((3.2, 99.9),)},
    "residual-1bit": {"digits": ((2.36, 99.6),), "thirty digits": ((1.61, 98.7),), "texts": ((2.2, 99.6),)},
    "average": {
        "digits": ((2.02, 70.7),),
        "thirty digits": ((0.56, 50.5),),
        "texts": ((2.29, 54.5),),
        "MiniLM": ((4.57, 71.9),),
    },
    "tsv_m": {
        "digits": ((2.02, 74.1),),
        "thirty digits": ((0.56, 44.2),),
        "texts": ((2.29, 73.4),),
        "MiniLM": ((4.57, 93.3),),
    },
}
WELL_KEPT = 99.0  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageOption:
    """One row of the table."""

    name: str
    disk_bytes: int
    """Σ st_size of all its files."""
    served_bytes: int
    """Memory with every task loaded: a value that tasks share counts once, and one that must be decoded counts once per
    task."""
    tensor_bytes: int
    bits: float
    """Bits of tensor data per weight and task."""
    kept: Range | None = None
    """The least and the most percent of the fine-tuned score that such bundles of other families kept; None if not
    measured. Exact bundles keep 100."""
    is_larger: bool = False
    """Whether it takes more bytes on disk than the models as they were found."""
    command: str | None
    """The command that builds it; None for what is there already."""


def storage_options(pricer: Pricer, plan_path: str, *, all_methods: bool = False) -> list[StorageOption]:
    """List all options, sorted by their bytes on disk: copies as found, exact deduplication, a cast if it saves
    anything, `auto` at some sizes if the plan has the statistics, and, if there are tasks to merge, the usual
    methods, or all, at their smallest."""
    plan, pricer = pricer.plan, pricer.asked(MergeRequest())  # others are padded to the same length
    weights, command = num_weights(plan), f"flexmerge merge {shlex.quote(plan_path)}"

    def row(name: str, layout: BundleLayout, options: str = "", kept: Range | None = None) -> StorageOption:
        return StorageOption(
            name=name,
            disk_bytes=layout.total_bytes,
            served_bytes=served_bytes(layout),
            tensor_bytes=layout.tensor_bytes,
            bits=8 * layout.tensor_bytes / weights,
            kept=kept or kept_by(name.partition(" at ")[0], 8 * layout.tensor_bytes / weights),
            command=f"{command}{options} -o bundle/",
        )

    found = _as_found(plan, weights)
    exact = row(EXACT, pricer.layout(copies(plan)), kept=(100.0, 100.0))
    rows = [found, exact]
    if plan.tasks:
        cast = row("cast to bf16", pricer.layout(copies(plan, "BF16")), " --dtype bf16")
        rows += [cast] if cast.tensor_bytes < exact.tensor_bytes else []
        rows += [row(f"auto at {size}", layout, f" --method auto --size {size}") for size, layout in _auto(pricer)]
    if len(plan.tasks) > 1:
        rows += [
            row(name, pricer.layout(Cutter(pricer, use).smallest()), f" --method {shlex.quote(name)}")
            for name, use in _uses(plan, all_methods)
        ]
    rows = [replace(one, is_larger=one.disk_bytes > found.disk_bytes) for one in rows]
    return sorted(rows, key=lambda one: one.disk_bytes)


def begin_with(rows: Sequence[StorageOption]) -> tuple[str, str] | None:
    """Return the name of the row to begin with, and why; None if copies as found are as good as anything."""
    for row in rows:
        if row.kept is not None and row.kept[0] >= WELL_KEPT and row.command is not None and not row.is_larger:
            exact = row.name == EXACT
            why = (
                "the smallest that loses nothing"
                if exact
                else (
                    f"the smallest of those that kept {WELL_KEPT:g} % or more of the fine-tuned score on other families"
                )
            )
            return row.name, why
    return None


def kept_by(name: str, bits: float) -> Range | None:
    """Return the least and the most that a bundle with so many bits kept. For `auto`, that is each family's measurement
    with the most bits that are no more than these; other methods have one measurement per family, at their smallest."""
    known = [
        next((kept for least, kept in reversed(points) if least <= bits + 0.05 or name != "auto"), None)
        for points in MEASURED.get(name, {}).values()
    ]
    values = [kept for kept in known if kept is not None]
    return (min(values), max(values)) if values else None


def num_weights(plan: Plan) -> int:
    """Count the weights of all tasks; a kept adapter counts as the base that it changes."""
    own = [tensor for tensor in plan.stored if tensor.class_ is not TensorClass.TIED]
    merged = sum(math.prod(tensor.shape_of(task)) for tensor in own for task in tensor.present)
    base = sum(math.prod(tensor.base_form[1]) for tensor in plan.tensors if tensor.base_form is not None)
    return max(1, merged + len(plan.kept) * base)


def _as_found(plan: Plan, weights: int) -> StorageOption:
    """Return the row of the checkpoints as they are, with the base once if adapters need it."""
    tensors = sum(member.source_bytes for member in plan.readers)
    forms = [tensor.base_form for tensor in plan.tensors if tensor.base_form is not None]
    if plan.kept:
        tensors += sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in forms)
    side = sum(sum(file.bytes for file in member.files.values()) - member.own_file_bytes for member in plan.readers)
    return StorageOption(
        name=COPIES, disk_bytes=tensors + side, served_bytes=tensors, tensor_bytes=tensors, bits=8 * tensors / weights,
        kept=(100.0, 100.0), command=None,
    )  # fmt: skip


@method(paper="", scope="element")
def one_value(_deltas: object) -> None:
    """Stand for any method that stores one dense value per group, since all of them have one price; merges nothing."""


def dense_use(name: str) -> MethodUse:
    """Return a stand-in for a method of DENSE, which has the same price and needs no torch."""
    text = format_call(name, DENSE[name])
    return MethodUse(Call(method=replace(one_value, name=name), args=DENSE[name], text=text, short=name))


def _uses(plan: Plan, every: bool) -> Iterator[tuple[str, MethodUse]]:
    names: Sequence[str] = COMMON
    if every:
        from flexmerge_cli.methods.registry import all_methods

        others = [name for name, method in all_methods().items() if name not in COMMON and not method.reads]
        names = (*COMMON, *others)
    for name in names:
        if plan.merges_products and not merges_products(parse_use(name).call):
            continue
        yield name, dense_use(name) if name in DENSE else parse_use(name)


def _auto(pricer: Pricer) -> Iterator[tuple[str, BundleLayout]]:
    """Yield `auto` at its smallest size, if that exceeds the first of AUTO_SIZES, then at all sizes that it reaches."""
    plan = pricer.plan
    if plan.settings.statistics != "all" or not plan.blocks:
        return
    search = auto(pricer, Limits())
    smallest, one = search.smallest().layout, max(1, plan.one_model_bytes)
    count = len(plan.reader_names)
    sizes = [f"{size}x" for size in AUTO_SIZES if smallest.tensor_bytes <= size * one and size <= count]
    if smallest.tensor_bytes > AUTO_SIZES[0] * one and smallest_factor(smallest) <= count:
        sizes.insert(0, f"{smallest_factor(smallest):g}x")
    for text in sizes:
        yield text, search.cut(plan.target(parse_size(text))).layout


def served_bytes(layout: BundleLayout) -> int:
    """Return the memory that all tasks take at once, in bytes."""
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
