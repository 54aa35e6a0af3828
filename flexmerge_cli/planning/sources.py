"""Opens the sources of a new plan, and those of a plan again to find its tensors. Reads headers and configs only."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, each_opened, open_checkpoint
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.sources import Sources
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.family.adapters import KeptAdapter, Members, members_of
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import Family, make_family
from flexmerge_cli.family.split import whole_of
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import SideFile
from flexmerge_cli.planning import kept_adapters, left_out
from flexmerge_cli.request.plan import PlanRequest
from flexmerge_cli.text import expanded


def open_all(sources: Mapping[str, str], opened: Callable[[str], Checkpoint]) -> dict[str, Checkpoint]:
    """Open every source by its key. Raises SourceError that lists all sources that are not available."""

    def attempt(key: str) -> Checkpoint | SourceError:
        try:
            return opened(key)
        except SourceError as error:
            return error

    found = dict(zip(sources, each_opened(attempt, list(sources), sources.values())))
    problems = [error for error in found.values() if isinstance(error, SourceError)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SourceError(
            "\n  ".join(["several sources are not available:", *(e.message for e in problems)]), hint=problems[0].hint
        )
    return {key: checkpoint for key, checkpoint in found.items() if isinstance(checkpoint, Checkpoint)}


def open_family(request: PlanRequest, *, may_ignore: Collection[str] = ()) -> Family:
    """Open all sources and align them. Raises SourceError, DataError and UsageError.

    may_ignore: patterns of --ignore that no file needs to match, such as those for files of a removed task. The
    request's access reports by `on_message` the files that are not carried and that no model misses.
    """
    sources = {"": request.base, **request.tasks}
    tasks = open_all(
        sources, lambda key: open_checkpoint(sources[key], relative_to=request.relative_to, access=request.access)
    )
    left_out.check(tasks.values(), request.access, may_ignore)
    base = tasks.pop("")
    if not tasks:
        raise UsageError("no tasks given", hint="add --tasks DIR, or --task NAME=PATH")
    members = members_of(base, tasks, request.adapters, assume_base=request.assume_base)
    family = make_family(
        members.base, members.models, private=request.private, merge_heads=request.merge_heads, kept=members.kept
    )
    family = replace(family, merges_products=members.merges_products)
    for message in left_out.notes(family):
        request.access.on_message(message)
    return family


def files_to_fetch(checkpoints: Iterable[Checkpoint], tensors: Iterable[StoredTensor]) -> list[RemoteFile]:
    """List the files on the Hub that hold these tensors of the checkpoints and are not on this disk."""
    remote = {path: file for checkpoint in checkpoints for path, file in checkpoint.remote.items()}
    paths = dict.fromkeys(path for tensor in tensors for path in tensor.paths)
    return [remote[path] for path in paths if path in remote]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSources:
    """The checkpoints of a plan, opened again."""

    base: Checkpoint | None
    """None if nothing of the base is needed."""
    tasks: tuple[Checkpoint, ...]
    """The plan's tasks, then the models of its kept adapters."""
    located: Sources
    kept: tuple[KeptAdapter, ...]
    side_files: dict[tuple[str, str], Path]
    """Maps a task, or "" for the base, and the name of a side file in it to the file."""

    def to_fetch(self) -> list[RemoteFile]:
        """List the files on the Hub that hold a tensor of the plan and are not on this disk."""
        read = [tensor for found in (self.located.base, *self.located.tasks) for tensor in found.values()]
        read += [tensor for each in self.kept for tensor in each.checkpoint.tensors.values()]
        return files_to_fetch([*self.tasks, *([self.base] if self.base else [])], read)

    def folders(self, plan: Plan) -> dict[str, Path]:
        """Map each task to the folder of its checkpoint."""
        return {
            task.name: found.path if found.path.is_dir() else found.path.parent
            for task, found in zip(plan.tasks, self.tasks)
        }


def open_sources(
    plan: Plan, folder: Path, relocate: Mapping[str, str] | None = None, access: Access = ONLINE
) -> OpenSources:
    """Open the plan's sources and find every tensor and side file that it names.

    folder: the folder that the plan's relative sources are relative to. relocate: maps the beginning of a source in the
    plan to what is there now. Raises DataError if headers differ from the plan's, SourceError for missing sources,
    UsageError for a key of relocate that no source begins with.
    """
    asked, names = plan.settings, (*(f"task `{task.name}`" for task in plan.tasks), "the base")
    access = replace(
        access,
        variant=asked.variant,
        ignore=asked.ignore,
        with_code=asked.with_code,
        follow_links=asked.follow_links,
    )
    opened = _open_again(plan, folder, relocate or {}, access)
    base, kept = opened.pop("", None), tuple[KeptAdapter, ...]()
    if base is not None:
        members = members_of(base, opened, plan.settings.adapters, assume_base=plan.settings.assume_base)
        _check_kinds(plan, members)
        base, opened, kept = members.base, dict(members.models), members.kept
    tasks = tuple(opened[name] for name in plan.task_names)
    of_base, of_tasks = _located(plan, base, tasks)
    side_files: dict[tuple[str, str], Path] = {}
    for record, task in zip(plan.tasks, tasks):
        side_files |= _side_files(record.name, record.files, task.path, task.side_files)
    if base is not None and kept:
        side_files |= kept_adapters.located(plan, kept)
        side_files |= _side_files("", plan.base.files, base.path, kept_adapters.base_side_files(base))
    return OpenSources(
        base=base,
        tasks=(*tasks, *(each.model for each in kept)),
        located=Sources(base=of_base, tasks=of_tasks, describe=names),
        kept=kept,
        side_files=side_files,
    )


def _open_again(plan: Plan, folder: Path, relocate: Mapping[str, str], access: Access) -> dict[str, Checkpoint]:
    """Map every task to its checkpoint, and the empty name to that of the base if it is needed."""
    found = [each.needed_files(plan.settings.adapters) for each in plan.readers]
    needs = {each.name: own for each, (own, _) in zip(plan.readers, found)}
    sources = {each.name: each.source for each in plan.readers}
    merges = any(tensor.class_ is TensorClass.MERGEABLE for tensor in plan.tensors)
    if merges or plan.kept or any(each.adapter_kind is not None for each in plan.readers):
        sources = {"": plan.base.source} | sources
        needs[""] = [*plan.base.files, *(name for _, of_base in found for name in of_base)]
    for old, new in relocate.items():
        everything = [plan.base.source, *sources.values()]
        if all(_relocated(source, folder, {old: new}) is None for source in everything):
            raise UsageError(
                f"--relocate {old}={new}: no source of the plan begins with {old}",
                hint=f"write it as the plan does, or absolute: {everything[0]}, …",
            )

    def opened(key: str) -> Checkpoint:
        source = sources[key]
        moved, found = _relocated(source, folder, relocate), source
        if moved is None and not is_remote(source):
            place = (folder / expanded(source)).resolve()
            if not place.exists():
                raise SourceError(
                    f"the plan's source {source} is missing: {place} does not exist",
                    hint=f"if it moved: flexmerge merge with --relocate {source}=NEW, or with the beginnings of both "
                    "paths",
                )
            found = source if folder.is_dir() else str(place)  # no file system knows `..` of a folder still to be made
        return open_checkpoint(
            moved if moved is not None else found,
            relative_to=folder if moved is None else None,
            access=access,
            needs=needs[key],
            side_files=bool(needs[key]),
        )

    return open_all(sources, opened)


def _located(
    plan: Plan, base: Checkpoint | None, tasks: tuple[Checkpoint, ...]
) -> tuple[dict[str, StoredTensor], tuple[dict[str, StoredTensor], ...]]:
    """Find where every tensor of the plan lies now, in the base and in the tasks, by aligned name."""
    problems: list[str] = []

    def located(checkpoint: Checkpoint, who: str, own: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor | None:
        tensor = checkpoint.tensors.get(own)
        if tensor is None or tensor.dtype != dtype or tensor.shape != tuple(shape):
            now = f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing"
            problems.append(f"{who}: `{own}` was {dtype} {list(shape)}, now {now}")
        return tensor

    of_tasks: tuple[dict[str, StoredTensor], ...] = tuple({} for _ in tasks)
    of_base: dict[str, StoredTensor] = {}
    for tensor in plan.stored:
        name = tensor.name
        if base is not None and (tensor.class_ is TensorClass.MERGEABLE or plan.base_readers(tensor)):
            assert tensor.base_form is not None
            dtype, shape = tensor.base_form
            whole = whole_of(name)[0]
            own, shape = plan.base.names.get(whole, whole), plan.whole_shape(name, shape, None)
            if (found := located(base, "the base", own, dtype, shape)) is not None:
                of_base[name] = plan.section(name, found, None)
        for task in tensor.present:
            own, who = plan.whole_name(task, name), f"task `{plan.tasks[task].name}`"
            shape = plan.whole_shape(name, tensor.shape_of(task), task)
            if (found := located(tasks[task], who, own, tensor.dtype_of(task), shape)) is not None:
                of_tasks[task][name] = plan.section(name, found, task)
    for record, opened in zip(plan.tasks, tasks):
        if opened.parts != record.parts:
            problems.append(f"task `{record.name}`: other subfolders of {opened.path} hold weights")
    if problems:
        some = list(dict.fromkeys(problems))[:20]  # parts of a split tensor say the same
        raise DataError("sources have changed since the plan:\n  " + "\n  ".join(some), hint="make the plan again")
    return of_base, of_tasks


def _side_files(
    task: str, recorded: Mapping[str, SideFile], folder: Path, there: Mapping[str, Path]
) -> dict[tuple[str, str], Path]:
    """Map (task, name) to the file. Raises DataError for a file whose size is not the recorded one."""
    for name, side in recorded.items():
        if name not in there or there[name].stat().st_size != side.bytes:
            raise DataError(f"{folder / name} has changed since the plan", hint="make the plan again")
    return {(task, name): there[name] for name in recorded}


def _check_kinds(plan: Plan, members: Members) -> None:
    for each in plan.readers:
        kind, now = each.adapter_kind, members.kinds[each.name]
        if now != kind:
            raise DataError(
                f"task `{each.name}` was {kind or 'no adapter'} in the plan, but is {now or 'no adapter'} now",
                hint="make the plan again",
            )


def _relocated(source: str, folder: Path, relocate: Mapping[str, str]) -> str | None:
    """Return the source at its new place, if an OLD of --relocate is its beginning, as in the plan or absolute; or
    None."""
    absolute = str((folder / source).resolve()) if not is_remote(source) else source
    for old, new in relocate.items():
        for written in (source, absolute):
            if written == old or written.startswith(old.rstrip("/") + "/"):
                return new + written[len(old.rstrip("/")) :]
    return None
