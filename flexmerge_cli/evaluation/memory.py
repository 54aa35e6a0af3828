"""Computes how much memory scoring takes for weights before any is read. It does not count examples and activations.

Each process has one model in memory: its tensors as they are stored, and again in the dtype that it computes in, if it
is another one. The process of a curve also keeps the parts of the layouts that it has not scored yet, and makes them as
`merge` does.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.dtypes import FROM_TORCH, ITEM_BYTES
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.spec import EvalSpec
from flexmerge_cli.formats.plan_file import Plan

if TYPE_CHECKING:
    from flexmerge_cli.evaluation.in_memory import MemoryBundles

Form = tuple[str, int]
"""The dtype as in safetensors, and the number of elements."""


def forms_of_bundle(bundle: Bundle, task: str) -> list[Form]:
    """List every tensor of a task's model."""
    stored = (entry for entry in bundle.manifest.stored if task in entry.digests)
    return [(entry.dtype_of(task), math.prod(entry.shape_of(task))) for entry in stored]


def forms_of_plan(plan: Plan, task: str) -> list[Form]:
    """List every tensor of a task's model."""
    number = plan.reader_names.index(task)
    names = [*(tensor.name for tensor in plan.stored), *plan.own_names]
    given = (plan.readers[number].given(name, plan.find(name), number) for name in names)
    return [(form.dtype, math.prod(form.shape)) for form in given if form is not None]


def model_bytes(forms: Iterable[Form], dtype: str | None) -> int:
    """Return the bytes of a model that computes in dtype; None means the dtype of most of its elements."""
    elements: dict[str, int] = {}
    for stored, count in forms:
        elements[stored] = elements.get(stored, 0) + count
    computed = FROM_TORCH[dtype] if dtype is not None else max(elements, key=lambda name: elements[name], default="F32")
    casts = sum(count for stored, count in elements.items() if stored != computed)
    return sum(ITEM_BYTES[stored] * count for stored, count in elements.items()) + ITEM_BYTES[computed] * casts


def largest_model(spec: EvalSpec, source: Bundle | Plan) -> int:
    """Return the bytes of the largest model that a spec scores."""
    of = {
        task: forms_of_bundle(source, task) if isinstance(source, Bundle) else forms_of_plan(source, task)
        for task in spec.tasks
    }
    return max(model_bytes(forms, spec.settled(task).dtype) for task, forms in of.items())


def require_memory(needed: int, processes: int, max_memory: int) -> None:
    """Raise UsageError if this many processes need more. needed: bytes of one."""
    if needed * processes > max_memory:
        fewer = " or --parallel 1" if processes > 1 else ""
        raise UsageError(
            f"--max-memory {max_memory} bytes is too little: the weights of {processes} model{'s' * (processes > 1)} "
            f"at a time take {needed * processes} bytes",
            hint=f"--max-memory {needed * processes}B{fewer}",
        )


def curve_chunk(
    memory: "MemoryBundles",
    jobs: Sequence[Sequence[BundleLayout]],
    tasks: Collection[int],
    *,
    model: int,
    max_memory: int,
    processes: int,
) -> int:
    """Return the elements of one work item if the layouts of each job are made and scored in their order.

    model: bytes of one model. max_memory: of all processes. Raises UsageError if even the smallest item does not fit.
    """
    from flexmerge_cli.engine.memory import fitting
    from flexmerge_cli.engine.merge_memory import SMALLEST_CHUNK, merge_bytes
    from flexmerge_cli.engine.spans import CHUNK_ELEMENTS

    held = [(memory.most_bytes(layouts, tasks), layouts) for layouts in jobs]

    def needed(chunk: int) -> int:
        making = [
            parts + max((merge_bytes(one, memory.threads, chunk, memory.sources) for one in layouts), default=0)
            for parts, layouts in held
        ]
        return processes * max(model, *making, *(parts + model for parts, _ in held))

    return fitting(needed, CHUNK_ELEMENTS, SMALLEST_CHUNK, max_memory, memory.threads * processes)
