"""Small families, plans and allocations of them, and bundles: what the engine's tests of methods have in common."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexmerge_cli import load_plan
from flexmerge_cli.allocation.allocation import from_groups
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.write import writing
from flexmerge_cli.engine.materialise import materialise_all
from flexmerge_cli.engine.sources import Sources
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.methods.registry import all_methods, format_call
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.planning.sources import open_sources

from ..families import Folders, Models, State, encoder, normal, tuned, write_family
from ..methods.variants import FASTER, arguments
from ..program import stored_sizes, succeeds

WHOLE = 1 << 24  # elements of a chunk that every tensor here fits in

DEFAULTS = {name: format_call(name, FASTER.get(name, {})) for name in all_methods()}
WORDS = {
    name: tuple(format_call(name, {**FASTER.get(name, {}), **args}) for args in arguments(method.parameters) if args)
    for name, method in all_methods().items()
}
"""Every method at every word it takes; made from the declarations, so a method is tested the day its file appears."""

NUMBERS = (
    "average", "ties:K=0.3,scope=block", "pcb:K=0.3,scope=model", "emr:gamma=tensor_mean", "consensus:K=0.3",
    "bitdelta:centre=average", "bitdelta:centre=della",
    *(f"low_bit:bits={bits},centre=none" for bits in range(1, 9)),
    "low_bit:bits=1,gain=norm", "low_bit:bits=3,levels=empirical", "low_bit:bits=4,clip=search", "low_bit:centre=base",
    "low_bit:bits=1,centre_bits=2", "low_bit:bits=2,centre_bits=3,scales=bfloat16", "low_bit:bits=5,centre_bits=4",
    "low_bit:bits=1,centre_bits=8,gain=norm,centre=base", "low_bit:centre='ties:K=0.3'", "low_bit:centre=tsv_m",
    "low_bit:centre=opcm", "low_bit:centre=della", "low_rank:rank=2,centre=base", "low_rank:fraction=0.5,centre=iso_c",
    "sparse:density=0.4", "sparse:density=1.0,centre=base", "sparse:centre=base,rescale=l2", "sparse:centre=opcm",
    "free:density=0.3,select=row", "free:density=0.2,mu=2.5,combine=replace", "free:mu=paper,mu_scope=model",
)  # fmt: skip
"""Numbers and centres that take other ways through the engine."""

TOGETHER = [(text,) for text in NUMBERS] + [
    words[first : first + 3] for words in WORDS.values() for first in range(0, len(words), 3)
]
"""Methods that take turns in one bundle."""

SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.patch_embedding.weight": (4, 3, 2, 2),
    "embeddings.scale": (),
    "encoder.layer.0.attention.self.key.weight": (1, 17),
    "encoder.layer.0.attention.self.value.weight": (0, 4),
    "encoder.layer.0.attention.self.value.bias": (0,),
    "encoder.layer.1.attention.self.key.bias": (1,),
    "encoder.layer.1.intermediate.dense.weight": (9, 14),
}
"""Odd ones, beside those of an encoder."""


def base_of(dtype: torch.dtype = torch.float32) -> State:
    odd = {name: normal(50 + i, *shape, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return encoder(dtype=dtype, width=12, layers=1) | odd


def fine_tunes(dtype: torch.dtype = torch.float32, *, num_tasks: int = 8) -> Models:
    """Some near each other, tensors that are bit-identical in some tasks or not changed, and a head of its own size."""
    base = base_of(dtype)
    common = tuned(base, 100)
    tasks = {}
    for number in range(num_tasks):
        start = {name: common[name] if number % 3 else value for name, value in base.items()}
        tasks[f"task{number}"] = tuned(start, number + 1, dtype=dtype)
        name = "encoder.layer.0.output.LayerNorm.weight"
        tasks[f"task{number}"][name] = base[name].clone()
        tasks[f"task{number}"]["classifier.weight"] = normal(number, 2 + number % 2, 3, dtype=dtype)
    for name in sorted(tasks.keys() & {"task1", "task2"}):
        tasks[name]["pooler.dense.weight"] = common["pooler.dense.weight"].clone()
        tasks[name]["encoder.layer.0.attention.self.query.bias"] = common["encoder.layer.0.attention.self.query.bias"]
    return Models(base=base, tasks=dict(list(tasks.items())[:num_tasks]))


def mixed() -> Models:
    """A dtype a task, tensors of two dtypes in one task, and a base in float32."""
    models = fine_tunes()
    for number, (name, state) in enumerate(models.tasks.items()):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)[number % 4]
        models.tasks[name] = {
            key: value.half() if number == 7 and "attention" in key else value.to(dtype) for key, value in state.items()
        }
    return models


FAMILIES = {
    "float32": fine_tunes,
    "bfloat16": lambda: fine_tunes(torch.bfloat16),
    "float16": lambda: fine_tunes(torch.float16),
    "mixed": mixed,
}

PARTITIONS = ((8,), (1, 7), (2, 6), (3, 5), (4, 4), (1, 2, 5), (2, 3, 3), (1,) * 8)
"""Sizes of groups of eight tasks."""


def planned(root: Path, models: Models, *options: object) -> Folders:
    """Write a family to disk, with its `root/plan.json`."""
    folders = write_family(root, models)
    succeeds("plan", "-q", *folders.arguments, *options, "-o", root / "plan.json")
    return folders


def plan_of(folders: Folders) -> Plan:
    return load_plan(folders.root / "plan.json")


def groups_of(num_tasks: int, index: int) -> list[tuple[int, ...]]:
    """The index-th partition of eight tasks, now of neighbours, now of tasks that lie apart; of fewer, all of them."""
    if num_tasks != 8:
        return [tuple(range(num_tasks))]
    order = [task * (1 if index % 2 else 3) % 8 for task in range(8)]
    ends = list(itertools.accumulate(PARTITIONS[index % len(PARTITIONS)]))
    return sorted(tuple(sorted(order[low:high])) for low, high in zip([0, *ends], ends))


def billed(
    plan: Plan,
    *methods: str,
    groups: Sequence[list[tuple[int, ...]]] | None = None,
    dtype: str | None = None,
    **request: Any,
) -> BundleLayout:
    """Allocate groups by block, the partitions in turn unless told; several methods take turns, too."""
    uses = tuple(parse_use(text, **request) for text in methods)
    if groups is None:
        groups = [groups_of(len(plan.tasks), index) for index in range(len(plan.blocks))]
    turns = [index % len(uses) for index in range(len(plan.blocks))]
    return Pricer(plan).layout(from_groups(plan, list(groups), methods=uses, method_of=turns, dtype=dtype))


def write_bundle(
    layout: BundleLayout,
    sources: Sources,
    side_files: Mapping[tuple[str, str], Path],
    target: Path,
    *,
    device: torch.device,
    **run: Any,
) -> Measured:
    """Write and publish a bundle. run: arguments of `materialise_all`."""
    with writing(layout, side_files, target, force=False, device=device) as product:
        materialise_all([product], sources, device=device, **run)
    return product.measured


def write(
    folders: Folders, layout: BundleLayout, target: Path, *, threads: int = 1, chunk_elements: int = CHUNK_ELEMENTS
) -> Path:
    sources = open_sources(layout.plan, folders.root)
    write_bundle(
        layout, sources.located, sources.side_files, target,
        device=torch.device("cpu"), threads=threads, chunk_elements=chunk_elements,
    )  # fmt: skip
    return target


def disk_bytes(folder: Path) -> int:
    return sum(stored_sizes(folder).values())


def edges() -> Models:
    """Everything odd at once: a task that is the base, one that another is too, constant rows, signs that cancel."""
    models = fine_tunes(num_tasks=5)
    base, names = models.base, list(models.tasks)
    models.tasks[names[1]] = {**models.tasks[names[1]], **{name: value.clone() for name, value in base.items()}}
    models.tasks[names[3]] = {**models.tasks[names[3]], **{name: models.tasks[names[2]][name].clone() for name in base}}
    for name, value in base.items():
        if value.ndim > 1 and len(value):
            for number, task in enumerate(names):
                models.tasks[task][name][0] = value[0] + 0.25 * (-1) ** number
                models.tasks[task][name][-1] = value[-1]
    return models


def vectors() -> Models:
    """Nothing but one axis: no matrix for any method to decompose."""
    base = {
        "embeddings.scale": normal(1),
        "encoder.layer.0.attention.bias": normal(2, 99),
        "encoder.layer.0.mlp.bias": normal(3, 1),
        "encoder.layer.1.attention.bias": normal(4, 0),
        "encoder.layer.1.mlp.bias": normal(5, 17),
    }
    return Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(4)})


def equals() -> Models:
    """All task vectors are one, but for one element that only some have."""
    base = base_of()
    models = Models(base=base, tasks={f"task{n}": tuned(base, 1) for n in range(3)})
    for name in base:
        if base[name].numel():
            models.tasks["task2"][name].view(-1)[0] = base[name].view(-1)[0]
    return models


EDGES = {
    "edges": edges,
    "vectors": vectors,
    "equals": equals,
    "zeros": lambda: Models(base=base_of(), tasks={f"task{n}": dict(base_of()) for n in range(3)}),
    "one": lambda: fine_tunes(num_tasks=1),
    "two": lambda: fine_tunes(num_tasks=2),
}
