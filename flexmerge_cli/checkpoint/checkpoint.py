"""One model's files: a source string in, its tensors (headers only), config and side files out. Reads no weight.

safetensors wins where a folder holds both formats. Knows nothing of other models, classes or blocks.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from flexmerge_cli.checkpoint.pickles import read_pickle
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.text import is_text

# In order of preference: one file, or an index of shards.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "open_clip_pytorch_model.bin",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# What makes a folder of weights usable: config, tokenizer, processor, licence. Training state and code stay behind.
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm", ".yaml", ".yml")
SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_SIDE = ("trainer_state.json", "training_args.json", "optimizer.json")
MAX_SIDE_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_NAME_BYTES = 255  # of one file


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One model on disk."""

    source: str
    """As the user wrote it."""
    path: Path
    """Absolute; a folder or one file."""
    tensors: dict[str, StoredTensor]
    """By own name, in the order of the files and of the bytes in them."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json, or empty."""
    side_files: dict[str, Path] = field(default_factory=dict)
    """What lies beside the weights and belongs to the model, by file name, sorted."""
    ignored: tuple[str, ...] = ()
    """What lies beside the weights and is left there."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors.values())

    def weight_paths(self) -> list[Path]:
        return list(dict.fromkeys(tensor.path for tensor in self.tensors.values()))


def open_checkpoint(source: str, *, relative_to: Path | None = None) -> Checkpoint:
    """Read the headers of the model at `source`: a folder, a weight file, or `hf://org/name[@revision][:subfolder]`.

    A path without a scheme never touches the network. Raises SourceError if there is nothing, DataError if unsound.
    """
    from flexmerge_cli.checkpoint.hub import is_hub, resolve_hub

    path = resolve_hub(source) if is_hub(source) else (relative_to or Path()) / _expanded(source)
    path = path.absolute()
    if not is_text(str(path)):
        raise SourceError(f"{str(path)!r} is not Unicode text, as a plan and a bundle must be", hint="rename it")
    if not _exists(path):
        looks_like_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
        raise SourceError(
            f"no checkpoint at {path}: it does not exist",
            hint=f"for the Hub write hf://{source}" if looks_like_hub else "check the path",
        )
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise SourceError(
                f"{path} is no weight file (its name ends in none of {', '.join(WEIGHT_SUFFIXES)})",
                hint="give a checkpoint folder or a weight file",
            )
        return Checkpoint(source=source, path=path, tensors=_read_file(path))
    weights = find_weights(path)
    if weights is None:
        raise SourceError(
            f"no checkpoint in {path}: none of {', '.join(WEIGHT_FILES[:5])} there",
            hint="give the folder that holds the weights",
        )
    _guard(path, weights)
    tensors = _read_index(path, weights) if weights.suffix == ".json" else _read_file(weights)
    side, ignored = _side_files(path, {tensor.path for tensor in tensors.values()})
    return Checkpoint(
        source=source, path=path, tensors=tensors, config=_read_config(path), side_files=side, ignored=ignored
    )


def _expanded(source: str) -> Path:
    """`~` and `~user` are homes; where there is no such user, a name like another."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for the file system
        return False


def find_weights(folder: Path) -> Path | None:
    """The weight file or index of a folder; None if it is no checkpoint."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    # A lone file of any name, as `save_model` and training scripts leave it.
    for suffix in (".safetensors", ".pt", ".pth", ".bin"):
        found = [path for path in sorted(folder.glob(f"*{suffix}")) if path.name != "training_args.bin"]
        if len(found) == 1 and "adapter" not in found[0].name:
            return found[0]
    return None


def _read_file(path: Path) -> dict[str, StoredTensor]:
    tensors = read_header(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    if not tensors:
        raise DataError(f"{path} holds no tensors", hint="get a sound copy of the file")
    return tensors


def _read_index(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """Tensors of a sharded checkpoint; every shard there, every tensor where the index says."""
    weight_map = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index} has no `weight_map`", hint="get a sound copy of the file")
    shards: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for shard in sorted({str(value) for value in weight_map.values()}):
        if not _is_file_name(shard):
            raise DataError(
                f"{index} points outside its folder: `{shard[:200]}`",
                hint="do not use this checkpoint: it may be hostile",
            )
        if not (folder / shard).is_file():
            problems.append(f"shard {shard} is missing")
            continue
        _guard(folder, folder / shard)
        shards[shard] = _read_file(folder / shard)
    tensors = {}
    for name, shard in sorted(weight_map.items(), key=lambda item: str(item[1])):
        if str(shard) in shards and name not in shards[str(shard)]:
            problems.append(f"tensor `{name}` is not in {shard}")
    for shard, found in shards.items():
        for name, tensor in found.items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
            else:
                problems.append(f"tensor `{name}` of {shard} is not where the index says ({weight_map.get(name)})")
    if problems:
        raise DataError(
            f"{index} does not fit its shards:\n  " + "\n  ".join(problems[:20]), hint="download the checkpoint again"
        )
    return tensors


def _is_file_name(name: str) -> bool:
    """Whether it names a file of the folder itself, as every file system has it."""
    plain = PurePosixPath(name).name == name and name not in ("", "..") and "\\" not in name
    return plain and is_text(name) and len(name.encode()) <= MAX_NAME_BYTES


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    _guard(folder, path)
    return _read_json(path, MAX_CONFIG_BYTES)


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    if path.stat().st_size > max_bytes:
        raise DataError(f"{path} is {path.stat().st_size:,} bytes, too large for what it is", hint="check the file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}", hint="get a sound copy of the file") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object", hint="get a sound copy of the file")
    return value


def _side_files(folder: Path, weights: set[Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    side, ignored = {}, []
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in SIDE_SUFFIXES or path.name in SIDE_NAMES
        if path.name.startswith(".") or path in weights or path.name.endswith(".index.json"):
            continue
        wanted = wanted and path.is_file() and path.name not in NOT_SIDE and is_text(path.name)
        if not wanted or path.stat().st_size > MAX_SIDE_BYTES:
            ignored.append(os.fsencode(path.name).decode(errors="replace"))
            continue
        _guard(folder, path)
        side[path.name] = path
    return side, tuple(ignored)


def _guard(folder: Path, path: Path) -> None:
    """No symlink is followed out of the folder, save into the blobs of the same repository in the Hub's cache."""
    if not path.is_symlink():
        return
    target, home = path.resolve(), folder.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise DataError(
            f"{path} is a link to {target}, outside its folder", hint="copy the file into the folder if it is trusted"
        )
