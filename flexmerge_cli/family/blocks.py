"""Partitions tensors, by name, into blocks that merge as one, and orders the blocks. No weights, no torch.

`component` is the paper's partition, by rules.yaml: attention, MLP and each norm of a layer are separate blocks, and so
is each embedding and projection. Names that match no rule are grouped by the deepest number and the module below it.

Blocks are in the order of computation. At each level of the names, siblings stand in the order of their words in the
rules file, and numbers in numerical order; a segment that is not a word of the file (`model`, `bert`) stands where the
first word below it does; the rest comes last, in natural order. So a layer's blocks stay together, and an encoder's
come before the decoder's. The order does not depend on the order of the names.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.rules import Rules, nearest, read_rules
from flexmerge_cli.family.split import whole_of

BLOCKS = ("component", "layer", "tensor", "model")

# Parameters that belong to a module; any other parameter (`class_embedding`, `gamma`) stands by itself.
OWN = ("weight", "bias", "weight_g", "weight_v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A set of tensors that merge as one."""

    name: str
    """The dotted path that its tensors share, e.g. `vision_model.encoder.layers.3.self_attn`. If the parts of an MLP
    lie directly in their layer, the layer's path and `mlp`."""
    tensors: tuple[str, ...]
    """The tensor names in the order given; never empty."""


def partition(names: Sequence[str], blocks: str | Path = "component") -> tuple[Block, ...]:
    """Put each name in exactly one block.

    blocks: `component`; `layer`, where all of one layer is one block and what is in no layer stands as in `component`;
    `tensor`, in the order of `component`; `model`, one block; or the path of a rules file (see rules.py). Names that
    its rules do not match are grouped by number and module, without the shipped rules.

    Parts of split tensors (split.py) at one place are a block of their own, `<block>@part0`, if the rules split; other
    rules put all parts of a tensor into its block. Parts of a model in subfolders, with tensors like
    `unet/conv_in.weight`, are partitioned one by one, without that prefix.

    Returns blocks of unique names, in order of computation. Raises ValueError if a name comes twice, UsageError if
    `blocks` or the rules file is wrong, and SourceError if there is no such file. 100 000 names take a few seconds.
    """
    if len(set(names)) != len(names):
        raise ValueError("a tensor name occurs twice")
    rules = rules_of(blocks)
    if blocks == "model":
        return (Block(name="model", tensors=tuple(names)),) if names else ()
    places: dict[str, dict[int | None, str]] = {}
    for name in names:
        whole, place = whole_of(name)
        places.setdefault(whole, {})[place] = name
    return tuple(
        found for block in _whole_blocks(list(places), blocks, rules) for found in _of_parts(block, places, rules)
    )


def _of_parts(block: Block, places: Mapping[str, Mapping[int | None, str]], rules: Rules) -> list[Block]:
    """Divide a block of whole tensors into one block per place of the split ones, if the rules split; otherwise keep
    one.

    places: whole name -> place, which is None for a tensor that is not split -> name.
    """
    if not rules.splits:
        return [replace(block, tensors=tuple(name for whole in block.tensors for name in places[whole].values()))]
    found: dict[int | None, list[str]] = {}
    for whole in block.tensors:
        for place, name in places[whole].items():
            found.setdefault(place, []).append(name)
    return [
        Block(name=block.name if place is None else f"{block.name}@part{place}", tensors=tuple(found[place]))
        for place in sorted(found, key=lambda place: -1 if place is None else place)
    ]


def _whole_blocks(names: Sequence[str], blocks: str | Path, rules: Rules) -> tuple[Block, ...]:
    """Partition tensors that are not split, part by part of the model."""
    parts: dict[str, list[str]] = {}
    for name in names:
        folder, slash, inner = name.rpartition("/")
        parts.setdefault(folder + slash, []).append(inner)
    return tuple(
        Block(name=part + block.name, tensors=tuple(part + name for name in block.tensors))
        for part in sorted(parts)
        for block in _partition(parts[part], blocks, rules)
    )


def _partition(names: Sequence[str], blocks: str | Path, rules: Rules) -> tuple[Block, ...]:
    """Partition the tensors of one folder of a model."""
    unmatched = _by_number_and_module(names)
    components = _grouped({name: rules.block_of(name) or unmatched[name] for name in names})
    order = _in_order(components, rules.rank)
    if blocks == "layer":
        layer_of = _layers(order)
        component_of = {name: path for path in order for name in components[path]}
        layers = _grouped({name: layer_of[component_of[name]] for name in names})
        # A layer stands where the first of its components does.
        return tuple(Block(name=path, tensors=layers[path]) for path in dict.fromkeys(layer_of.values()))
    if blocks == "tensor":
        return tuple(
            Block(name=name, tensors=(name,)) for path in order for name in sorted(components[path], key=_natural)
        )
    return tuple(Block(name=path, tensors=components[path]) for path in order)


def rules_of(blocks: str | Path) -> Rules:
    """Return the rules file that `blocks` names, or the default one. Raises like `partition`."""
    if not isinstance(blocks, Path) and blocks in BLOCKS:
        return _shipped_rules()
    if isinstance(blocks, Path) or blocks.lower().endswith((".yaml", ".yml")) or "/" in blocks or os.sep in blocks:
        own = read_rules(Path(blocks))
        return own if own.rules else replace(_shipped_rules(), splits=own.splits)
    choices = ", ".join(f"`{word}`" for word in BLOCKS)
    raise UsageError(f"unknown blocks `{blocks}`: neither {choices} nor a .yaml file", hint=nearest(blocks, BLOCKS))


@cache
def _shipped_rules() -> Rules:
    # libyaml takes a tenth of the time. Its messages, which files of other people can cause, differ.
    return read_rules(Path(__file__).with_name("rules.yaml"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _grouped(block_of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Invert a map from tensor to block into one from block to tensors. Keeps the order."""
    groups: dict[str, list[str]] = {}
    for name, block in block_of.items():
        groups.setdefault(block, []).append(name)
    return {block: tuple(tensors) for block, tensors in groups.items()}


def _by_number_and_module(names: Iterable[str]) -> dict[str, str]:
    """Map to `stages.0.blocks.11.mixer` for `stages.0.blocks.11.mixer.proj.weight`; outside any layer, to the module
    itself."""
    modules = {name: name.split(".") for name in names}
    for path in modules.values():
        if len(path) > 1 and path[-1] in OWN:
            path.pop()
    blocks: dict[str, str] = {}
    for name, length in _layer_lengths(modules).items():
        path = modules[name]
        if length:
            in_part = len(path) > length + 2 and _is_part(path, length + 1)  # block.3 . layer.0.SelfAttention
            path = path[: length + (3 if in_part else 1)]
        blocks[name] = ".".join(path) or name
    return blocks


def _layers(components: Iterable[str]) -> dict[str, str]:
    """Map to `encoder.layers.3` for `encoder.layers.3.self_attn`; a component outside any layer maps to itself."""
    paths = {component: component.split(".") for component in components}
    lengths = _layer_lengths(paths)
    return {component: ".".join(path[: lengths[component]]) or component for component, path in paths.items()}


def _layer_lengths(paths: Mapping[str, list[str]]) -> dict[str, int]:
    """Return the number of segments of each path that name its layer: up to the deepest number with a module below it,
    or 0.

    A number without a module below it is a place in an nn.Sequential: `blocks.11.ff.0` is in layer `blocks.11`. One
    that has layers below it, in the same module or as the first segment, belongs to a whole model: if there is
    `0.vit.layers.3.mlp`, `0.vit.pooler` is in no layer.
    """
    lengths: dict[str, int] = {}
    for key, path in paths.items():
        lengths[key] = next((i + 1 for i in range(len(path) - 2, -1, -1) if _is_layer(path, i)), 0)
    layers = sorted({".".join(path[: lengths[key]]) for key, path in paths.items()})
    for key, path in paths.items():
        above = ".".join(path[: 1 if lengths[key] == 1 else lengths[key] + 1]) + "."
        first_below = bisect_left(layers, above)
        if first_below < len(layers) and layers[first_below].startswith(above):
            lengths[key] = 0
    return lengths


def _is_layer(path: list[str], i: int) -> bool:
    return _is_numbered(path[i]) and not _is_digits(path[i + 1]) and not _is_part(path, i)


def _is_part(path: list[str], i: int) -> bool:
    """Return whether a number lies within a layer, as in `experts.5`, T5's `block.3.layer.0` and ResNet's
    `layers.1.layer.0`."""
    if not i or not _is_numbered(path[i]):
        return False
    return path[i - 1] == "experts" or (path[i - 1] == "layer" and i > 1 and _is_numbered(path[i - 2]))


def _in_order(paths: Iterable[str], rank: Mapping[str, int]) -> list[str]:
    """Sort dotted paths by the place of their segments among siblings."""
    unknown = len(rank)
    nodes: dict[tuple[int, str], int] = {}  # (parent, segment) -> node; the root is 0
    place: dict[int, int] = {}
    trails: dict[str, list[tuple[str, int]]] = {}
    for path in paths:
        trail = trails[path] = []
        node = 0
        for segment in path.split("."):
            node = nodes.setdefault((node, segment), len(nodes) + 1)
            trail.append((segment, node))
        first_below = unknown
        for segment, node in reversed(trail):
            first_below = first_below if _is_digits(segment) else rank.get(segment, first_below)
            place[node] = min(place.get(node, unknown), first_below)

    naturals = {segment: _natural(segment) for segment in {segment for _, segment in nodes}}

    def key(path: str) -> list[tuple[object, ...]]:
        return [(-1 if _is_digits(segment) else place[node], naturals[segment]) for segment, node in trails[path]]

    return sorted(trails, key=key)


def _natural(text: str) -> tuple[object, ...]:
    """Return a key that compares runs of digits as integers, of any length, and `01` and `1` by their text."""
    if text.isalpha():
        return (text, 0, "", text)
    runs = re.split(r"([0-9]+)", text)
    numbers = [run.lstrip("0") for run in runs[1::2]]
    return (*(x for run, number in zip(runs[::2], [*numbers, ""]) for x in (run, len(number), number)), text)


def _is_numbered(segment: str) -> bool:
    """Return whether `N` of a rules file matches: a number, or a word that ends in `_` and a number."""
    return _is_digits(segment.rpartition("_")[2])


def _is_digits(segment: str) -> bool:
    return segment.isascii() and segment.isdigit()
