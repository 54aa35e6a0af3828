"""Maps the tensor names of a task to those of the base. Headers in, a map of names out.

A fine-tune often wraps the base (`bert.encoder…` for `encoder…`) or is unwrapped from it. The prefix, of whole
segments and on either side, is the one under which most tensors of equal name and shape coincide; ties: the shortest.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from flexmerge_cli.checkpoint.tensor import StoredTensor

Tensors = Mapping[str, StoredTensor]

# Wrappers have one to three segments. Without a bound, one name of a million dots takes 10^12 steps.
MAX_PREFIX_SEGMENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How a task's tensor names map to the base's."""

    task_prefix: str
    """The prefix dropped from the task's names; empty, or ends in a dot. One of the two prefixes is always empty."""
    base_prefix: str
    """The prefix added to the task's names."""
    num_matched: int
    """The number of tensors of equal name and shape."""

    def aligned(self, own: str) -> str:
        """The base's name of a task's tensor. A task's tensor outside the wrapper keeps its own name."""
        if self.task_prefix:
            return own.removeprefix(self.task_prefix)
        return self.base_prefix + own


def align(base: Tensors, task: Tensors) -> Alignment:
    """Find the prefix. O(names x segments)."""
    matches: Counter[tuple[str, str]] = Counter({("", ""): 0})
    for name, tensor in task.items():
        for prefix, rest in _splits(name):
            if rest in base and base[rest].shape == tensor.shape:
                matches[prefix, ""] += 1
    for name, tensor in base.items():
        for prefix, rest in _splits(name):
            if prefix and rest in task and task[rest].shape == tensor.shape:
                matches["", prefix] += 1
    best = max(matches.items(), key=lambda item: (item[1], -_length(item[0]), item[0][0] == "", item[0]))
    (task_prefix, base_prefix), num_matched = best
    return Alignment(task_prefix=task_prefix, base_prefix=base_prefix, num_matched=num_matched)


def aligned_names(alignment: Alignment, base: Tensors, task: Tensors) -> dict[str, str]:
    """Own name -> aligned name, one to one.

    With a prefix on the base's side only names that the base has take it (a head that the fine-tune added does not).
    Where two would fall on one name, the one in the wrapper has it and the other keeps its full name under `//`.
    """
    taken: dict[str, str] = {}
    ordered = sorted(task, key=lambda own: not own.startswith(alignment.task_prefix))
    for own in ordered:
        aligned = alignment.aligned(own)
        if alignment.base_prefix and aligned not in base:
            aligned = own
        while aligned in taken:
            aligned = "//" + aligned
        taken[aligned] = own
    return {own: aligned for aligned, own in taken.items()}


def _splits(name: str) -> list[tuple[str, str]]:
    """("", name), then the cuts at its first dots: ("a.", "b.c"), ("a.b.", "c")."""
    cuts: list[int] = []
    position = name.find(".") + 1
    while position and len(cuts) < MAX_PREFIX_SEGMENTS:
        cuts.append(position)
        position = name.find(".", position) + 1
    return [("", name)] + [(name[:cut], name[cut:]) for cut in cuts]


def _length(prefixes: tuple[str, str]) -> int:
    return len(prefixes[0]) + len(prefixes[1])
