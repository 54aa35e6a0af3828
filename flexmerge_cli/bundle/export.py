"""One task of a bundle as an ordinary checkpoint folder."""

import json
import os
import shutil
from pathlib import Path

from flexmerge_cli.allocation.files import SHARD_BYTES, safetensors_header
from flexmerge_cli.bundle.publish import check_target, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.checkpoint import find_weights
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.engine.output import no_space
from flexmerge_cli.errors import UsageError
from flexmerge_cli.version import VERSION

INDEX_NAME = "model.safetensors.index.json"


def export_task(bundle: Bundle, task: str, target: Path, *, force: bool = False, link: bool = False) -> None:
    """Write config, tokenizer and weights; `link` makes the weights hard links or reflinks of the bundle's files.

    Raises UsageError if `link` is asked for and something must be decoded, renamed or cast.
    """
    bundle.check_task(task)
    check_target(target, force=force, replaceable=lambda path: find_weights(path) is not None)
    _guard(bundle, target)
    index = bundle.path / "tasks" / task / INDEX_NAME
    if link and not index.is_file():
        raise UsageError(
            f"task `{task}` cannot be linked: its tensors must be decoded, renamed or cast", hint="leave out --link"
        )
    size = 0 if link else sum(_num_bytes(*form) for form in bundle.tensors_of(task).values())
    if shutil.disk_usage(target.absolute().parent).free < size:
        raise no_space(target, size)
    with publish(target, force=force) as folder:
        prefix = f"tasks/{task}/"
        for path in bundle.manifest.tasks[task].files:
            if path.startswith(prefix) and path != f"{prefix}{INDEX_NAME}":
                place = folder / path.removeprefix(prefix)
                shutil.copyfile(bundle.path / path, place)
        if link:
            _link(bundle, index, folder)
        else:
            _write(bundle, task, folder)


def _write(bundle: Bundle, task: str, folder: Path) -> None:
    """Tensors in the order of the source, in shards of at most SHARD_BYTES, streamed one tensor at a time."""
    forms = bundle.tensors_of(task)
    aligned = {bundle.manifest.tasks[task].names.get(t.name, t.name): t for t in bundle.manifest.tensors}
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(forms, key=lambda name: (-ITEM_BYTES[forms[name][0]], name)):
        if shards[-1] and size + _num_bytes(*forms[name]) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(*forms[name])
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = {name: (*forms[name], _num_bytes(*forms[name])) for name in shard}
        metadata = {"bundle": bundle.manifest.id, "flexmerge": VERSION, "format": "pt"}
        with (folder / file_name).open("xb") as file:
            file.write(safetensors_header(header, metadata))
            for name in shard:
                file.write(bundle.array(task, aligned[name].name).tobytes())
                weight_map[name] = file_name
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(_num_bytes(*forms[name]) for name in forms)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _link(bundle: Bundle, index: Path, folder: Path) -> None:
    """The bundle's files under names that loaders and tools that glob a folder know as shards."""
    weight_map = {name: Path(path).name for name, path in json.loads(index.read_bytes())["weight_map"].items()}
    files = sorted(set(weight_map.values()))
    new_names = {name: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, name in enumerate(files, 1)}
    for name, new in new_names.items():
        try:
            os.link(bundle.path / "weights" / name, folder / new)
        except OSError:
            _reflink(bundle.path / "weights" / name, folder / new)
    total = json.loads(index.read_bytes())["metadata"]["total_size"]
    value = {
        "metadata": {"total_size": total},
        "weight_map": {key: new_names[name] for key, name in weight_map.items()},
    }
    (folder / INDEX_NAME).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


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
