"""`.bin` and `.pt`: where the bytes lie, and what hostile or odd ones are refused for."""

import collections
import io
import os
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.pickles import read_pickle
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.errors import DataError

from ..families import ODD, normal
from ..hostile import SLOW_FILES, mutations


class Bomb:
    """Unpickled by other means than weights-only, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def read_all(path):
    found = {}
    with Reader() as reader:
        for name, tensor in read_pickle(path).items():
            found[name] = reader.read(tensor, 0, tensor.num_elements, np.empty(tensor.num_bytes, np.uint8)).tobytes()
    return found


def bits(value):
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 1},
    lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"model": {"state_dict": state}, "args": {"lr": 0.1}},
    lambda state: {"epoch": 1, "module": {f"module.{name}": value for name, value in state.items()}},
    collections.OrderedDict,
    lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
], ids=["plain", "state_dict", "model", "module", "both", "nested", "deepspeed", "ordered", "parameters"])  # fmt: skip
def test_every_byte_is_where_it_is_said_to_be(wrap, tmp_path):
    state = ODD["plain"]().base
    torch.save(wrap(state), tmp_path / "x.bin")
    assert read_all(tmp_path / "x.bin") == {name: bits(value) for name, value in state.items()}


def test_shared_storage_is_told_by_equal_places(tmp_path):
    weight = normal(0, 5, 3)
    torch.save({"lm_head.weight": weight, "embed.weight": weight, "other": weight[1:]}, tmp_path / "x.bin")
    found = read_pickle(tmp_path / "x.bin")
    assert found["lm_head.weight"].offset == found["embed.weight"].offset
    assert found["other"].offset == found["embed.weight"].offset + 12


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"a": normal(0, 2), "bomb": Bomb(tmp_path / "made")}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="would run code of the file") as raised:
        read_pickle(tmp_path / "x.bin")
    assert not (tmp_path / "made").exists()
    assert "convert it to safetensors" in raised.value.hint


def test_a_bare_pickle_is_never_run(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "made")}))
    with pytest.raises(DataError):
        read_pickle(tmp_path / "x.bin")
    assert not (tmp_path / "made").exists()


def test_files_of_torch_before_1_6_are_refused(tmp_path):
    torch.save({"a": normal(0, 2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"older than 1\.6"):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("value", [
    {}, [normal(0, 2)], normal(0, 2), {"a": 1.0}, {"a": {"b": normal(0, 2)}}, {1: normal(0, 2)}, {"model": 3},
], ids=str)  # fmt: skip
def test_what_is_no_state_dict_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(DataError, match="holds no state dict"):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize(("value", "hint"), [
    (torch.zeros(4).to_sparse(), "save it as a plain tensor"),
    (torch.zeros(2, 2, dtype=torch.complex128), "save it as bfloat16"),
    (torch.zeros(2, dtype=torch.float8_e4m3fn), "dequantise it"),
], ids=["sparse", "complex128", "float8"])  # fmt: skip
def test_tensors_that_cannot_be_merged_are_refused(value, hint, tmp_path):
    torch.save({"a": value}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="`a`") as raised:
        read_pickle(tmp_path / "x.bin")
    assert hint in raised.value.hint


def test_the_name_that_safetensors_keeps_for_itself_is_refused_before_weights_are_read(tmp_path):
    """`merge` refused it, after the plan, as the name of two arrays."""
    torch.save({"__metadata__": normal(0, 4)}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="safetensors keeps for itself"):
        read_pickle(tmp_path / "x.bin")


def test_every_truncation_is_an_error(tmp_path):
    torch.save({"a": normal(0, 40), "b": normal(1, 40)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    for size in range(0, len(data) - 1, 37):
        (tmp_path / "x.bin").write_bytes(data[:size])
        with pytest.raises(DataError):
            read_pickle(tmp_path / "x.bin")


def repacked(path, compression, **changed):
    """The same archive packed by another tool, some records changed."""
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    for name in list(records):
        records[name] = changed.get(name.rpartition("/")[2], records[name])
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, data)


def test_a_compressed_archive_is_refused(tmp_path):
    """torch.load reads it; read where they lie, its weights would be deflate's bytes."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    repacked(tmp_path / "x.bin", zipfile.ZIP_DEFLATED)
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["a"], torch.zeros(1000))
    with pytest.raises(DataError, match="is compressed") as raised:
        read_pickle(tmp_path / "x.bin")
    assert "torch.save(torch.load(" in raised.value.hint


def test_an_archive_that_another_tool_stored_is_read(tmp_path):
    torch.save({"a": normal(0, 7)}, tmp_path / "x.bin")
    repacked(tmp_path / "x.bin", zipfile.ZIP_STORED)
    assert read_all(tmp_path / "x.bin") == {"a": bits(normal(0, 7))}


def test_a_big_endian_archive_is_refused(tmp_path):
    torch.save({"a": normal(0, 7)}, tmp_path / "x.bin")
    repacked(tmp_path / "x.bin", zipfile.ZIP_STORED, byteorder=b"big")
    with pytest.raises(DataError, match="big-endian"):
        read_pickle(tmp_path / "x.bin")


def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    """The bytes behind it are of another tensor, and inside the file."""
    torch.save({"a": normal(0, 100), "b": normal(1, 100)}, tmp_path / "x.bin")
    repacked(tmp_path / "x.bin", zipfile.ZIP_STORED, **{"0": bytes(40)})
    with pytest.raises(DataError):
        read_pickle(tmp_path / "x.bin")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    """Four bytes, expanded to 4 TB."""
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="repeats what is stored once"):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_header_can_hold_are_refused(name, tmp_path):
    torch.save({name: normal(0, 2)}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="not text, or holds a NUL"):
        read_pickle(tmp_path / "x.bin")


def sound():
    buffer = io.BytesIO()
    torch.save({"a": normal(0, 5), "b": normal(1, 2, 3).T}, buffer)
    return buffer.getvalue()


SOUND = sound()


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_FILES)
@given(mutations(SOUND))
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, data):
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    try:
        for tensor in read_pickle(path).values():
            assert tensor.num_bytes <= len(data)
        read_all(path)
    except DataError:
        pass


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_damaged_pickles_in_sound_archives_are_read_or_refused_and_nothing_else(tmp_path, data):
    path = tmp_path / "x.bin"
    path.write_bytes(SOUND)
    with zipfile.ZipFile(path) as archive:
        (name,) = (info.filename for info in archive.infolist() if info.filename.endswith("data.pkl"))
        text = archive.read(name)
    repacked(path, zipfile.ZIP_STORED, **{"data.pkl": data.draw(mutations(text))})
    try:
        read_all(path)
    except DataError:
        pass


def test_a_tensor_lies_within_its_record_and_a_record_within_the_file(tmp_path):
    """A local header that tells of a longer extra field than the directory lets the record begin behind the file."""
    path = tmp_path / "x.bin"
    torch.save({"a": normal(0, 4, 40).T}, path)
    sound = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        head = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data/0"))
    for at, value in ((28, 60000), (26, 60000), (28, 65535), (0, 1)):
        path.write_bytes(sound[: head + at] + value.to_bytes(2, "little") + sound[head + at + 2 :])
        with pytest.raises(DataError, match="is damaged"):
            read_pickle(path)


def archive_of(path, pickled, records=(("data/0", bytes(64)),)):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), *records, ("version", b"3\n")):
            archive.writestr(f"a/{name}", data)


class Storage:
    def __init__(self, count, key="0"):
        self.id = ("storage", torch.FloatStorage, key, "cpu", count)


def pickled(names, protocol=2):
    """A state dict of name -> (storage, offset, shape, strides), as torch.save would write it."""

    class Rebuilt:
        def __init__(self, arguments):
            self.arguments = arguments

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (*self.arguments, False, collections.OrderedDict())

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return value.id if isinstance(value, Storage) else None

    out = io.BytesIO()
    Pickler(out, protocol).dump({name: Rebuilt(arguments) for name, arguments in names.items()})
    return out.getvalue()


FOUR = Storage(16)  # 64 bytes


@pytest.mark.parametrize(("arguments", "is_sound"), [
    ((FOUR, 0, (16,), (1,)), True),
    ((FOUR, 0, (4, 4), (1, 4)), True),
    ((FOUR, 15, (1,), (1 << 62,)), True),
    ((FOUR, 16, (0, 4), (4, 1)), True),
    ((FOUR, 17, (0, 4), (4, 1)), False),
    ((FOUR, 1, (16,), (1,)), False),
    ((FOUR, 0, (4, 4), (1, 5)), False),
    ((FOUR, 0, (2,), (1 << 62,)), False),
    ((FOUR, 0, (2,), (1 << 64,)), False),
    ((FOUR, 15, (2,), (-1,)), False),
    ((FOUR, -1, (2,), (1,)), False),
    ((FOUR, 0, (-2,), (1,)), False),
    ((FOUR, 1 << 70, (2,), (1,)), False),
    ((FOUR, 0, (4, 4), (1,)), False),
    ((FOUR, 0, (1,) * 70, (1,) * 70), False),
    ((FOUR, 0, (1 << 40, 1 << 40, 0), (0, 0, 0)), False),
    ((FOUR, 0, (1 << 40,), (0,)), False),
    ((FOUR, 0, (2.0,), (1,)), False),
    ((Storage(17), 0, (17,), (1,)), False),
    ((Storage(8), 0, (16,), (1,)), False),
    ((Storage(-1), 0, (4,), (1,)), False),
    ((Storage(16, "1"), 0, (16,), (1,)), False),
    ((Storage(16, "../version"), 0, (16,), (1,)), False),
    ((None, 0, (16,), (1,)), False),
], ids=range(24))  # fmt: skip
def test_every_offset_size_and_stride_is_held_against_the_record(arguments, is_sound, tmp_path):
    archive_of(tmp_path / "x.bin", pickled({"a": arguments}))
    if is_sound:
        assert len(read_all(tmp_path / "x.bin")["a"]) <= 64
    else:
        with pytest.raises(DataError):
            read_pickle(tmp_path / "x.bin")


def test_a_reader_is_told_of_a_file_that_was_cut_after_its_header_was_read(tmp_path):
    torch.save({"a": normal(0, 40, 70).T}, tmp_path / "x.bin")
    tensor = read_pickle(tmp_path / "x.bin")["a"]
    os.truncate(tmp_path / "x.bin", 5000)
    with Reader() as reader, pytest.raises(DataError, match="ends at byte 5,000"):
        reader.read(tensor, 0, 1, np.empty(4, np.uint8))


LIST = b"]" + b"q\x00" + b"(" + b"K\x01" * 50_000 + b"e0"  # 50,000 items in memo 0, none on the stack
DOUBLED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(40))
TUPLE = b"(" + b"K\x01" * 50_000 + b"tq\x000"


@pytest.mark.parametrize("body", [
    # A tuple that holds itself twice, 40 deep, as a key; in a set; as an argument.
    b"}(" + DOUBLED + b"K\x01u.",
    b"c__builtin__\nset\n](" + DOUBLED + b"e\x85R.",
    # Memory that is named: bytes, bytes by a codec, an int of many digits.
    b"cbuiltins\nbytearray\n\x8a\x05" + (3 << 30).to_bytes(5, "little") + b"\x85R.",
    b"c_codecs\nencode\n(X\x01\0\0\0xX\x06\0\0\0latin1tR.",
    b"\x8b" + (1 << 30).to_bytes(4, "little") + b"1.",
    b"\x8e" + (1 << 40).to_bytes(8, "little") + b"1.",
    b"L" + b"9" * 100_000 + b"L\n.",
    # One long list or tuple, taken again and again by a few bytes each.
    LIST + b"(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 20_000 + b"t.",
    TUPLE + b"(" + b"ctorch.nn.parameter\nParameter\nh\x00R" * 20_000 + b"t.",
    TUPLE + b"(" + b"h\x00Q" * 20_000 + b"t.",
    # Keys that collide: multiples of 2^61 - 1 have one hash.
    b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"K\x01" for i in range(60_000)) + b"u.",
    b"(" * 200_000 + b"t" * 200_000 + b".",
    b"]" * 200_000 + b"a" * 199_999 + b".",
    b"J" + b"\xff" * 4 + b"r" + b"\xff" * 4 + b".",
    b"h\x07.", b"0.", b"R.", b"u.", b"}K\x01s.", b"Q.", b"b.", b"", b"\x80\x02",
], ids=range(23))  # fmt: skip
def test_a_pickle_takes_time_and_memory_by_its_size_alone(body, tmp_path):
    archive_of(tmp_path / "x.bin", b"\x80\x02" + body)
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read_pickle(tmp_path / "x.bin")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 8  # the tracing takes most of it
    assert peak < (1 << 20) + 150 * (tmp_path / "x.bin").stat().st_size


def test_a_pickle_larger_than_any_state_dict_s_is_not_read(tmp_path):
    archive_of(tmp_path / "x.bin", b"\x80\x02" + b"0" * (17 << 20))
    with pytest.raises(DataError, match="more than any state dict has"):
        read_pickle(tmp_path / "x.bin")


def test_many_views_of_the_same_bytes_are_refused(tmp_path):
    """Each of a hundred bytes of pickle would stand for the whole file to read."""
    names = {f"a.{i}": (Storage(1000), i, (900,), (1,)) for i in range(20)}
    archive_of(tmp_path / "x.bin", pickled(names), [("data/0", bytes(4000))])
    with pytest.raises(DataError, match="over and over"):
        read_pickle(tmp_path / "x.bin")
    names = {f"a.{i}": (Storage(1000), 0, (900,), (1,)) for i in range(20)}  # one tensor, tied
    archive_of(tmp_path / "x.bin", pickled(names), [("data/0", bytes(4000))])
    assert len(read_pickle(tmp_path / "x.bin")) == 20


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles_is_read(protocol, tmp_path):
    torch.save({"a": normal(0, 5), "b": normal(1, 2, 3).T}, tmp_path / "x.bin", pickle_protocol=protocol)
    assert read_all(tmp_path / "x.bin") == {"a": bits(normal(0, 5)), "b": bits(normal(1, 2, 3).T)}


def test_what_stands_beside_the_weights_of_a_training_checkpoint_is_read_over(tmp_path):
    weight = normal(0, 5, 3)
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": weight}}, "param_groups": [{"lr": 0.1}]}
    torch.save({
        "model": {"w": weight}, "optimizer": optimizer, "set": {1, 2}, "complex": 1j, "bytes": b"x",
        "dtype": torch.float16, ("a", 1): 3, "counts": collections.Counter("abc"), "array": bytearray(b"abc"),
        "large": 1 << 200, "none": None, "size": weight.shape, "device": torch.device("cpu"), 7: [1.5, True, ()],
    }, tmp_path / "x.bin")  # fmt: skip
    assert read_all(tmp_path / "x.bin") == {"w": bits(weight)}


@pytest.mark.parametrize("value", [
    torch._neg_view(torch.ones(2)), torch.ones(2, dtype=torch.complex64).conj(), torch.zeros(2, device="meta"),
    torch.eye(3).to_sparse_csr(),
], ids=["negated", "conjugated", "meta", "csr"])  # fmt: skip
def test_tensors_whose_bytes_are_not_their_values_are_refused(value, tmp_path):
    torch.save({"a": value}, tmp_path / "x.bin")
    with pytest.raises(DataError, match="which cannot be merged"):
        read_pickle(tmp_path / "x.bin")


def test_an_archive_that_tells_of_two_disks_is_refused(tmp_path):
    torch.save({"a": normal(0, 4)}, tmp_path / "x.bin")
    data = (tmp_path / "x.bin").read_bytes()
    end = data.rindex(b"PK\5\6")
    locator = b"PK\6\7" + bytes(12) + (2).to_bytes(4, "little")
    (tmp_path / "x.bin").write_bytes(data[:end] + locator + data[end:])
    with pytest.raises(DataError):
        read_pickle(tmp_path / "x.bin")
