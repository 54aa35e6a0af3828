"""Reads the header of a `.bin` or `.pt` file that `torch.save` wrote: names, dtypes, shapes and byte offsets.

Only the archive's directory and its pickle are read, no weights. No code of the file runs (unpickle.py). The result is
offsets into the file, so that the engine reads these files like safetensors. Every tensor lies within its record, and
every record within the file and apart from the others, so that readers of tensors need not check again.
"""

import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.dtypes import FROM_TORCH, ITEM_BYTES
from flexmerge_cli.checkpoint.quantised import HINT, is_fp8
from flexmerge_cli.checkpoint.remote import RangeFile
from flexmerge_cli.checkpoint.safetensors import is_shape
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.checkpoint.unpickle import OddTensor, PickledTensor, UnsafePickle, unpickle
from flexmerge_cli.errors import DataError, FlexmergeError
from flexmerge_cli.regular_file import open_file
from flexmerge_cli.text import is_text

CONVERT = "convert it: torch.save(torch.load(path, weights_only=True), path)"
GET_SOUND = "get a sound copy of the file"
LOCAL_HEADER_BYTES = 30  # of each record, before its name
# The most bytes of the pickle, and of the archive's directory. A model of 100,000 tensors has 15 MB of each.
MAX_READ_BYTES = 16 << 20
# Different tensors may share bytes, such as a fused matrix and its parts. Without a limit, 100 bytes more of file would
# be as much work as all of it.
MAX_SHARING = 8
MAX_WRAPPERS = 3  # {"model": {"state_dict": …}}
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys under which frameworks store the weights


def read_pickle(path: Path, remote: RangeFile | None = None) -> dict[str, StoredTensor]:
    """Return the tensors by name, in file order of their bytes. Raises DataError.

    remote: the file, if it is not on this disk; `path` is then where it will lie.
    """
    with remote or open_file(path) as file:
        try:
            records = _records(path, file)
            loaded = unpickle(_pickle_of(path, file, records))
        except FlexmergeError:
            raise
        except UnsafePickle as error:
            raise DataError(
                f"{path} is more than weights, and loading it would run code of the file: {error}",
                hint="convert it to safetensors where it is trusted, e.g., by model.save_pretrained(FOLDER)",
            ) from None
        except Exception as error:  # zipfile may raise anything for a damaged or hostile archive
            raise DataError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}", hint=GET_SOUND) from None
    state = _unwrap(path, loaded)
    tensors = [_locate(path, name, tensor, records) for name, tensor in state.items()]
    places = {(t.offset, t.dtype, t.shape, t.strides): t.num_bytes for t in tensors}
    if sum(places.values()) > MAX_SHARING * sum(record.num_bytes for record in records.values()):
        raise DataError(f"{path} has tensors that share the same bytes over and over", hint=CONVERT)
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes, tensor.name))
    return {tensor.name: tensor for tensor in tensors}


@dataclass(frozen=True, slots=True)
class _Record:
    """The position of a file in the archive."""

    start: int
    num_bytes: int


class _Bounded:
    """The file as zipfile sees it. Needed because zipfile reads a directory of any size at once."""

    def __init__(self, file: Any, size: int) -> None:
        self.seek, self.tell, self._read, self._size = file.seek, file.tell, file.read, size

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self.tell())
        count = left if count < 0 else min(count, left)
        if count > MAX_READ_BYTES:
            raise ValueError(f"its directory has {count:,} bytes")
        return bytes(self._read(count))


def _records(path: Path, file: Any) -> dict[str, _Record]:
    """Return the files of the archive by name, each within the archive and apart from the others.

    torch stores them uncompressed, in the machine's byte order. torch.load can also read what another tool has
    compressed, but those weights cannot be read in place.
    """
    size = file.seek(0, 2)
    if not zipfile.is_zipfile(_Bounded(file, size)):
        file.seek(0)
        head = file.read(foreign.HEAD_BYTES)
        if found := foreign.SAFETENSORS if head[8:10] == b'{"' else foreign.of_bytes(head):
            raise DataError(f"{path} is {found.what}", hint=found.hint)
        raise DataError(
            f"{path} is truncated, or saved by torch older than 1.6: it cannot be memory-mapped",
            hint=f"get a sound copy, or {CONVERT}",
        )
    with zipfile.ZipFile(_Bounded(file, size)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise DataError(f"{path} is {foreign.TORCHSCRIPT.what}", hint=foreign.TORCHSCRIPT.hint)
        limit = min(size, archive.start_dir)
    if isinstance(file, RangeFile):
        file.prefetch((entry.header_offset, entry.header_offset + LOCAL_HEADER_BYTES) for entry in entries)
    records: dict[str, _Record] = {}
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise DataError(f"{path} is compressed: it cannot be memory-mapped", hint=CONVERT)
        if entry.flag_bits & 1 or entry.compress_size != entry.file_size or entry.filename in records:
            raise DataError(f"{path} is damaged: `{entry.filename[:100]}` is not stored as it is", hint=GET_SOUND)
        # The lengths of the name and the extra field are those of the local header: the directory may have others.
        file.seek(entry.header_offset)
        signature, name_bytes, extra_bytes = struct.unpack("<4s22x2H", file.read(LOCAL_HEADER_BYTES))
        start = entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if signature != b"PK\3\4" or entry.header_offset < end or start + entry.file_size > limit:
            raise DataError(
                f"{path} is damaged: its record `{entry.filename[:100]}` would lie at bytes {start:,} to "
                f"{start + entry.file_size:,}, outside the file's {size:,} bytes or within another record",
                hint=GET_SOUND,
            )
        end = start + entry.file_size
        records[entry.filename] = _Record(start, entry.file_size)
    return {name.partition("/")[2]: record for name, record in _of_archive(path, records)}


def _of_archive(path: Path, records: Mapping[str, _Record]) -> Iterator[tuple[str, _Record]]:
    """Return the records in the single folder that holds the pickle."""
    folders = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise DataError(f"{path} cannot be read as a torch checkpoint: it has no `data.pkl`", hint=GET_SOUND)
    return ((name, record) for name, record in records.items() if name.startswith(folders[0]))


def _pickle_of(path: Path, file: Any, records: Mapping[str, _Record]) -> bytes:
    order = records.get("byteorder")
    if order is not None and _bytes(path, file, order) != b"little":
        raise DataError(f"{path} was saved on a big-endian machine", hint=CONVERT)
    return _bytes(path, file, records["data.pkl"])


def _bytes(path: Path, file: Any, record: _Record) -> bytes:
    if record.num_bytes > MAX_READ_BYTES:
        raise DataError(
            f"{path} has {record.num_bytes:,} bytes beside its weights, more than any state dict has",
            hint="save `model.state_dict()` alone",
        )
    file.seek(record.start)
    data = bytes(file.read(record.num_bytes))
    if len(data) < record.num_bytes:
        raise DataError(f"{path} is truncated", hint=GET_SOUND)
    return data


def _unwrap(path: Path, loaded: Any) -> Mapping[str, PickledTensor | OddTensor]:
    """Return the state dict, which frameworks wrap in a dict of their own and prefix with `module.`."""
    for _ in range(MAX_WRAPPERS):
        keys = [key for key in WRAPPERS if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)]
        if not keys:
            break
        loaded = loaded[keys[0]]
    if isinstance(loaded, Mapping):
        # Transformer Engine and Megatron keep None, or bytes, where a module has no state of its own.
        loaded = {name: value for name, value in loaded.items() if not (_is_extra(name) and value is None)}
    names = list(loaded) if isinstance(loaded, Mapping) else []
    odd = [name for name in names if not (isinstance(name, str) and _is_tensor(loaded[name]))]
    if not names or odd:
        shown = [
            f"`{name[:100]}` is not a tensor" if isinstance(name, str) else "a key is not text" for name in odd[:1]
        ]
        raise DataError(
            f"{path} holds no state dict (a map of names to tensors)" + "".join(f": {why}" for why in shown),
            hint=f"save `model.state_dict()` alone, or under one of {', '.join(WRAPPERS)}",
        )
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    return {name.removeprefix(prefix): loaded[name] for name in names}


def _is_extra(name: object) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def _is_tensor(value: object) -> bool:
    return isinstance(value, PickledTensor | OddTensor)


def _locate(path: Path, name: str, tensor: PickledTensor | OddTensor, records: Mapping[str, _Record]) -> StoredTensor:
    if not is_text(name):
        raise DataError(f"{path}: tensor {name[:200]!r} has a name that is not text, or holds a NUL", hint="rename it")
    if name == "__metadata__":
        raise DataError(f"{path}: a tensor is called `{name}`, which safetensors keeps for itself", hint="rename it")
    if isinstance(tensor, OddTensor):
        raise DataError(
            f"{path}: tensor `{name}` is {tensor.kind}, which cannot be merged",
            hint="save it as a plain tensor of bfloat16, float16 or float32",
        )
    if is_fp8(tensor.dtype):
        raise DataError(
            f"{path}: tensor `{name}` has dtype {tensor.dtype}, which cannot be merged: it is quantised", hint=HINT
        )
    dtype = FROM_TORCH.get(tensor.dtype)
    if dtype is None:
        raise DataError(
            f"{path}: tensor `{name}` has dtype {tensor.dtype}, which cannot be merged",
            hint="save it as bfloat16, float16 or float32",
        )
    record = records.get(f"data/{tensor.storage.key}")
    if record is None:
        raise DataError(f"{path}: tensor `{name}` has no bytes in the file", hint=GET_SOUND)
    item_bytes = ITEM_BYTES[dtype]
    of_storage = ITEM_BYTES.get(FROM_TORCH.get(tensor.storage.dtype, ""), 1)
    stored_bytes = min(record.num_bytes, tensor.storage.num_elements * of_storage)
    shape = tensor.shape
    reach = sum((n - 1) * stride for n, stride in zip(shape, tensor.strides)) + 1 if 0 not in shape else 0
    if not is_shape(shape) or (tensor.offset + reach) * item_bytes > stored_bytes:
        raise DataError(
            f"{path} is truncated: tensor `{name}` {list(shape)[:8]} ends after its record of {record.num_bytes:,}",
            hint=GET_SOUND,
        )
    located = StoredTensor(
        name=name,
        dtype=dtype,
        shape=shape,
        path=path,
        offset=record.start + tensor.offset * item_bytes,
        strides=_strides(shape, tensor.strides),
    )
    if located.num_bytes > max(item_bytes, record.num_bytes):
        # An expanded tensor: a few bytes of file can claim more than any disk holds.
        raise DataError(
            f"{path}: tensor `{name}` {list(shape)} repeats what is stored once",
            hint="save it as `tensor.contiguous()`",
        )
    return located


def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides, or None if row-major. The stride of an axis of length 1 is meaningless and becomes 0."""
    plain, step = [], 1
    for n in reversed(shape):
        plain.append(step if n != 1 else 0)
        step *= n
    given = tuple(stride if n != 1 else 0 for n, stride in zip(shape, strides))
    return None if 0 in shape or given == tuple(reversed(plain)) else given
