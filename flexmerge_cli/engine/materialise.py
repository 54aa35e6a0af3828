"""Runs `merge`: turns source weights into the arrays of layouts, and measures what was lost.

Each weight is read once here, for all layouts; statistics_pass.py reads it before for what methods and forms must know
about the whole. Threads take ranges of one tensor over base and tasks (work.py); one thread takes hashes and sums, in
order, so that neither bytes nor numbers depend on the number of threads.
"""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import cached_property

from flexmerge_cli.allocation.layout import BundleLayout
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.engine.device import single_threaded
from flexmerge_cli.engine.encode import Piece
from flexmerge_cli.engine.journal import Journal
from flexmerge_cli.engine.output import Sink
from flexmerge_cli.engine.pool import Buffers, ordered_map, with_fallback
from flexmerge_cli.engine.product import Making, Product
from flexmerge_cli.engine.runs import RUN_ELEMENTS
from flexmerge_cli.engine.sources import BASE, Sources
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS, Span, cut
from flexmerge_cli.engine.work import Worker
from flexmerge_cli.later import torch
from flexmerge_cli.methods.method import Scope


def materialise(
    layout: BundleLayout,
    sources: Sources,
    output: Sink,
    *,
    device: "torch.device",
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
    journal: Journal | None = None,
    share: Collection[str] | None = None,
) -> Measured:
    """Write the parts of one layout to `output`; see `materialise_all`.

    The layout may have only some units and groups, as in evaluation/in_memory.py: what they store does not depend on
    the rest.
    """
    product = Product(layout=layout, output=output, journal=journal, share=share)
    materialise_all(
        [product], sources, device=device, threads=threads, chunk_elements=chunk_elements, on_bytes=on_bytes,
        on_stage=on_stage,
    )  # fmt: skip
    return product.measured


def materialise_all(
    products: Sequence[Product],
    sources: Sources,
    *,
    device: "torch.device",
    threads: int,
    chunk_elements: int = CHUNK_ELEMENTS,
    on_bytes: Callable[[int], None] = lambda _count: None,
    on_stage: Callable[[str], None] = lambda _name: None,
) -> None:
    """Write the parts of all products, whose layouts are of one plan. Raises DataError if a source is not what the plan
    saw.

    chunk_elements: a multiple of RUN_ELEMENTS. on_bytes is called with the number of source bytes read.
    """
    assert chunk_elements % RUN_ELEMENTS == 0
    with Reader() as reader, single_threaded(), ExitStack() as stack:
        for product in products:
            stack.enter_context(product.output)
        buffers = Buffers()
        workers = [Worker(product.layout, sources, reader, device, buffers) for product in products]
        for worker in workers:
            worker.on_bytes = on_bytes
        run = _Run([Making(*pair) for pair in zip(products, workers)], threads, chunk_elements, on_stage)
        for product, making in zip(products, run.makings):
            product.on_rest([*making.rest])
        run.write()


class _Run:
    """One run: what is read when."""

    def __init__(
        self, makings: Sequence[Making], threads: int, chunk_elements: int, on_stage: Callable[[str], None]
    ) -> None:
        self.makings, self.plan = makings, makings[0].plan
        self.threads, self.chunk_elements, self.on_stage = threads, chunk_elements, on_stage

    def spans(self, name: str, *scopes: Scope) -> list[Span]:
        tensor = self.plan.tensor(name)
        # Private tensors may differ in shape; each task's own length is cut in the same way.
        shapes = [*(tensor.shapes or ()), tensor.base_shape]
        sizes = [math.prod(shape) for shape in shapes if shape is not None]
        return cut(name, max([tensor.num_elements, *sizes]), tensor.shape, scopes, self.chunk_elements)

    def items(self) -> list[list[Span]]:
        """List what is visited together: one range of a tensor or, for methods of scope `block`, all tensors of a
        unit."""
        # Use the order of parts in the files of the first, so that files are mostly written, and hashed, front to back.
        first = {name: storage for making in reversed(self.makings) for name, storage in making.rest.items()}

        def place(name: str) -> tuple[int, str]:
            part = first[name].parts[0]
            return -ITEM_BYTES[part.array.dtype], part.name

        units: dict[object, list[Span]] = {}
        items: list[list[Span]] = []
        for name in sorted(first, key=place):
            scopes = [making.scope(making.rest[name]) for making in self.makings if name in making.rest]
            spans = self.spans(name, *scopes)
            if "block" in scopes:
                # A unit is a block or one of its tensors.
                found = [making.unit_of[name] for making in self.makings if name in making.unit_of]
                unit = max(found, key=lambda unit: len(unit.tensors)).name
                if unit not in units:
                    items.append(units.setdefault(unit, []))
                units[unit] += spans
            else:
                items += [[span] for span in spans]
        return items

    @cached_property
    def models(self) -> dict[str, tuple[int, ...]]:
        """The models that must be read for each tensor, as `Worker.models`."""
        of_tensors: dict[str, set[int]] = {}
        for making in self.makings:
            for name, storage in making.rest.items():
                of_tensors.setdefault(name, set()).update(making.worker.models(storage))
        return {name: (*sorted(found - {BASE}), *({BASE} & found)) for name, found in of_tensors.items()}

    def visit(self, item: Sequence[Span]) -> list[dict[str, Piece]]:
        """Read an item, and return the pieces of each product."""
        worker = self.makings[0].worker
        raws = {
            span.tensor: worker.read(span, self.models[span.tensor], place, digests=True)
            for place, span in enumerate(item)
        }
        found: list[tuple[Making, dict[str, Piece]]] = []
        for making in self.makings:
            found.append((making, making.visit(raws, found)))
        if len(item) > 1:
            worker.buffers.drop()  # they are buffers for each tensor of the unit, and the next unit has other tensors
        return [pieces for _, pieces in found]

    def visit_on_cpu(self, item: Sequence[Span]) -> list[dict[str, Piece]]:
        with ExitStack() as stack:
            for making in self.makings:
                stack.enter_context(making.worker.on_cpu())
            return self.visit(item)

    def write(self) -> None:
        known: dict[object, object] = {}
        for making in self.makings:
            making.measure(self.spans, self.threads, self.on_stage, known)
        self.on_stage("merge")
        items = self.items()

        def work(place: int) -> list[dict[str, Piece]]:
            for item in items[place + self.threads + 1 : place + self.threads + 2]:
                for span in item:
                    self.makings[0].worker.will_need(span, self.models[span.tensor])
            return with_fallback(
                lambda: self.visit(items[place]), lambda: self.visit_on_cpu(items[place]), warnings.warn
            )

        with ordered_map(range(len(items)), work, threads=self.threads, device=self.makings[0].worker.device) as visits:
            for item, visited in zip(items, visits):
                for making, pieces in zip(self.makings, visited):
                    for span in item:
                        if span.tensor in pieces:
                            making.join(span, pieces[span.tensor])
        for making in self.makings:
            making.finish()
