"""Maps the tensor names of a task to those of the base, from headers alone.

A fine-tune wraps the base (`bert.encoder…` for `encoder…`), is unwrapped from it, is one tower of it, or was saved by
another version of the same library, which moved its parts (`model.language_model.…` for `language_model.model.…`). So a
model's names may differ by several renames of their first segments, in addition to spellings (spelling.py). The rename
under which most tensors of equal name and shape coincide is taken first, then the next among what is left. A rename
only adds, drops or moves segments that wrap a model: it never turns `vision_model.` into `text_model.`. If two renames
are equally good and no name decides, none is taken and the alignment says so.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family import spelling
from flexmerge_cli.family.spelling import Spelling, spelled

Tensors = Mapping[str, StoredTensor]
T = TypeVar("T")

# Wrappers have one to three segments. Without a bound, one name of a million dots takes 10^12 steps.
MAX_PREFIX_SEGMENTS = 16
# A common end that more of the base's tensors have does not show which of them is meant.
MAX_SAME_ENDS = 128  # the deepest models have 126 layers
MAX_RENAMES = 32
# After the first, a rename of fewer tensors is taken only if it concerns segments that are known to wrap models: the
# `dense.weight` of two different heads may have one shape by chance.
MIN_TENSORS = 8
# Segments that do not show what they wrap.
NEUTRAL = frozenset({"model", "module", "base_model"})
WRAPPERS = NEUTRAL | {
    "language_model", "text_model", "vision_model", "vision_tower", "visual", "audio_tower", "multi_modal_projector",
    "transformer", "backbone", "timm_model",
}  # fmt: skip
# Words that name a tower in class names and in tensor names.
TOWERS = {
    "vision": ("vision", "visual", "image"), "text": ("text", "language"), "audio": ("audio", "speech"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rename:
    """A change of the first segments of a name. `#` stands for any number, in the same order on both sides."""

    old: tuple[str, ...]
    new: tuple[str, ...]

    def apply(self, name: str) -> str | None:
        """Return the new name; None if the name does not begin with the old segments."""
        segments = name.split(".")
        start, rest = segments[: len(self.old)], segments[len(self.old) :]
        if _abstract(start) != self.old or not rest:
            return None
        numbers = (segment for segment in start if segment.isdecimal())
        return ".".join([next(numbers) if segment == "#" else segment for segment in self.new] + rest)

    @property
    def changed(self) -> set[str]:
        """The segments that the rename adds, drops or moves."""
        old, new = Counter(self.old), Counter(self.new)
        moved = set(self.old) if old == new and self.old != self.new else set()
        return set((old - new) + (new - old)) | moved

    def __str__(self) -> str:
        old, new = (".".join((*segments, "*")) for segments in (self.old, self.new))
        return f"`{old}` as `{new}`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """How a task's tensor names map to the base's."""

    names: dict[str, str]
    """Own name -> aligned name, one to one: the base's name, or a name of its own for a tensor that the base lacks."""
    matched: frozenset[str]
    """The own names of tensors that the base has with the same shape."""
    renames: tuple[Rename, ...] = ()
    """The renames in the order of how many tensors they match, not counting spellings."""
    unclear: tuple[Rename, ...] = ()
    """Renames that are equally good, so that none is taken."""

    @property
    def wrapper(self) -> str:
        """The prefix that all of the task's names have and the base's lack; empty, or ends in a dot."""
        renames = [rename for rename in self.renames if rename.old != rename.new]
        return "".join(f"{segment}." for segment in renames[0].old) if len(renames) == 1 and not renames[0].new else ""


def same_shape(task: StoredTensor, base: StoredTensor) -> bool:
    return task.shape == base.shape


def align(
    base: Tensors,
    task: Mapping[str, T],
    *,
    model_types: tuple[str, ...] = (),
    kind: str = "",
    fits: Callable[[T, StoredTensor], bool] = same_shape,  # type: ignore[assignment]
) -> Alignment:
    """Find the names, in O(names x segments) for each spelling.

    model_types: those of the configs of both, whose spellings are tried. kind: what is known about the task in words,
    such as its class, which decides between towers. fits: whether a task's tensor may be a tensor of the base.
    """
    best: Alignment | None = None
    for of_base, of_task in _spellings(model_types):
        found = _aligned(base, task, spelled(base, of_base), spelled(task, of_task), kind, fits)
        if best is None or len(found.matched) > len(best.matched):
            best = found
        if len(best.matched) in (len(task), len(base)):
            break
    assert best is not None
    return best


def _spellings(model_types: tuple[str, ...]) -> Iterator[tuple[Spelling, Spelling]]:
    yield spelling.plain, spelling.plain
    for of_type in spelling.by_type(model_types):

        def both(name: str, of_type: Spelling = of_type) -> str:
            return of_type(spelling.plain(name))

        yield from ((both, both), (both, spelling.plain), (spelling.plain, both))


@dataclass(slots=True)
class _Search:
    """The names not matched yet, by spelled name, and the pairs found."""

    task: set[str]
    base: set[str]
    pairs: dict[str, str] = field(default_factory=dict)
    renames: list[Rename] = field(default_factory=list)
    unclear: tuple[Rename, ...] = ()

    def live(self, found: Mapping[str, str]) -> dict[str, str]:
        return {task: base for task, base in found.items() if task in self.task and base in self.base}

    def take(self, rename: Rename, found: Mapping[str, str]) -> None:
        self.renames.append(rename)
        self.pairs |= found
        self.task -= set(found)
        self.base -= set(found.values())


def _aligned(
    base: Tensors,
    task: Mapping[str, T],
    base_names: Mapping[str, str],
    task_names: Mapping[str, str],
    kind: str,
    fits: Callable[[T, StoredTensor], bool],
) -> Alignment:
    """Align for one pair of spellings. base_names and task_names: own name -> spelled name."""
    own_base = {new: own for own, new in base_names.items()}
    own_task = {new: own for own, new in task_names.items()}
    candidates = _candidates(
        {new: task[own] for new, own in own_task.items()}, {new: base[own] for new, own in own_base.items()}, fits
    )
    search = _Search(set(own_task), set(own_base))
    groups = {rename: found for rename, found in candidates.items() if not _is_other_tower(rename, kind)}
    while len(search.renames) < MAX_RENAMES:
        groups = {rename: live for rename, found in groups.items() if (live := search.live(found))}
        usable = {rename: found for rename, found in groups.items() if not search.renames or _is_sure(rename, found)}
        if not usable:
            break
        most = max(map(len, usable.values()))
        best = [rename for rename, found in usable.items() if len(found) == most]
        chosen = _chosen(best, usable, kind)
        if chosen is not None:
            search.take(chosen, usable[chosen])
            continue
        if not search.renames:
            search.unclear = tuple(sorted(best, key=str))
            break
        for rename in best:
            del groups[rename]
    matched = frozenset(own_task[name] for name in search.pairs)
    pairs = dict(search.pairs)
    _pair_misfits(search, pairs)
    names = {own_task[new]: own_base[found] for new, found in pairs.items()}
    result = Alignment(names=names, matched=matched, renames=tuple(search.renames), unclear=search.unclear)
    taken = set(names.values())
    for own in task:
        if own not in names:
            aligned = spelling.plain(own).removeprefix(result.wrapper) or own
            while aligned in taken or aligned in base:
                aligned = "//" + aligned
            names[own] = aligned
            taken.add(aligned)
    return result


def _pair_misfits(search: _Search, pairs: dict[str, str]) -> None:
    """Pair tensors that have the same name after the renames but different shapes, such as a resized vocabulary."""
    for rename in () if search.unclear else (*search.renames, Rename((), ())):
        for name in sorted(search.task):
            renamed = rename.apply(name)
            if renamed is not None and renamed in search.base:
                pairs[name] = renamed
                search.task.discard(name)
                search.base.discard(renamed)


def _candidates(
    task: Mapping[str, T], base: Tensors, fits: Callable[[T, StoredTensor], bool]
) -> dict[Rename, dict[str, str]]:
    """Return rename -> task's name -> base's name. For each name, only its longest end counts that a fitting tensor
    shares."""
    ends: dict[str, list[tuple[str, str]]] = {}
    for name in base:
        for start, end in _splits(name):
            ends.setdefault(end, []).append((start, name))
    found: dict[Rename, dict[str, str]] = {}
    renamed = cache(_rename)  # many names have the same few starts
    for name, tensor in task.items():
        for start, end in _splits(name):
            hits = ends.get(end, ())
            renames = [
                (rename, other)
                for of_base, other in (hits if len(hits) <= MAX_SAME_ENDS else ())
                if fits(tensor, base[other])
                and (rename := renamed(start, of_base, "." in end)) is not None
                and rename.apply(name) == other  # which it is not where empty segments look like none
            ]
            for rename, other in renames:
                found.setdefault(rename, {})[name] = other
            if renames:
                break
    return found


def _rename(old: str, new: str, has_module: bool) -> Rename | None:
    """Return the rename of one start to another; None if it is more than a change of wrappers, or too little is left.

    has_module: whether more than the parameter's own name follows.
    """
    if old and new and not has_module:
        return None
    starts = [start.rstrip(".").split(".") if start else [] for start in (old, new)]
    numbers = [[segment for segment in start if segment.isdecimal()] for start in starts]
    words = [Counter(segment for segment in _abstract(start) if segment not in NEUTRAL) for start in starts]
    if numbers[0] != numbers[1] or not (words[0] <= words[1] or words[1] <= words[0]):
        return None
    return Rename(_abstract(starts[0]), _abstract(starts[1]))


def _abstract(segments: list[str]) -> tuple[str, ...]:
    return tuple("#" if segment.isdecimal() else segment for segment in segments)


def _is_sure(rename: Rename, found: Mapping[str, str]) -> bool:
    return len(found) >= MIN_TENSORS or rename.changed <= WRAPPERS


def _chosen(best: list[Rename], found: Mapping[Rename, Mapping[str, str]], kind: str) -> Rename | None:
    """Choose among the renames that match equally many tensors; None if two of them exclude each other and no name
    decides."""
    for first in (
        [rename for rename in best if rename.old == rename.new],
        [rename for rename in best if not (set(rename.old) | set(rename.new)) - NEUTRAL],
        [rename for rename in best if _names_tower(rename, kind)],
        best,
    ):
        if len(first) == 1 or (first and not _clash(first, found)):
            return min(first, key=lambda rename: (len(rename.old) + len(rename.new), str(rename)))
    return None


def _clash(renames: list[Rename], found: Mapping[Rename, Mapping[str, str]]) -> bool:
    """Return whether two of them concern one tensor, of the task or of the base."""
    of_task, of_base = Counter[str](), Counter[str]()
    for rename in renames:
        of_task.update(found[rename].keys())
        of_base.update(set(found[rename].values()))
    return max(of_task.values()) > 1 or max(of_base.values()) > 1


def _towers(words: str) -> set[str]:
    return {tower for tower, names in TOWERS.items() if any(name in words.lower() for name in names)}


def _names_tower(rename: Rename, kind: str) -> bool:
    return bool(_towers(kind) & _towers(".".join(rename.changed)))


def _is_other_tower(rename: Rename, kind: str) -> bool:
    """Return whether a rename leads into a tower other than the one that the task's class names."""
    mine, theirs = _towers(kind), _towers(".".join(rename.changed))
    return len(mine) == 1 and bool(theirs) and not mine & theirs


def _splits(name: str) -> list[tuple[str, str]]:
    """Split a name into ("", name), then at its first dots: ("a.", "b.c"), ("a.b.", "c")."""
    cuts: list[int] = []
    position = name.find(".") + 1
    while position and len(cuts) < MAX_PREFIX_SEGMENTS:
        cuts.append(position)
        position = name.find(".", position) + 1
    return [("", name)] + [(name[:cut], name[cut:]) for cut in cuts]
