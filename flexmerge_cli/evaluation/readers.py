"""Reads files of examples, one reader per format: named columns, each read on demand, and a digest of the bytes.

jsonl        one object per line (or, in a .json, a list of objects); a column is a key that some line has
csv          with a header; .tsv: tabs. Values are texts
parquet      needs pyarrow
npz, safetensors   arrays by name, with equal first axes
imagefolder  CLASS/FILE below the folder, or below its subfolder `split`: columns `image` (paths) and `label` (CLASS)
datasets     a folder written by `save_to_disk`, or hf://org/name[@revision][:config]; needs Hugging Face `datasets`
Knows nothing of kinds or specs. No code comes from data: nothing is unpickled, no loading script is run.
"""

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flexmerge_cli.checkpoint.digest import digest_bytes
from flexmerge_cli.errors import DataError, SourceError, UsageError
from flexmerge_cli.evaluation.loading import require
from flexmerge_cli.regular_file import read_file

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".npz": "npz", ".safetensors": "safetensors",
}  # fmt: skip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HUB = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?::([\w.-]+))?")
DATA_EXTRA = "flexmerge-cli[data]"
MAX_FIELD = 16 << 20  # the most characters of one value of a .csv
MAX_TEXT_BYTES = 256 << 20  # of .jsonl, .json, .csv and .tsv, which are read whole and take some ten times as much


# What a malformed .npz raises: BadZipFile and NotImplementedError by zipfile; zlib's error, EOFError and OSError for
# truncated members; and by numpy ValueError for headers and pickles, KeyError for a missing member, and AttributeError
# and TypeError for an .npy under this name, which is loaded as an array.
UNSOUND_NPZ = (
    OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, AttributeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An open source of examples."""

    names: tuple[str, ...]
    get: Callable[[str], Any]
    """Returns a column by name: an array, or a sequence. Raises DataError."""
    digest: str


def guess_format(path: Path) -> str | None:
    """Guess the format from the file's suffix, or from a folder's contents."""
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
        return "datasets" if saved else "imagefolder"
    return SUFFIXES.get(path.suffix.lower())


def open_source(path: Path, kind: str, split: str | None) -> Source:
    """Open an existing path. Raises DataError for malformed data, UsageError for a split that does not exist."""
    if kind in ("imagefolder", "datasets"):
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder, which {kind} requires", hint="check `data`")
        return _imagefolder(path, split) if kind == "imagefolder" else _saved_dataset(path, split)
    if not path.is_file():
        raise UsageError(f"{path} is not a file, which {kind} requires", hint="check `data`")
    readers = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet, "npz": _npz, "safetensors": _safetensors}
    return readers[kind](path)


def _jsonl(path: Path) -> Source:
    data = read_file(path, MAX_TEXT_BYTES, "a table in text")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}", hint="get a sound copy of the file") from None
    whole = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    rows = (
        _json(text, path, 1)
        if whole
        else [_json(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    )
    strange = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if strange is not None:
        raise DataError(f"{path}: row {strange + 1} is not an object", hint='write one object per line, {"text": …}')
    names = tuple(dict.fromkeys(name for row in rows for name in row))

    def get(name: str) -> Any:
        lacking = next((index for index, row in enumerate(rows) if name not in row), None)
        if lacking is not None:
            raise DataError(f"{path}: row {lacking + 1} has no `{name}`", hint="give every row a value")
        return [row[name] for row in rows]

    return Source(names=names, get=get, digest=digest_bytes(data))


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: not valid JSON: {error}", hint="write one object per line") from None


def _csv(path: Path) -> Source:
    csv.field_size_limit(MAX_FIELD)
    data = read_file(path, MAX_TEXT_BYTES, "a table in text")
    try:
        lines = data.decode("utf-8-sig").splitlines(keepends=True)
        rows = list(csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start}", hint="get a sound copy of the file") from None
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}", hint="get a sound copy of the file") from None
    head, rows = (tuple(rows[0]), [row for row in rows[1:] if row]) if rows else ((), [])
    strange = next((index for index, row in enumerate(rows) if len(row) != len(head)), None)
    if strange is not None:
        raise DataError(
            f"{path}: row {strange + 1} has {len(rows[strange])} values, the header {len(head)}", hint="check the file"
        )
    return Source(names=head, get=lambda name: [row[head.index(name)] for row in rows], digest=digest_bytes(data))


def _parquet(path: Path) -> Source:
    require("pyarrow.parquet", extra=DATA_EXTRA)
    import pyarrow
    import pyarrow.parquet

    try:
        names = tuple(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a valid .parquet file: {error}", hint="get a sound copy of the file") from None

    def get(name: str) -> Any:
        try:
            return pyarrow.parquet.read_table(path, columns=[name]).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a valid .parquet file: {error}", hint="get a sound copy of the file"
            ) from None

    return Source(names=names, get=get, digest=file_digest(path))


def _npz(path: Path) -> Source:
    def get(name: str) -> Any:
        try:
            with np.load(path, allow_pickle=False) as file:
                return _rows(file[name], name)
        except UNSOUND_NPZ as error:
            raise DataError(f"{path}: `{name}` cannot be read: {error}", hint="write it with numpy.savez") from None

    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(file.files)
    except UNSOUND_NPZ as error:
        raise DataError(f"{path} is not a valid .npz file: {error}", hint="write it with numpy.savez") from None
    return Source(names=names, get=get, digest=file_digest(path))


def _safetensors(path: Path) -> Source:
    from flexmerge_cli.checkpoint.dtypes import NUMPY, to_float32
    from flexmerge_cli.checkpoint.safetensors import read_header

    tensors = read_header(path)[0]

    def get(name: str) -> Any:
        stored = tensors[name]
        mapped = np.memmap(path, np.uint8, mode="r")[stored.offset : stored.offset + stored.num_bytes]
        bits = np.asarray(mapped).view(NUMPY[stored.dtype]).reshape(stored.shape)
        return _rows(to_float32(bits, "BF16") if stored.dtype == "BF16" else bits, name)

    return Source(names=tuple(tensors), get=get, digest=file_digest(path))


def _imagefolder(path: Path, split: str | None) -> Source:
    folder = path / split if split else path
    if not folder.is_dir():
        raise UsageError(f"no split `{split}`: {folder} is not a folder", hint="check `split`")
    files = sorted(
        file
        for name in folder.iterdir()
        if name.is_dir() and not name.name.startswith(".")
        for file in name.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    )
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file_digest(file)}\n".encode())
    columns: dict[str, list[Any]] = {"image": list(files), "label": [file.parent.name for file in files]}
    return Source(names=tuple(columns), get=columns.__getitem__, digest=digest.hexdigest())


def _saved_dataset(path: Path, split: str | None) -> Source:
    require("datasets", extra=DATA_EXTRA)
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # raised by arrow, JSON and the library for a malformed folder
        raise DataError(f"{path} cannot be opened by `datasets`: {error}", hint="save_to_disk writes one") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            said = f"no split `{split}`" if split else "it has several splits"
            raise UsageError(f"{path}: {said}", hint=f"split: one of {', '.join(map(str, found))}")
        found = found[split]
    return _of_dataset(found)


def open_hub(reference: str, split: str | None) -> Source:
    """Open a data set of the Hub. Raises UsageError, SourceError."""
    match = HUB.fullmatch(reference)
    if match is None or split is None:
        raise UsageError(
            f"`{reference}` does not name a data set and a split",
            hint="path: hf://org/name[@revision][:config], split: test",
        )
    require("datasets", extra=DATA_EXTRA)
    import datasets

    repository, revision, config = match.groups()
    try:
        found = datasets.load_dataset(repository, config, split=split, revision=revision)
    except ValueError as error:  # the message names an unknown config or split and the existing ones
        raise UsageError(f"{reference}: {error}", hint="check config and split") from None
    except Exception as error:  # raised by the network, the Hub and the library
        raise SourceError(
            f"{reference} is not available: {error}", hint="download it once while online, or give a local path"
        ) from None
    return _of_dataset(found)


def _of_dataset(found: Any) -> Source:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    table = found.with_format("arrow")[:]
    with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
        stream.write_table(table.replace_schema_metadata(None).combine_chunks())
    return Source(
        names=tuple(found.column_names), get=lambda name: found[name], digest=digest_bytes(sink.getvalue().to_pybytes())
    )


def _rows(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 0:
        raise ValueError(f"`{name}` is a single number, not a column")
    return array


def file_digest(path: Path) -> str:
    return digest_bytes(np.memmap(path, np.uint8, mode="r") if path.stat().st_size else b"")
