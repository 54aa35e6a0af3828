"""Converts tensors that some versions of a model have fused and others apart, such as `qkv` for `q_proj`, `k_proj`,
`v_proj`, or with two axes swapped. If base and tasks differ, the base is viewed in the tasks' form. Only headers are
read.

transformers_names.json lists these tensors by model type (spelling.py). experts.py handles the experts of mixtures.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family import spelling

Tensors = Mapping[str, StoredTensor]
MAX_PIECES = 4096
"""The largest number of equal runs of rows that one tensor is read from."""


@dataclass(frozen=True, slots=True)
class Word:
    """A part of tensor names, as transformers_names.json has it."""

    text: str

    def of(self, name: str) -> re.Match[str] | None:
        """Find the word in a name, but not within a longer word."""
        before, behind = (r"(?<!\w)" if self.text[0] != "." else "", r"(?!\w)" if self.text[-1] != "." else "")
        return re.search(before + re.escape(self.text) + behind, name)

    def instead(self, other: "Word", name: str) -> str | None:
        """Return the name with the other word in place of this one; None if this one is not in it."""
        found = self.of(name)
        return None if found is None else name[: found.start()] + other.text + name[found.end() :]

    def among(self, names: Iterable[str]) -> bool:
        return any(self.of(name) for name in names)


@dataclass(frozen=True, slots=True)
class FusedRows:
    """A tensor that consists of the rows of others, one after another."""

    whole: Word
    parts: tuple[Word, ...]

    def forms(self, names: Sequence[str]) -> set[str]:
        """Return which of the two forms a model has: `whole`, `parts`, both or none."""
        found = {"whole"} if self.whole.among(names) else set()
        return found | ({"parts"} if all(part.among(names) for part in self.parts) else set())


def in_form_of(tasks: Sequence[Checkpoint], base: Checkpoint) -> Checkpoint:
    """Return the base with its tensors fused or apart, and with their axes, as in all tasks.

    Tensors that the tasks have under the same name stay as they are: a tower may have fused what another has apart.
    Returns the base itself if the tasks have them in different forms.
    """
    if not tasks:
        return base
    types = spelling.model_types(base.config, *(task.config for task in tasks))
    spellings: list[Callable[[str], str]] = [str, *spelling.by_type(types)]
    rows, turned = _rules(types)
    tensors: dict[str, StoredTensor] = dict(base.tensors)
    there = {way(name) for name in tasks[0].tensors for way in spellings}
    lacking = {name for name in tensors if not any(way(name) in there for way in spellings)}
    for rule in rows:
        forms = [rule.forms(list(task.tensors)) for task in tasks]
        if any(form != forms[0] for form in forms) or (len(forms[0]) == 2 and len(lacking) == len(tensors)):
            continue
        if "parts" in forms[0]:
            _cut(tensors, rule, spellings, lacking, tasks[0].tensors)
        if "whole" in forms[0]:
            _join(tensors, rule, spellings, lacking, tasks[0].tensors)
    for old, new in turned:
        shapes = [{tensor.shape for name, tensor in task.tensors.items() if new.of(name)} for task in tasks]
        _turn(tensors, old, new, spellings, set.intersection(*shapes))
    return replace(base, tensors=tensors) if tensors != base.tensors else base


def for_modules(weights: Sequence[str], base: Checkpoint) -> Checkpoint:
    """Return the base with its tensors apart, in equal parts, if adapters change such parts.

    weights: the weights of the modules that they change.
    """
    types = spelling.model_types(base.config)
    rows, _ = _rules(types)
    if not any(part.among(weights) for rule in rows for part in rule.parts if not rule.whole.among(weights)):
        return base
    tensors = dict(base.tensors)
    for rule in rows:
        _cut(tensors, rule, [str, *spelling.by_type(types)], set(base.tensors))
    return replace(base, tensors=tensors)


def mixed(tasks: Mapping[str, Checkpoint]) -> list[str]:
    """Describe what some tasks have fused and others apart, and what to do about it."""
    found = []
    types = spelling.model_types(*(task.config for task in tasks.values()))
    for rule in _rules(types)[0]:
        of = {name: rule.forms(list(task.tensors)) for name, task in tasks.items()}
        one, apart = ([name for name, forms in of.items() if forms == {form}] for form in ("whole", "parts"))
        if one and apart:
            parts = ", ".join(f"`{part.text}`" for part in rule.parts)
            found.append(
                f"task `{one[0]}` has `{rule.whole.text}` in one tensor, task `{apart[0]}` has {parts} apart: these "
                "are stored unmerged; save all tasks with one version of transformers to merge them"
            )
    return found


def _rules(types: Iterable[str]) -> tuple[list[FusedRows], list[tuple[Word, Word]]]:
    forms = [spelling.forms().get(each, {}) for each in types]
    rows = [FusedRows(Word(whole), tuple(map(Word, parts))) for of in forms for whole, parts in of.get("rows", ())]
    turned = [(Word(old), Word(new)) for of in forms for old, new in of.get("turned", ())]
    return list(dict.fromkeys(rows)), list(dict.fromkeys(turned))


def _renamed(
    names: Iterable[str], word: Word, other: Word, spellings: Iterable[Callable[[str], str]]
) -> Iterator[tuple[str, str]]:
    """Yield (name, new name) for every name that has the word in it, or in another spelling of it."""
    for name in names:
        new = next((new for way in spellings if (new := word.instead(other, way(name)))), None)
        if new is not None:
            yield name, new


def _join(
    tensors: dict[str, StoredTensor],
    rule: FusedRows,
    spellings: Sequence[Callable[[str], str]],
    lacking: Collection[str],
    task: Tensors,
) -> None:
    """Join those of the base's parts that the tasks lack. task: a task whose whole tensors give the shapes."""
    shapes = {tensor.shape for name, tensor in task.items() if rule.whole.of(name)}
    found: dict[str, dict[int, str]] = {}
    for place, part in enumerate(rule.parts):
        for name, whole in _renamed([name for name in tensors if name in lacking], part, rule.whole, spellings):
            found.setdefault(whole, {})[place] = name
    for whole, places in found.items():
        if whole in tensors or len(places) < len(rule.parts):
            continue
        names = [places[place] for place in range(len(rule.parts))]
        parts = [tensors[name] for name in names]
        if len({(len(part.shape), part.shape[1:], part.dtype) for part in parts}) > 1 or not parts[0].shape:
            continue
        step = math.gcd(*(part.shape[0] for part in parts))  # all pieces have one shape
        if not step or sum(part.shape[0] for part in parts) // step > MAX_PIECES:
            continue
        pieces = tuple(part.take(((row, step),)) for part in parts for row in range(0, part.shape[0], step))
        shape = (step * len(pieces), *parts[0].shape[1:])
        if shape not in shapes:
            continue
        for name in names:
            del tensors[name]
        tensors[whole] = replace(parts[0], name=whole, shape=shape, pieces=pieces)


def _cut(
    tensors: dict[str, StoredTensor],
    rule: FusedRows,
    spellings: Sequence[Callable[[str], str]],
    lacking: Collection[str],
    task: Tensors | None = None,
) -> None:
    """Cut those of the base's whole tensors into parts that the tasks lack.

    task: a task whose parts give the numbers of rows; under other names, they are the same in every layer. None for
    equal parts.
    """
    ends: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name, one in (task or {}).items():
        ends.setdefault(name.rpartition(".")[2], []).append((name, one))
    of_base = [name for name in tensors if name in lacking]
    names = [dict(_renamed(of_base, rule.whole, part, spellings)) for part in rule.parts]
    for own in names[0]:
        whole, of_parts = tensors[own], [found[own] for found in names]
        end = of_parts[0].rpartition(".")[2]
        if task is None:
            equal = (whole.shape[0] // len(of_parts), *whole.shape[1:]) if whole.shape else ()
            shapes = [{equal}] * len(of_parts)
        else:
            shapes = [
                {task[new].shape} if new in task else {one.shape for name, one in ends.get(end, ()) if part.of(name)}
                for new, part in zip(of_parts, rule.parts)
            ]
        if any(len(each) != 1 for each in shapes) or any(name in tensors for name in of_parts):
            continue
        parts = [next(iter(each)) for each in shapes]
        rows = sum(shape[0] for shape in parts if shape)
        if not rows or any((rows, *shape[1:]) != whole.shape for shape in parts):
            continue
        first = 0
        del tensors[own]
        for name, shape in zip(of_parts, parts):
            tensors[name] = replace(whole.take(((first, shape[0]),)), name=name)
            first += shape[0]


def _turn(
    tensors: dict[str, StoredTensor],
    old: Word,
    new: Word,
    spellings: Sequence[Callable[[str], str]],
    wanted: Iterable[tuple[int, ...]],
) -> None:
    """Swap the last two axes of the base's tensors, under either of the two names, to get the shapes of the tasks."""
    shapes = set(wanted)
    named = [*_renamed(tensors, old, new, spellings), *_renamed(tensors, new, new, spellings)]
    for own, name in dict(named).items():
        tensor = tensors[own]
        if len(tensor.shape) < 2 or not tensor.is_contiguous or tensor.stream is not None:
            continue
        *outer, rows, columns = tensor.shape
        turned = (*outer, columns, rows)
        if tensor.shape in shapes or turned not in shapes or (name != own and name in tensors):
            continue
        strides = (*(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(outer))), 1, columns)
        del tensors[own]
        tensors[name] = replace(tensor, name=name, shape=turned, strides=strides)
