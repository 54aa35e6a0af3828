"""The folder of each task: `tasks/NAME`, which its library loads, or `coded/NAME`, which must be exported. Pure.

A task loads as it lies if each of its tensors is a part of the same name and dtype, and if its library reads as many
files as there are on its route. Then the folder holds links to these files, and, if there are several, their index.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexmerge_cli.allocation.files import WeightFile
from flexmerge_cli.allocation.manifest_bytes import SmallFile
from flexmerge_cli.allocation.storage import Part, Storage, effective_dtype
from flexmerge_cli.checkpoint.libraries import LIBRARIES, LibraryName, index_name, shard_names
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import BASE_FOLDER, CODED_README, side_folder
from flexmerge_cli.formats.plan_file import Plan

README = """# {name} is no checkpoint

Its weights lie in the bundle's folder `weights`, in a form that only flexmerge reads; `files` has its config and what
else belongs to the model. `flexmerge export BUNDLE --task {name} -o {name}` writes a checkpoint of it. In Python,
`flexmerge_cli.open_bundle(BUNDLE).model("{name}")` is the model. BUNDLE is the folder that holds `manifest.json`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFolders:
    """The folders of all tasks."""

    stems: Mapping[int, str]
    """Task -> the stem of the links to its weight files; a task without has none."""
    small: tuple[SmallFile, ...]
    """All files but weights, in the order of their paths."""


def task_folders(
    plan: Plan, storages: Mapping[str, Storage], files: Sequence[WeightFile], cast: str | None, *, links: bool
) -> TaskFolders:
    """links: whether tasks have links to their weights; otherwise an index that points to `../../weights`."""
    routes = {task: [file for file in files if task in file.readers] for task in plan.all_tasks}
    stems: dict[int, str] = {}
    small: list[SmallFile] = []
    coded: set[int] = set()
    for task, held in _held(plan, storages, cast).items():
        name, library = plan.tasks[task].name, LIBRARIES[library_of_task(plan, task)]
        if held is None or (not library.reads_shards and not (links and len(routes[task]) == 1)):
            coded.add(task)
            small.append(_made(f"coded/{name}/{CODED_README}", task, README.format(name=name).encode()))
            continue
        if links:
            stems[task] = library.stem
        if not links or len(routes[task]) != 1:
            paths = sorted(file.path for file in routes[task])
            linked = shard_names(library.stem, len(paths)) if links else [f"../../{path}" for path in paths]
            called = dict(zip(paths, linked, strict=True))
            where = {part: called[file.path] for file in routes[task] for part in file.parts}
            index = _index({own: where[part] for own, part in held.items()}, sum(p.num_bytes for p in held.values()))
            small.append(_made(f"tasks/{name}/{index_name(library.stem)}", task, index))
    for number, reader in enumerate(plan.readers):
        folder = side_folder(reader.name, coded=number in coded)
        small += [_copied(folder, reader.name, name, (number,), side.bytes) for name, side in reader.files.items()]
    small += [_copied(BASE_FOLDER, "", name, plan.kept, side.bytes) for name, side in plan.base.files.items()]
    return TaskFolders(stems=stems, small=tuple(sorted(small, key=lambda file: file.path)))


def library_of_task(plan: Plan, task: int) -> LibraryName:
    return "peft" if plan.settings.adapters == "pool" else plan.tasks[task].library


def _held(plan: Plan, storages: Mapping[str, Storage], cast: str | None) -> dict[int, dict[str, Part] | None]:
    """Task -> own name -> the part that is the tensor, tied ones left to the loader; None if one of them must be
    decoded, renamed (as tensors of subfolders are), cast or put together from rows."""
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


def _index(weight_map: dict[str, str], total_size: int) -> bytes:
    value = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _made(path: str, task: int, content: bytes) -> SmallFile:
    return SmallFile(path=path, readers=(task,), num_bytes=len(content), content=content)


def _copied(folder: str, of: str, name: str, readers: tuple[int, ...], num_bytes: int) -> SmallFile:
    return SmallFile(path=f"{folder}/{name}", readers=readers, num_bytes=num_bytes, origin=(of, name))
