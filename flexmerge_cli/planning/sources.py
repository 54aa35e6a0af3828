"""A plan's checkpoints, opened again: where every tensor that it names lies now. Headers and configs only."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint, each_opened, open_checkpoint
from flexmerge_cli.checkpoint.peft import CONFIG_NAME, Adapter
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.checkpoint.remote import RemoteFile
from flexmerge_cli.checkpoint.rows import other_rows
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.family.adapters import KeptAdapter, adapters_of, keep, models_of, pool_base
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import BASE_FOLDER
from flexmerge_cli.formats.plan_file import ROWS_SUFFIX, Plan
from flexmerge_cli.planning import kept_adapters
from flexmerge_cli.text import expanded

if TYPE_CHECKING:
    from flexmerge_cli.engine.materialise import Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSources:
    """The plan's checkpoints, opened again."""

    base: Checkpoint | None
    tasks: tuple[Checkpoint, ...]
    """Kept adapters after those that merge."""
    located: "Sources"
    kept: tuple[KeptAdapter, ...] = ()

    def to_fetch(self) -> list[RemoteFile]:
        """Files of the Hub that are not on this disk, and hold a tensor of the plan."""
        remote: dict[Path, RemoteFile] = {}
        for checkpoint in [*self.tasks, *([self.base] if self.base else [])]:
            remote |= checkpoint.remote
        read = [tensor for found in (self.located.base, *self.located.tasks) for tensor in found.values()]
        paths = [path for tensor in read for path in tensor.paths]
        paths += [path for each in self.kept for path in each.adapter.checkpoint.weight_paths()]
        return [remote[path] for path in dict.fromkeys(paths) if path in remote]


def open_sources(
    plan: Plan, folder: Path, relocate: Mapping[str, str], access: Access = ONLINE
) -> tuple[OpenSources, dict[str, Path]]:
    """Open the plan's sources and find every tensor that it names.

    Raises DataError if headers are not the plan's, SourceError for a source that is not there, UsageError for an OLD of
    relocate that no source begins with.
    """
    from flexmerge_cli.engine.materialise import Sources

    access = replace(access, variant=plan.settings.variant)
    everything = [plan.base.source, *(task.source for task in plan.tasks), *(each.source for each in plan.adapters)]
    for old, new in relocate.items():
        if all(_relocated(source, folder, {old: new}) is None for source in everything):
            raise UsageError(
                f"--relocate {old}={new}: no source of the plan begins with {old}",
                hint=f"write it as the plan does, or absolute: {everything[0]}, …",
            )

    def opened(named: tuple[str, Collection[str]]) -> Checkpoint:
        source, side_files = named
        moved = _relocated(source, folder, relocate)
        if moved is None and not is_remote(source) and not (folder / expanded(source)).exists():
            raise SourceError(
                f"{source}, as the plan says, is not there: {(folder / source).resolve()} does not exist",
                hint=f"if it moved: flexmerge merge with --relocate {source}=NEW, or with the beginnings of both paths",
            )
        return open_checkpoint(
            moved if moved is not None else source,
            relative_to=folder if moved is None else None,
            access=access,
            needs=side_files,
            side_files=bool(side_files),
        )

    needs_base = any(tensor.class_ is TensorClass.MERGEABLE for tensor in plan.tensors) or bool(plan.adapters)
    needs_base = needs_base or any(task.adapter is not None for task in plan.tasks)
    in_base = plan.settings.adapters == "merge"
    merged = [name for task in plan.tasks if task.adapter is not None and in_base for name in task.files]
    base = opened((plan.base.source, [*plan.base.files, *merged])) if needs_base else None
    named: list[tuple[str, Collection[str]]] = []
    for record in plan.tasks:
        is_merged = record.adapter is not None and plan.settings.adapters == "merge"
        named.append((record.source, [CONFIG_NAME] if is_merged else record.files))
    named += [(each.source, each.files) for each in plan.adapters]
    sources = dict(zip(plan.reader_names, each_opened(opened, named, [source for source, _ in named])))
    tasks = tuple(sources[name] for name in plan.task_names)
    kept: list[KeptAdapter] = []
    if base is not None and plan.settings.adapters == "pool":
        adapters = adapters_of(base, sources, assume_base=plan.settings.assume_base)
        _same_kinds(plan, adapters)
        base = pool_base(base, sources, adapters)
    elif base is not None:
        adapters = adapters_of(base, sources, assume_base=plan.settings.assume_base)
        models = models_of(base, sources, adapters)
        _same_kinds(plan, adapters)
        kept = [keep(base, each.name, adapters[each.name], models[each.name]) for each in plan.adapters]
        tasks = tuple(models[name] for name in plan.task_names)
    problems: list[str] = []

    def located(checkpoint: Checkpoint, who: str, own: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor | None:
        tensor = checkpoint.tensors.get(own)
        if tensor is None or tensor.dtype != dtype or tensor.shape != tuple(shape):
            now = f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing"
            problems.append(f"{who}: `{own}` was {dtype} {list(shape)}, now {now}")
        return tensor

    of_tasks: list[dict[str, StoredTensor]] = [{} for _ in tasks]
    of_base: dict[str, StoredTensor] = {}
    for tensor in plan.stored:
        name, vocabulary = tensor.name.removesuffix(ROWS_SUFFIX), plan.vocabulary(tensor.name)
        if base is not None and (tensor.class_ is TensorClass.MERGEABLE or plan.base_readers(tensor)):
            assert tensor.base_form is not None
            dtype, shape = tensor.base_form
            if vocabulary is not None:
                shape = (vocabulary.base.rows, *shape[1:])
            found = located(base, "the base", plan.base.names.get(name, name), dtype, shape)
            if found is not None:
                of_base[name] = found if vocabulary is None else found.take(vocabulary.base.common)
        for task in tensor.present:
            own = plan.own_name(task, name)
            who = f"task `{plan.tasks[task].name}`"
            found = located(tasks[task], who, own, tensor.dtype_of(task), plan.whole_shape(tensor, task))
            if found is not None and vocabulary is not None:
                rows = vocabulary.tasks[task]
                found = found.take(rows.common if name == tensor.name else other_rows(rows.common, rows.rows))
            of_tasks[task] |= {tensor.name: found} if found else {}
    if problems:
        raise DataError(
            "sources have changed since the plan:\n  " + "\n  ".join(problems[:20]), hint="make the plan again"
        )
    side_files = {}
    for record, checkpoint in zip(plan.tasks, tasks):
        for name, side in record.files.items():
            path = checkpoint.side_files.get(name)
            if path is None or path.stat().st_size != side.bytes:
                raise DataError(f"{checkpoint.path / name} has changed since the plan", hint="make the plan again")
            side_files[f"tasks/{record.name}/{name}"] = path
    if base is not None and kept:
        side_files |= kept_adapters.located(plan, kept)
        there = kept_adapters.base_side_files(base)
        for name, side in plan.base.files.items():
            if name not in there or there[name].stat().st_size != side.bytes:
                raise DataError(f"{base.path / name} has changed since the plan", hint="make the plan again")
            side_files[f"{BASE_FOLDER}/{name}"] = there[name]
    names = (*(f"task `{task.name}`" for task in plan.tasks), "the base")
    places = Sources(base=of_base, tasks=tuple(of_tasks), describe=names)
    everyone = (*tasks, *(each.model for each in kept))
    return OpenSources(base=base, tasks=everyone, located=places, kept=tuple(kept)), side_files


def _same_kinds(plan: Plan, adapters: Mapping[str, Adapter]) -> None:
    kinds = {task.name: task.adapter for task in plan.tasks} | {each.name: each.kind for each in plan.adapters}
    for name, kind in kinds.items():
        now = adapters[name].kind.value if name in adapters else None
        if now != kind:
            raise DataError(
                f"task `{name}` was {kind or 'no adapter'} by the plan, and is {now or 'no adapter'}",
                hint="make the plan again",
            )


def _relocated(source: str, folder: Path, relocate: Mapping[str, str]) -> str | None:
    """The source under its new place, if an OLD of --relocate is its beginning, as written in the plan or absolute."""
    absolute = str((folder / source).resolve()) if not is_remote(source) else source
    for old, new in relocate.items():
        for written in (source, absolute):
            if written == old or written.startswith(old.rstrip("/") + "/"):
                return new + written[len(old.rstrip("/")) :]
    return None
