"""Decides the folder of each task: `tasks/NAME`, which its library loads, or `coded/NAME`, which must be exported.
Pure.

A task loads as it lies if each of its tensors is a part of the same name and dtype, and if its library reads as many
files as there are on its route. Then the folder holds links to these files and, if there are several, their index. The
same holds for `base`, the model of kept adapters. No file beside weights that must be decoded has a name
that a loader knows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexmerge_cli.allocation.files import WeightFile
from flexmerge_cli.allocation.manifest_bytes import SmallFile
from flexmerge_cli.allocation.storage import Part, Storage, effective_dtype
from flexmerge_cli.checkpoint.libraries import LIBRARIES, Library, index_name, shard_names
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.folders import BASE_FOLDER, CODED_README, side_folder, side_path
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.stored.coded import MIXTURE

README = """# {name} is no checkpoint

Its weights lie in the bundle's folder `weights`, in a form that only flexmerge reads; `*.aside` are its config and the
other files of the model. `flexmerge export BUNDLE --task {name} -o {name}` writes a checkpoint of it. In Python,
`flexmerge_cli.open_bundle(BUNDLE).model("{name}")` is the model. BUNDLE is the folder that holds `manifest.json`.
"""

MIXTURE_README = """# {name} is no checkpoint

Layers of its model are mixtures of experts, which no file of tensors holds; `*.aside` are its config and the other
files of the model. In Python, `flexmerge_cli.open_bundle(BUNDLE).model("{name}")` is the model. BUNDLE is the folder
that holds `manifest.json`.
"""

BASE_README = """# The base is no checkpoint here

Its weights lie in the bundle's folder `weights`, partly in a form that only flexmerge reads, because other tasks share
them; `*.aside` are its config and files. `flexmerge export BUNDLE --task NAME --merged -o NAME` writes the model that
an adapter makes of the base. BUNDLE is the folder that holds `manifest.json`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFolders:
    """The folders of all tasks."""

    stems: Mapping[int, str]
    """The stem of the links to each task's weight files; a task without links has none."""
    base_stem: str | None
    """The stem of the links to the base's weight files."""
    small: tuple[SmallFile, ...]
    """All files except weights, in the order of their paths."""


def task_folders(
    plan: Plan, storages: Mapping[str, Storage], files: Sequence[WeightFile], cast: str | None, *, links: bool
) -> TaskFolders:
    """Make the folders. links: whether tasks have links to their weights; otherwise they have an index that points to
    `../../weights`."""
    stems: dict[int, str] = {}
    small: list[SmallFile] = []
    coded: set[int] = set()
    mixed = {
        task
        for storage in storages.values()
        for group in storage.groups
        if group.form is MIXTURE and any(part.task is not None for part in group.parts)
        for task in group.coded_tasks
    }

    def loads(folder: str, held: Mapping[str, Part], stem: str, readers: tuple[int, ...]) -> None:
        """Add the index of a folder that loads, if it needs one. held: the part of each tensor, by own name."""
        route = [file for file in files if not set(readers).isdisjoint(file.readers)]
        if links and len(route) == 1:
            return
        paths = sorted(file.path for file in route)
        up = "../" * (folder.count("/") + 1)
        linked = shard_names(stem, len(paths)) if links else [f"{up}{path}" for path in paths]
        called = dict(zip(paths, linked, strict=True))
        where = {part: called[file.path] for file in route for part in file.parts}
        index = _index({own: where[part] for own, part in held.items()}, sum(p.num_bytes for p in held.values()))
        small.append(_made(f"{folder}/{index_name(stem)}", readers, index))

    for task, held in _held(plan, storages, cast).items():
        name, library = plan.tasks[task].name, LIBRARIES[plan.tasks[task].loaded_by(plan.settings.adapters)]
        if held is None or not _reads(library, files, (task,), links=links):
            coded.add(task)
            text = (MIXTURE_README if task in mixed else README).format(name=name)
            small.append(_made(f"coded/{name}/{CODED_README}", (task,), text.encode()))
            continue
        if links:
            stems[task] = library.stem
        loads(f"tasks/{name}", held, library.stem, (task,))
    for number, reader in enumerate(plan.readers):
        is_coded = number in coded
        folder = side_folder(reader.name, coded=is_coded)
        for name, side in reader.files.items():
            path = side_path(folder, name, coded=is_coded)
            small.append(_copied(path, (reader.name, name), (number,), side.bytes))
    of_base, library = _held_of_base(plan, storages), LIBRARIES[plan.base.library]
    in_place = of_base is not None and _reads(library, files, plan.kept, links=links)
    if plan.kept and in_place and of_base is not None:
        loads(BASE_FOLDER, of_base, library.stem, plan.kept)
    elif plan.kept:
        small.append(_made(f"{BASE_FOLDER}/{CODED_README}", plan.kept, BASE_README.encode()))
    for name, side in plan.base.files.items():
        small.append(_copied(side_path(BASE_FOLDER, name, coded=not in_place), ("", name), plan.kept, side.bytes))
    return TaskFolders(
        stems=stems,
        base_stem=library.stem if plan.kept and links and in_place else None,
        small=tuple(sorted(small, key=lambda file: file.path)),
    )


def _reads(library: Library, files: Sequence[WeightFile], readers: tuple[int, ...], *, links: bool) -> bool:
    """Return whether a library reads as many files as the readers have together."""
    count = sum(not set(readers).isdisjoint(file.readers) for file in files)
    return library.reads_shards or (links and count == 1)


def _held(plan: Plan, storages: Mapping[str, Storage], cast: str | None) -> dict[int, dict[str, Part] | None]:
    """Return the part of each tensor of a task: task -> own name -> part. Tied tensors are left to the loader. None if
    one of them must be decoded, renamed (as tensors of subfolders are), cast or put together from rows."""
    joined = plan.joined_tasks()
    found: dict[int, dict[str, Part] | None] = {
        task: None if task in joined or plan.tasks[task].parts else {} for task in plan.all_tasks
    }
    for storage in storages.values():
        tensor = storage.tensor
        if tensor.class_ is TensorClass.TIED:
            continue
        dense = {task: part for part in storage.parts if part.array.role == "dense" for task in part.readers}
        for task in tensor.present:  # kept adapters are none of these: theirs is an adapter's folder
            held, part, own = found[task], dense.get(task), plan.own_name(task, tensor.name)
            if held is None:
                continue
            if part is None or part.name != own or part.array.dtype != effective_dtype(tensor.dtype_of(task), cast):
                found[task] = None
                continue
            held[own] = part
    return found


def _held_of_base(plan: Plan, storages: Mapping[str, Storage]) -> dict[str, Part] | None:
    """Return the same for the base of kept adapters. Files on their routes hold nothing else."""
    if any(plan.readers[reader].parts for reader in plan.kept):
        return None
    found = {}
    for name, storage in storages.items():
        readers = plan.base_readers(storage.tensor)
        if not readers:
            continue
        part = next(part for part in storage.parts if set(readers) <= set(part.readers))
        if part.name != name:
            return None
        found[name] = part
    return found


def _index(weight_map: dict[str, str], total_size: int) -> bytes:
    value = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _made(path: str, readers: tuple[int, ...], content: bytes) -> SmallFile:
    return SmallFile(path=path, readers=readers, num_bytes=len(content), content=content)


def _copied(path: str, origin: tuple[str, str], readers: tuple[int, ...], num_bytes: int) -> SmallFile:
    return SmallFile(path=path, readers=readers, num_bytes=num_bytes, origin=origin)
