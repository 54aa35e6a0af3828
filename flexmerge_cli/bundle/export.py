"""One task of a bundle as an ordinary checkpoint folder."""

import json
import os
import shutil
from pathlib import Path

from flexmerge_cli.allocation.files import SHARD_BYTES, safetensors_header
from flexmerge_cli.allocation.manifest import BASE_FOLDER
from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.choose import WEIGHT_SUFFIXES
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.peft import CONFIG_NAME
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.engine.output import no_space
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.version import VERSION

INDEX_NAME = "model.safetensors.index.json"


def export_task(
    bundle: Bundle, task: str, target: Path, *, force: bool = False, link: bool = False, merged: bool = False
) -> None:
    """Write config, tokenizer and weights; `link` makes the weights hard links or reflinks of the bundle's files.

    A kept adapter is given back as the folder it was, byte by byte, or, if `merged`, as the model that it makes.
    Raises UsageError if `link` is asked for and something must be decoded, renamed or cast.
    """
    needed_bytes = check_export(bundle, task, target, force=force, link=link, merged=merged)
    adapter = bundle.manifest.tasks[task].adapter
    with publish(target, force=force, needed_bytes=needed_bytes) as folder:
        for path, name in _side_files(bundle, task, merged=merged).items():
            if link and adapter is not None:
                _link_file(bundle.path / path, folder / name)
            else:
                shutil.copyfile(bundle.path / path, folder / name)
        if adapter is not None and not merged:
            return
        if link:
            _link(bundle, task, folder)
        else:
            _write(bundle, task, folder)


def export_all(
    bundle: Bundle, target: Path, *, force: bool = False, link: bool = False, merged: bool = False
) -> dict[str, Path]:
    """Every task into a folder of its name below `target`, which is made; nothing is written if one is refused."""
    places = {task: target / task for task in bundle.tasks}
    new = not (target.exists() or target.is_symlink())
    if new:
        check_target(target, force=force, replaceable=is_export)
        _guard(bundle, target)
        target.mkdir()
    elif not target.is_dir():
        raise UsageError(f"{target} is no folder", hint="choose another place with -o")
    try:
        for task, place in places.items():
            check_export(bundle, task, place, force=force, link=link, merged=_makes_model(bundle, task, merged))
    except FlexmergeError:
        if new:
            target.rmdir()
        raise
    for task, place in places.items():
        export_task(bundle, task, place, force=force, link=link, merged=_makes_model(bundle, task, merged))
    return places


def _makes_model(bundle: Bundle, task: str, merged: bool) -> bool:
    """With --all, `merged` is of those that are adapters."""
    return merged and bundle.manifest.tasks[task].adapter is not None


def _side_files(bundle: Bundle, task: str, *, merged: bool) -> dict[str, str]:
    """Path in the bundle -> name in the export, of all but weights and index."""
    prefix, adapter = f"tasks/{task}/", bundle.manifest.tasks[task].adapter
    own = {path: path.removeprefix(prefix) for path in bundle.manifest.tasks[task].files if path.startswith(prefix)}
    own.pop(f"{prefix}{INDEX_NAME}", None)
    if adapter is None or not merged:
        return own
    own = {path: name for path, name in own.items() if name not in (adapter.weights, CONFIG_NAME, "README.md")}
    of_base = {path for path in bundle.manifest.tasks[task].files if path.startswith(f"{BASE_FOLDER}/")}
    names = {path: path.removeprefix(f"{BASE_FOLDER}/") for path in sorted(of_base)}
    return own | {path: name for path, name in names.items() if name not in own.values()}


def check_export(bundle: Bundle, task: str, target: Path, *, force: bool, link: bool, merged: bool = False) -> int:
    """Bytes that are needed. Refuses all that can be refused before anything is written."""
    bundle.check_task(task)
    check_target(target, force=force, replaceable=lambda folder: is_export(folder) or _is_same(bundle, task, folder))
    _guard(bundle, target)
    adapter = bundle.manifest.tasks[task].adapter
    if merged and adapter is None:
        raise UsageError(f"task `{task}` is no adapter: it is a whole model already", hint="leave out --merged")
    as_adapter = adapter is not None and not merged
    if link and bundle.manifest.tasks[task].pooled is not None:
        raise UsageError(f"task `{task}` is an adapter, of one file of its own", hint="leave out --link")
    if link and not as_adapter and _weight_map(bundle, task) is None:
        raise UsageError(
            f"task `{task}` cannot be linked: its tensors must be decoded, renamed or cast", hint="leave out --link"
        )
    size = 0 if link else sum(_num_bytes(*form) for form in bundle.tensors_of(task).values())
    if as_adapter and not link:
        size = sum(bundle.manifest.files[path].bytes for path in _side_files(bundle, task, merged=False))
    if shutil.disk_usage(target.absolute().parent).free < size:
        raise no_space(target, size)
    return size


def is_export(folder: Path) -> bool:
    """Whether all weights of a folder are ours; a checkpoint that somebody trained is never replaced."""
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    try:
        return bool(weights) and all("flexmerge" in read_header(path)[1] for path in weights)
    except (FlexmergeError, OSError):
        return False


def _is_same(bundle: Bundle, task: str, folder: Path) -> bool:
    """Whether a folder's weights are those of this very adapter, which bear no mark of ours."""
    adapter = bundle.manifest.tasks[task].adapter
    weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    if adapter is None or [path.name for path in weights] != [adapter.weights]:
        return False
    return sha256_of(weights[0]) == bundle.manifest.files[f"tasks/{task}/{adapter.weights}"].sha256


def _write(bundle: Bundle, task: str, folder: Path) -> None:
    """Tensors in the order of the source, in shards of at most SHARD_BYTES, streamed one tensor at a time."""
    forms = bundle.tensors_of(task)
    aligned = _aligned(bundle, task)
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(forms, key=lambda name: (-ITEM_BYTES[forms[name][0]], name)):
        if shards[-1] and size + _num_bytes(*forms[name]) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(*forms[name])
    weight_map = {}
    stem = _stem(bundle, task)
    for number, shard in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file_name = f"{stem}{part}.safetensors"
        header = {name: (*forms[name], _num_bytes(*forms[name])) for name in shard}
        metadata = {"bundle": bundle.manifest.id, "flexmerge": VERSION, "format": "pt"}
        with (folder / file_name).open("xb") as file:
            file.write(safetensors_header(header, metadata))
            for name in shard:
                file.write(bundle.array(task, aligned[name]).tobytes())
                weight_map[name] = file_name
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(_num_bytes(*forms[name]) for name in forms)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_name = f"{stem}.safetensors.index.json"
        (folder / index_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _stem(bundle: Bundle, task: str) -> str:
    """Of the weight files, as the library that the task's config is of looks for them."""
    if bundle.manifest.tasks[task].pooled is not None:
        return "adapter_model"
    folder = bundle.path / "tasks" / task
    config = folder / "config.json"
    if config.is_file() and b'"_diffusers_version"' in config.read_bytes():
        return "diffusion_pytorch_model"
    return "open_clip_model" if not config.is_file() and (folder / "open_clip_config.json").is_file() else "model"


def _link(bundle: Bundle, task: str, folder: Path) -> None:
    """The bundle's files under names that loaders and tools that glob a folder know as shards."""
    weight_map = _weight_map(bundle, task)
    assert weight_map is not None
    files = sorted(set(weight_map.values()))
    stem = _stem(bundle, task)
    new_names = {path: f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number, path in enumerate(files, 1)}
    for path, new in new_names.items():
        _link_file(path, folder / new)
    value = {
        "metadata": {"total_size": sum(_num_bytes(*bundle.tensors_of(task)[name]) for name in weight_map)},
        "weight_map": {name: new_names[path] for name, path in weight_map.items()},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _link_file(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)  # resolved: in the Hub's cache it is a relative link
    except OSError:
        _reflink(path, target)


def _weight_map(bundle: Bundle, task: str) -> dict[str, Path] | None:
    """Own name -> the file that holds it as it is; tied ones are left to the loader. None if one is held otherwise."""
    found = {}
    for own, aligned in _aligned(bundle, task).items():
        if not bundle.is_tied(aligned):
            part = bundle.dense(task, aligned)
            if part is None or (part.name, part.dtype) != (own, bundle.tensors_of(task)[own][0]):
                return None
            found[own] = part.path
    return found


def _aligned(bundle: Bundle, task: str) -> dict[str, str]:
    """Own name -> aligned name of the task's tensors."""
    names = bundle.manifest.tasks[task].names
    return {
        names.get(tensor.name, tensor.name): tensor.name for tensor in bundle.manifest.tensors if task in tensor.digests
    }


def _reflink(source: Path, target: Path) -> None:
    """A copy that shares its blocks, on file systems that can (btrfs, XFS)."""
    import fcntl

    ficlone = 0x40049409  # linux/fs.h; Python has no name for it
    with source.open("rb") as read, target.open("xb") as write:
        try:
            fcntl.ioctl(write.fileno(), ficlone, read.fileno())
        except OSError:
            raise UsageError(
                f"{source} cannot be linked to {target.parent}: another file system", hint="leave out --link"
            ) from None


def _guard(bundle: Bundle, target: Path) -> None:
    inside, around = target.absolute(), bundle.path.absolute()
    if inside == around or around in inside.parents or inside in around.parents:
        raise UsageError(
            f"{target} and the bundle {bundle.path} lie in each other", hint="choose another place with -o"
        )


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = ITEM_BYTES[dtype]
    for axis in shape:
        count *= axis
    return count
