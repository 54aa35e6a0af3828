"""Exports tasks of a bundle as ordinary checkpoint folders."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.files import SHARD_BYTES, safetensors_header
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.exported import exported_files
from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.bundle.publish import Ours, check_target, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.choose import INDEX
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.libraries import LIBRARIES, LibraryName, index_name, library_of, shard_names
from flexmerge_cli.checkpoint.parts import part_of
from flexmerge_cli.checkpoint.weights import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.engine.pool import default_threads, ordered_map
from flexmerge_cli.errors import IntegrityError, UsageError
from flexmerge_cli.version import VERSION
from flexmerge_cli.writing import NO_LINK, folder_above, no_space


def export_task(
    bundle: Bundle, task: str, target: Path, *, force: bool = False, link: bool = False, merged: bool = False
) -> None:
    """Write config, tokenizer and weights; `link` makes the weights hard links or reflinks of the bundle's files.

    A kept adapter is given back as the folder it was, byte by byte, or, if `merged`, as the model that it makes.
    Raises UsageError if `link` is asked for and something must be decoded, renamed or cast, IntegrityError if the
    bundle's bytes are not those of its manifest.
    """
    needed_bytes = check_export(bundle, task, link=link, merged=merged)
    ours = partial(exported_files, bundle.manifest)
    check_place(bundle, target, needed_bytes, force=force, ours=ours)
    with publish(target, force=force, ours=ours, needed_bytes=needed_bytes) as folder:
        _fill(bundle, task, folder, link=link, merged=merged)


def export_tasks(
    bundle: Bundle,
    tasks: Sequence[str],
    target: Path,
    *,
    force: bool = False,
    link: bool = False,
    merged: bool = False,
) -> dict[str, Path]:
    """Export each task into a folder of its name below `target`, which appears with all of them or not at all.

    merged: of those that are adapters the model that they make. An empty folder at `target` is as good as none.
    """
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise UsageError(f"task `{twice}` is named twice", hint=f"--task {twice} once")
    for task in tasks:
        bundle.check_task(task)
    makes_model = {task: merged and bundle.manifest.tasks[task].is_kept for task in tasks}
    needed_bytes = sum(check_export(bundle, task, link=link, merged=makes_model[task]) for task in tasks)
    force = force or (target.is_dir() and not target.is_symlink() and not any(target.iterdir()))

    def ours(folder: Path) -> set[str] | None:
        found = {task: exported_files(bundle.manifest, folder / task) for task in tasks if (folder / task).is_dir()}
        known = {f"{task}/{name}" for task, files in found.items() if files is not None for name in files}
        return known or None

    check_place(bundle, target, needed_bytes, force=force, ours=ours)
    with publish(target, force=force, ours=ours, needed_bytes=needed_bytes) as folder:
        for task in tasks:
            (folder / task).mkdir()
            _fill(bundle, task, folder / task, link=link, merged=makes_model[task])
    return {task: target / task for task in tasks}


def _fill(bundle: Bundle, task: str, folder: Path, *, link: bool, merged: bool) -> None:
    is_kept = bundle.manifest.tasks[task].is_kept
    for path, name in side_files(bundle, task, merged=merged).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if link and is_kept:
            _link_file(bundle, path, folder / name)
        else:
            copy_file(bundle, path, folder / name)
    if is_kept and not merged:
        return
    if link:
        _link(bundle, task, folder)
    else:
        with bundle.checking(task) as unchecked:
            _write(unchecked, task, folder)


def copy_file(bundle: Bundle, path: str, target: Path) -> None:
    with target.open("xb") as write:
        for data in bundle.chunks(path):
            write.write(data)


def _link_file(bundle: Bundle, path: str, target: Path) -> None:
    source = (bundle.path / path).resolve()  # in the Hub's cache it is a relative link
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        _reflink(source, target)
    _check(bundle, path, sha256_of(target))


def _check(bundle: Bundle, path: str, sha256: str) -> None:
    if sha256 != bundle.manifest.files[path].sha256:
        raise IntegrityError(
            f"{bundle.path / path} differs from the manifest", hint=f"flexmerge inspect {bundle.path} --verify"
        )


def side_files(bundle: Bundle, task: str, *, merged: bool) -> dict[str, str]:
    """Map the path in the bundle to the name in the export, for all files but weights and index."""
    entry = bundle.manifest.tasks[task]
    own = {path: name for name, path in bundle.manifest.side_files(task).items() if not INDEX.fullmatch(name)}
    if not (entry.is_kept and merged):
        return own
    own = {path: name for path, name in own.items() if name not in entry.not_in_model}
    of_base = {path: name for name, path in sorted(bundle.manifest.base_files.items()) if not INDEX.fullmatch(name)}
    return own | {path: name for path, name in of_base.items() if name not in own.values()}


def check_export(bundle: Bundle, task: str, *, link: bool, merged: bool = False) -> int:
    """Return the bytes that are needed. Refuses a task that cannot be given back in this form."""
    bundle.check_task(task)
    bundle.require_tensors(task)
    entry = bundle.manifest.tasks[task]
    if merged and not entry.is_kept:
        raise UsageError(f"task `{task}` is no adapter: it is a whole model already", hint="leave out --merged")
    as_given = entry.is_kept and not merged
    if link and entry.why_no_model is not None:
        raise UsageError(f"task `{task}` is an adapter, of one file of its own", hint="leave out --link")
    if link and not as_given:
        weight_map = _weight_map(bundle, task)
        count = len(set((weight_map or {}).values()))
        if weight_map is None:
            why = "its tensors must be decoded, renamed or cast"
        elif count > 1 and not LIBRARIES[library := _library(bundle, task)].reads_shards:
            why = f"its weights lie in {count} files, and {library} reads one"
        else:
            return 0
        raise UsageError(f"task `{task}` cannot be linked: {why}", hint="leave out --link")
    if link:
        return 0
    if as_given:
        return sum(bundle.manifest.files[path].bytes for path in side_files(bundle, task, merged=False))
    return sum(num_bytes(*form) for form in bundle.tensors_of(task).values())


def check_place(bundle: Bundle, target: Path, needed_bytes: int, *, force: bool, ours: Ours) -> None:
    check_apart(target, [bundle.path])
    check_target(target, force=force, ours=ours)
    if shutil.disk_usage(folder_above(target)).free < needed_bytes:
        raise no_space(target, needed_bytes)


def _write(bundle: Bundle, task: str, folder: Path) -> None:
    """Write the weights of the model, and those of each of its parts in the part's subfolder."""
    parts = bundle.manifest.tasks[task].parts
    inside: dict[str, list[str]] = {}
    for own in bundle.tensors_of(task):
        inside.setdefault(part_of(own, parts)[0], []).append(own)
    for part, names in inside.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        _write_part(bundle, task, names, folder / part, parts[part] if part else LIBRARIES[_library(bundle, task)].stem)


def _write_part(bundle: Bundle, task: str, names: Sequence[str], folder: Path, stem: str) -> None:
    """Write the tensors of one folder of the source; their names in its files lack the folder's path."""
    every, aligned = bundle.tensors_of(task), bundle.manifest.aligned(task)
    parts = bundle.manifest.tasks[task].parts
    own = {part_of(name, parts)[1]: name for name in names}
    forms = {name: every[whole] for name, whole in own.items()}
    write_weights(folder, stem, forms, lambda name: bundle.array(task, aligned[own[name]]), bundle.manifest.id)


def write_weights(
    folder: Path,
    stem: str,
    forms: Mapping[str, tuple[str, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
    bundle_id: str,
) -> None:
    """Write weight files of at most SHARD_BYTES each, with an index if there are several.

    Values are made some tensors ahead. forms: name -> dtype and shape. value: name -> bits.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(forms, key=lambda name: (-ITEM_BYTES[forms[name][0]], name)):
        if shards[-1] and size + num_bytes(*forms[name]) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes(*forms[name])
    weight_map = {}
    for file_name, shard in zip(shard_names(stem, len(shards)), shards, strict=True):
        header = {name: (*forms[name], num_bytes(*forms[name])) for name in shard}
        metadata = {"bundle": bundle_id, "flexmerge": VERSION, "format": "pt"}
        with (folder / file_name).open("xb") as file:
            file.write(safetensors_header(header, metadata))
            with ordered_map(shard, value, threads=default_threads()) as arrays:
                for name, array in zip(shard, arrays):
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    weight_map[name] = file_name
    if len(shards) > 1:
        total = sum(num_bytes(*forms[name]) for name in forms)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index_name(stem)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _library(bundle: Bundle, task: str) -> LibraryName:
    """Return the library that loads the task's model."""
    if bundle.manifest.tasks[task].why_no_model is not None:
        return "peft"
    names = side_files(bundle, task, merged=False).values()
    config = bundle.config_folder(task) / "config.json"
    return library_of(read_json(config, MAX_CONFIG_BYTES) if "config.json" in names else {}, names)


def _link(bundle: Bundle, task: str, folder: Path) -> None:
    """Link the bundle's files under the names that the task's library knows, with an index if there are several."""
    weight_map = _weight_map(bundle, task)
    assert weight_map is not None
    files = sorted(set(weight_map.values()))
    stem = LIBRARIES[_library(bundle, task)].stem
    new_names = dict(zip(files, shard_names(stem, len(files)), strict=True))
    for path, new in new_names.items():
        _link_file(bundle, path.relative_to(bundle.path).as_posix(), folder / new)
    if len(files) == 1:
        return
    value = {
        "metadata": {"total_size": sum(num_bytes(*bundle.tensors_of(task)[name]) for name in weight_map)},
        "weight_map": {name: new_names[path] for name, path in weight_map.items()},
    }
    (folder / index_name(stem)).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _weight_map(bundle: Bundle, task: str) -> dict[str, Path] | None:
    """Own name -> the file that holds it as it is; tied ones are left to the loader. None if one is held otherwise."""
    if bundle.manifest.tasks[task].parts:
        return None  # the files of subfolders have names without their paths
    found = {}
    for own, aligned in bundle.manifest.aligned(task).items():
        if not bundle.is_tied(aligned):
            part = bundle.whole(task, aligned).dense
            if part is None or (part.name, part.dtype) != (own, bundle.tensors_of(task)[own][0]):
                return None
            found[own] = part.path
    return found


def _reflink(source: Path, target: Path) -> None:
    """Copy a file by sharing its blocks, on file systems that can (btrfs, XFS)."""
    import fcntl

    ficlone = 0x40049409  # linux/fs.h; Python has no name for it
    with source.open("rb") as read, target.open("xb") as write:
        try:
            fcntl.ioctl(write.fileno(), ficlone, read.fileno())
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            raise UsageError(
                f"{source} cannot be linked to {target.parent}: another file system", hint="leave out --link"
            ) from None


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = ITEM_BYTES[dtype]
    for axis in shape:
        count *= axis
    return count
