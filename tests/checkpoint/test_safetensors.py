"""Headers: what the format allows is read as the format's own package reads it, all else is refused with a reason."""

import json
import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import DataError

from ..families import ODD
from ..hostile import SLOW_FILES, json_values, mutations


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), start=0, stop=8, **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]} | extra


TWO = {"a": entry(), "b": entry(start=8, stop=16)}

# What is wrong -> (header, data, what the error says).
BAD = {
    "no header at all": (None, b"\x01\x02", "truncated"),
    "empty file": (None, b"", "truncated"),
    "header longer than the file": (None, struct.pack("<Q", 1000) + b"{}", "its header claims 1,000 bytes"),
    "header of 2^63 bytes": (None, struct.pack("<Q", 1 << 63) + b"{}", "its header claims"),
    "header over the format's limit": (None, struct.pack("<Q", 100_000_001) + b"{}", "its header claims"),
    "no JSON": (b"{oops", b"", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "a list": ([], b"", "not a JSON object"),
    "deep nesting": (b"[" * 100_000, b"", "not valid JSON"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", b"", "not valid JSON"),
    "one name twice": (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
    "a name that is no text": (b'{"\\ud800": {}}', b"", "not text"),
    "NUL in a name": ({"a\0b": entry()}, bytes(8), "holds a NUL"),
    "metadata that are no strings": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8), "__metadata__"),
    "metadata null": ({"__metadata__": None, "a": entry()}, bytes(8), "__metadata__"),
    "entry that is a list": ({"a": []}, b"", "must have exactly dtype, shape and data_offsets"),
    "entry without shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "must have exactly dtype"),
    "entry with more": ({"a": entry(x=1)}, bytes(8), "must have exactly dtype"),
    "float8": ({"a": entry("F8_E4M3", (8,))}, bytes(8), "has dtype F8_E4M3, which cannot be merged"),
    "no dtype": ({"a": entry(None)}, bytes(8), "cannot be merged"),
    "negative axis": ({"a": entry(shape=(-2,))}, bytes(8), "invalid shape"),
    "axis true": ({"a": entry(shape=(True, 2))}, bytes(8), "invalid shape"),
    "axis of a float": ({"a": entry(shape=(2.0,))}, bytes(8), "invalid shape"),
    "65 axes": ({"a": entry(shape=(1,) * 64 + (2,))}, bytes(8), "invalid shape"),
    "axis of 2^63": ({"a": entry(shape=(1 << 63,))}, bytes(8), "invalid shape"),
    # No bytes, and yet no array: numpy and torch count the other axes.
    "empty and larger than any array": ({"a": entry(shape=(0, 1 << 62), stop=0)}, b"", "invalid shape"),
    "empty, of axes whose product is": ({"a": entry(shape=(1 << 40, 0, 1 << 40), stop=0)}, b"", "invalid shape"),
    "offsets that are three": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}},
        bytes(8),
        "data_offsets",
    ),
    "negative offset": ({"a": entry(start=-8, stop=0)}, bytes(8), "invalid data_offsets"),
    "offsets of other bytes than the shape": ({"a": entry(stop=7)}, bytes(7), "8 bytes, but its data_offsets span 7"),
    "sizes that overflow": ({"a": entry(shape=(1 << 32, 1 << 32))}, bytes(8), "its data_offsets span"),
    "overlap": ({"a": entry(), "b": entry(start=4, stop=12)}, bytes(12), "overlaps the tensor before it"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), "overlaps the tensor before it"),
    "hole between": ({"a": entry(), "b": entry(start=12, stop=20)}, bytes(20), "leaves a hole before it (byte 12)"),
    "hole at the start": ({"a": entry(start=4, stop=12)}, bytes(12), "leaves a hole before it (byte 4)"),
    "cut by a byte": (TWO, bytes(15), "is truncated: tensors end at byte"),
    "cut to the header": (TWO, b"", "is truncated: tensors end at byte"),
    "longer by a byte": (TWO, bytes(17), "longer than its header says"),
}


@pytest.mark.parametrize("what", BAD)
def test_unsound_files_are_refused_with_file_and_reason(what, tmp_path):
    header, data, says = BAD[what]
    path = tmp_path / "model.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        write(path, header, data)
    with pytest.raises(DataError) as raised:
        read_header(path)
    assert str(path) in raised.value.message and says in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("name", ODD)
def test_every_tensor_is_where_the_header_says(name, tmp_path):
    import numpy as np

    state = ODD[name]().tasks[next(iter(ODD[name]().tasks))]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "x.safetensors", {"format": "pt"})
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert set(tensors) == set(state)
    with Reader() as reader:
        for key, tensor in tensors.items():
            expected = state[key].contiguous().view(-1).view(torch.uint8).numpy()
            buffer = np.empty(tensor.num_bytes, np.uint8)
            assert tensor.shape == tuple(state[key].shape)
            assert np.array_equal(reader.read(tensor, 0, tensor.num_elements, buffer), expected)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"b": entry(start=8, stop=16), "c": entry(shape=(0,), start=8, stop=8), "a": entry()}
    tensors, _ = read_header(write(tmp_path / "x.safetensors", header, bytes(16)))
    assert list(tensors) == ["a", "c", "b"]


def test_a_file_without_tensors_is_sound(tmp_path):
    assert read_header(write(tmp_path / "x.safetensors", {})) == ({}, {})


def accepted_by_the_package(path):
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError, ValueError):
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_whatever_the_package_refuses_we_refuse_and_never_otherwise_than_with_a_clean_error(tmp_path, data):
    """Mutated bytes of a sound file, and headers of mutated JSON."""
    path = tmp_path / "x.safetensors"
    sound = struct.pack("<Q", len(json.dumps(TWO))) + json.dumps(TWO).encode() + bytes(16)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(mutations(sound)))
    else:
        write(path, data.draw(json_values(TWO)), bytes(data.draw(st.sampled_from([0, 8, 15, 16, 17]))))
    try:
        tensors, _ = read_header(path)
    except DataError:
        return
    theirs = accepted_by_the_package(path)
    assert theirs == set(tensors)


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__" and "\0" not in name),
    st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.sampled_from([0, 1, 2, 99]), max_size=3)), max_size=5,
))  # fmt: skip
def test_what_the_package_reads_we_read_alike(tmp_path, tensors):
    assume(all(name.encode(errors="replace").decode() == name for name in tensors))
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_BYTES[dtype] * int(torch.Size(shape).numel())
        header[name] = entry(dtype, shape, position, position + size)
        position += size
    assume(position < 1 << 20)
    found, _ = read_header(write(tmp_path / "x.safetensors", header, bytes(position)))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.items()} == {
        name: (dtype, shape) for name, (dtype, shape) in tensors.items()
    }
    if not any(dtype == "C64" for dtype, _ in tensors.values()):
        assert accepted_by_the_package(tmp_path / "x.safetensors") == set(tensors)
