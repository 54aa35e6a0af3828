"""Reads the headers of weight files, alone or by an index of shards, and small JSON files.

Takes a folder and a name, and returns tensors. checkpoint.py decides which files of a source make a model.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.choose import ADAPTER_FILES
from flexmerge_cli.checkpoint.contents import is_portable
from flexmerge_cli.checkpoint.folder import Folder
from flexmerge_cli.checkpoint.pickles import read_pickle
from flexmerge_cli.checkpoint.quantised import HINT, by_names
from flexmerge_cli.checkpoint.remote import RangeFile
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.regular_file import read_file

MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_ABSENT = 0.5  # of the tensors that an index lists, such as those of a removed layer; they are reported
HEADERS_AT_ONCE = 8

Item = TypeVar("Item")
Done = TypeVar("Done")


def read_weights(folder: Folder, weights: str) -> tuple[dict[str, StoredTensor], set[str], list[str]]:
    """Read the headers of a weight file, or of the shards of an index.

    Returns the tensors by name, the files that hold them, and where an index and its shards differ. Raises DataError if
    the tensors are unsound, quantised, or not a model's.
    """
    odd: list[str] = []
    if weights.endswith(".json"):
        tensors, odd = _read_index(folder, weights)
    else:
        tensors = read_weight_file(folder, weights)
    if shown := by_names(tensors):
        raise DataError(f"{folder.path} is quantised by {shown[0]}: it holds `{shown[1]}`", hint=HINT)
    other = None if weights in ADAPTER_FILES else foreign.of_tensors(tensors)
    if other is not None:
        raise DataError(f"{folder.path / weights} is {other[0]}: it holds `{other[1]}`", hint=other[2])
    paths = {tensor.path for tensor in tensors.values()}
    return tensors, {path.relative_to(folder.path).as_posix() for path in paths}, odd


def read_weight_file(folder: Folder, name: str) -> dict[str, StoredTensor]:
    path, remote = folder.path / name, folder.remote(name)
    file = RangeFile(remote) if remote is not None else None
    tensors = read_header(path, file)[0] if path.suffix == ".safetensors" else read_pickle(path, file)
    if not tensors:
        raise DataError(f"{path} holds no tensors", hint="get a sound copy of the file")
    return tensors


def _read_index(folder: Folder, name: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """Read the tensors of a sharded checkpoint, and list where the index and its shards differ.

    Like transformers: a shard may lie in a subfolder, and hold tensors that the index does not list. If two shards hold
    a tensor, the index decides which copy counts.
    """
    index = folder.local(name)
    weight_map = _weight_map(folder, name)
    if not weight_map:
        raise DataError(f"{index} has no `weight_map`", hint="get a sound copy of the file")
    names = sorted(set(weight_map.values()))
    for shard in names:
        if not is_portable(shard):
            raise DataError(
                f"{index} points outside its folder: `{shard[:200]}`",
                hint="do not use this checkpoint: it may be hostile",
            )
    if missing := [f"shard {shard} is missing" for shard in names if not folder.is_file(shard)]:
        raise folder.incomplete(f"{index} does not fit its shards:\n  " + "\n  ".join(missing[:20]))
    waits = any(folder.remote(shard) is not None for shard in names)
    tensors: dict[str, StoredTensor] = {}
    odd = []
    for shard, found in zip(names, each(lambda shard: read_weight_file(folder, shard), names, waits=waits)):
        for tensor_name, tensor in found.items():
            is_named = weight_map.get(tensor_name) == shard
            if tensor_name in tensors:
                other = tensors[tensor_name].path.name if is_named else shard
                odd.append(f"another copy of `{tensor_name}` in {other}")
            if is_named or tensor_name not in tensors:
                tensors[tensor_name] = tensor
    absent = [listed for listed in weight_map if listed not in tensors]
    if len(absent) > MAX_ABSENT * len(weight_map):
        shown = [f"tensor `{listed}` is in none of them" for listed in absent[:20]]
        raise folder.incomplete(f"{index} does not fit its shards:\n  " + "\n  ".join(shown))
    return tensors, odd + [f"`{listed}`, which no shard holds" for listed in absent]


def _weight_map(folder: Folder, index: str) -> dict[str, str]:
    """Map tensors to shards, without a leading `./`; empty if there is no map."""
    found = read_json(folder.local(index), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(found, dict):
        return {}
    return {tensor: str(PurePosixPath(str(shard))) if str(shard) else "" for tensor, shard in found.items()}


def missing_shards(folder: Folder, weights: str) -> list[str]:
    """Return the missing shards that an index names; none for a single file."""
    if not weights.endswith(".json"):
        return []
    shards = sorted(set(_weight_map(folder, weights).values()))
    return [shard for shard in shards if not is_portable(shard) or not folder.is_file(shard)]


def read_config(folder: Folder) -> dict[str, Any]:
    return read_json(folder.local("config.json"), MAX_CONFIG_BYTES) if folder.is_file("config.json") else {}


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises DataError."""
    data = read_file(path, max_bytes, "such a file")
    try:
        value = parse_json(data)
    except ValueError as error:
        if found := foreign.of_bytes(data[: foreign.HEAD_BYTES]):
            raise DataError(f"{path} is {found.what}", hint=found.hint) from None
        raise DataError(f"{path} is not valid JSON: {error}", hint="get a sound copy of the file") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object", hint="get a sound copy of the file")
    return value


def each(work: Callable[[Item], Done], items: Sequence[Item], *, waits: bool) -> list[Done]:
    """Apply `work` to each item, in order; several at once if they wait for the network."""
    if not waits:
        return [work(item) for item in items]
    with ThreadPoolExecutor(HEADERS_AT_ONCE, thread_name_prefix="flexmerge-open") as pool:
        return list(pool.map(work, items))
