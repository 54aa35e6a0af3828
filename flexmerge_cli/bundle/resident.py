"""Predicts what a runtime of all tasks will hold in memory, from the manifest and the headers. Needs no torch.

A model's own classes decide which weights stay packed; here names and shapes tell. They are wrong about weights called
`weight` of modules that are no layers, such as the routers of mixtures of experts. What a model makes for itself, such
as the frequencies of rotary embeddings, is not counted.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family.experts import ONE

# Smaller weights are decoded once: calling their products tile by tile would cost more than it saves.
LEAST_ELEMENTS = 1 << 12
MATRIX_AXES = range(2, 5)


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes that one tensor takes for all tasks; what tasks share counts once."""

    dense: int
    """If every task's weight is decoded."""
    packed: int
    """If it stays as it is stored; the same as `dense` where it cannot."""
    stays_packed: bool
    """For at least one task."""


def packed_pieces(
    bundle: Bundle, task: str, aligned: str, shape: tuple[int, ...]
) -> dict[str, tuple[StoredTensor, int]]:
    """Map each role to the parts of a weight that can stay packed, and to the bytes that it holds of each.

    Empty if it cannot: it is small, stored otherwise, or its rows are not its first axis.
    """
    if len(shape) not in MATRIX_AXES or math.prod(shape) < LEAST_ELEMENTS:
        return {}
    stored = bundle.packed(task, aligned)
    return {} if stored is None or stored.matrix[0] != shape[0] else stored.pieces(bundle.parts_of(task))


def resident(bundle: Bundle) -> dict[str, Held]:
    """Map each aligned name to what a runtime of all sound tasks holds of the tensor, each task in its own dtype.

    Tensors that lie in the memory of another, such as tied ones, are left out.
    """
    arrays: dict[str, tuple[dict[Hashable, int], dict[Hashable, int]]] = {}
    packed_names, seen = set[str](), set[Hashable]()
    for task in bundle.sound_tasks:
        mixtures = bundle.experts(task)
        for own, name in bundle.manifest.aligned(task).items():
            key, (dtype, shape) = bundle.identity(task, name), bundle.tensor_of(task, name)
            is_weight = own.endswith(".weight") and not ONE.fullmatch(own)
            pieces = packed_pieces(bundle, task, name, shape) if is_weight else {}
            factors = [part for pair in mixtures[name].factors for part in pair] if name in mixtures else []
            num_bytes = (math.prod(shape) + sum(part.num_elements for part in factors)) * ITEM_BYTES[dtype]
            parts: dict[Hashable, int] = {(part.path, part.offset): held for part, held in pieces.values()}
            whole: dict[Hashable, int] = {key: num_bytes}
            for place, needed in enumerate((whole, parts or whole)):
                new = {found: held for found, held in needed.items() if (place, found) not in seen}
                seen |= {(place, found) for found in new}
                arrays.setdefault(name, ({}, {}))[place].update(new)
            if pieces:
                packed_names.add(name)
    return {
        name: Held(sum(dense.values()), sum(packed.values()), name in packed_names)
        for name, (dense, packed) in arrays.items()
        if dense
    }
