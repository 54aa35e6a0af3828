"""Converts the experts of mixtures between one tensor per expert, as in files, and one stack of all, as transformers 5
has them in memory. If base and tasks differ, the base is viewed in the tasks' form. Headers only."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.tensor import StoredTensor

# A stack -> the weights that it holds for each expert, one after another by rows, under the names that they may have.
# Source: transformers 5.24, conversion_mapping.py, MergeModulelist(0) and Concatenate(1).
STACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",),),
}
STACK = re.compile(rf"((?:.*\.)?experts)\.({'|'.join(STACKS)})")
ONE = re.compile(r"((?:.*\.)?experts)\.(\d{1,6})\.(\w+)\.weight")


def in_form_of(tasks: Sequence[Checkpoint], base: Checkpoint) -> Checkpoint:
    """Return the base with its experts as all tasks have them; the base itself if the tasks have them in different
    forms."""
    stacked = [any(map(STACK.fullmatch, task.tensors)) for task in tasks]
    apart = [any(map(ONE.fullmatch, task.tensors)) for task in tasks]
    if not tasks:
        return base
    if all(stacked) and not any(apart):
        made = dict(_stacked(base.tensors))
    elif all(apart) and not any(stacked):
        made = dict(_apart(base.tensors, tasks[0].tensors))
    else:
        return base
    used = {name for names, _ in made.values() for name in names}
    tensors = {name: tensor for name, tensor in base.tensors.items() if name not in used}
    return replace(base, tensors=tensors | {name: tensor for name, (_, tensor) in made.items()}) if made else base


Made = Iterator[tuple[str, tuple[Sequence[str], StoredTensor]]]
"""Yields the name of a tensor, the names of those that it is made of, and the tensor."""


def _stacked(base: Mapping[str, StoredTensor]) -> Made:
    layers: dict[str, dict[str, dict[int, str]]] = {}
    for name in base:
        if match := ONE.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = name
    for layer, weights in layers.items():
        left = dict(weights)
        for stack, alternatives in STACKS.items():
            parts = next((parts for parts in alternatives if all(part in left for part in parts)), None)
            if parts is None:
                continue
            count = len(left[parts[0]])
            found = [left.pop(part) for part in parts]
            if not all(set(experts) == set(range(count)) for experts in found):
                continue
            names = [experts[expert] for expert in range(count) for experts in found]
            pieces = tuple(base[name] for name in names)
            first = pieces[0]
            if len(first.shape) == 2 and len({(piece.shape, piece.dtype) for piece in pieces}) == 1:
                rows, columns = first.shape
                whole = replace(first, name=f"{layer}.{stack}", shape=(count, len(parts) * rows, columns))
                yield whole.name, (names, replace(whole, pieces=pieces))


def _apart(base: Mapping[str, StoredTensor], task: Mapping[str, StoredTensor]) -> Made:
    weights = {match[3]: tensor.shape for name, tensor in task.items() if (match := ONE.fullmatch(name))}
    for name, whole in base.items():
        match = STACK.fullmatch(name)
        if match is None or len(whole.shape) != 3 or not whole.is_contiguous:
            continue
        parts = next((parts for parts in STACKS[match[2]] if all(part in weights for part in parts)), None)
        count, rows, columns = whole.shape
        if parts is None or rows % len(parts) or any(weights[part] != (rows // len(parts), columns) for part in parts):
            continue
        shape = (rows // len(parts), columns)
        for number in range(count * len(parts)):
            own = f"{match[1]}.{number // len(parts)}.{parts[number % len(parts)]}.weight"
            offset = whole.offset + number * shape[0] * columns * whole.item_bytes
            yield own, ([name], replace(whole, name=own, shape=shape, offset=offset))
