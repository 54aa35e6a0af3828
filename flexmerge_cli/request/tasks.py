"""Finds the fine-tunes that a folder, a Hub repository or a list of models holds, and their names. Reads no weights."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import find_weights
from flexmerge_cli.checkpoint.hub import checkpoints_in
from flexmerge_cli.checkpoint.place import HubPlace, is_hub, is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.family.family import find_tasks
from flexmerge_cli.text import expanded


@dataclass(slots=True)
class FoundTasks:
    """The fine-tunes that several places hold."""

    sources: dict[str, str] = field(default_factory=dict)
    """Maps each task to its source; local sources are absolute."""
    places: dict[str, str] = field(default_factory=dict)
    """Maps each task to the place it was found in."""
    folders: set[str] = field(default_factory=set)
    """Tasks that are subfolders, which --ignore can skip."""
    patterns: tuple[str, ...] = ()
    """The values of --ignore that are not subfolders: patterns of files of the sources."""
    warnings: list[str] = field(default_factory=list)
    """What was left out, and why."""


def found_tasks(
    places: Sequence[str], base: str, start: Path, *, ignore: Collection[str] = (), access: Access
) -> FoundTasks:
    """Find the tasks of every place: the place itself if it is a model, else one per subfolder that holds a model.

    base: its source, relative to `start`; it is not a task. A subfolder that looks like a model but has no weights is
    an error unless it is ignored. Raises UsageError, SourceError.
    """
    found, unknown = FoundTasks(), set(ignore)
    for place in places:
        if not is_remote(place) and expanded(place).is_dir() and find_weights(expanded(place)) is not None:
            _add(found, name_of(place), str(expanded(place).absolute()), place)
            continue
        for name, source in _inside(found, place, base, start, unknown, access).items():
            _add(found, name, source, place)
            found.folders.add(name)
    found.patterns = tuple(name for name in ignore if name in unknown)
    return found


def name_of(source: str) -> str:
    """Return the name of a task that was not given one: the last folder of its source, or the repository."""
    if is_hub(source):
        place = HubPlace.of(source)
        return PurePosixPath(place.folder or place.repository).name
    path = PurePosixPath(source.rstrip("/"))
    return path.parent.name if path.suffix in (".safetensors", ".bin", ".pt") else path.name


def identity(source: str, start: Path) -> object:
    """Return a key that is equal for two source strings of one model, as far as is known without reading it."""
    if is_hub(source):
        place = HubPlace.of(source)
        return place.repository, place.folder
    if is_remote(source):
        return source
    path = start / expanded(source)
    path = path.parent if path.is_file() else path  # the source names a weight file
    return path.resolve()


def _add(found: FoundTasks, name: str, source: str, place: str) -> None:
    known = next((other for other in found.sources if other.lower() == name.lower()), None)
    if known is not None:
        raise UsageError(
            f"two tasks have the same name: `{known}` of {found.places[known]} and `{name}` of {place} "
            "(case is ignored)",
            hint=f"name one of them: --task NAME={source}",
        )
    found.sources[name], found.places[name] = source, place


def _inside(
    all_found: FoundTasks, place: str, base: str, start: Path, unknown: set[str], access: Access
) -> dict[str, str]:
    if is_remote(place) and not is_hub(place):
        raise UsageError(
            f"--tasks {place} is neither a folder nor a Hub repository", hint="name each task: --task NAME=SOURCE"
        )
    found = checkpoints_in(place, access) if is_hub(place) else find_tasks(expanded(place))
    for name in list(unknown):
        kinds = (found.models, found.unfinished, found.others)
        if any(name in kind for kind in kinds):
            unknown.remove(name)
            for kind in kinds:
                kind.pop(name, None)
    if found.unfinished:
        lines = [f"`{name}` {why}" for name, why in found.unfinished.items()]
        left_out = " ".join(f"--ignore {name}" for name in found.unfinished)
        raise SourceError(
            f"some models in {place} are incomplete:\n  " + "\n  ".join(lines),
            hint=f"complete them, or skip them with {left_out}",
        )
    if not found.models:
        example = "hf://…" if is_hub(place) else "PATH"
        raise SourceError(f"no checkpoint in any subfolder of {place}", hint=f"name each task: --task NAME={example}")
    of_base = identity(base, start)
    for name in [name for name, source in found.models.items() if identity(source, Path()) == of_base]:
        del found.models[name]
        found.others[name] = "the base"
    if found.others:
        left_out = ", ".join(f"{name} ({why})" for name, why in sorted(found.others.items()))
        all_found.warnings.append(f"skipped in {place}: {left_out}")
    return {name: source if is_hub(place) else str(Path(source).absolute()) for name, source in found.models.items()}
