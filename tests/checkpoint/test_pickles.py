"""`.bin` and `.pt`: where the bytes lie, and what hostile or odd ones are refused for."""

import collections
import io
import os
import pickle
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


@pytest.mark.parametrize("value", [
    torch.zeros(4).to_sparse(), torch.zeros(2, 2, dtype=torch.complex128), torch.zeros(2, dtype=torch.float8_e4m3fn),
], ids=["sparse", "complex128", "float8"])  # fmt: skip
def test_tensors_that_cannot_be_merged_are_refused(value, tmp_path):
    torch.save({"a": value}, tmp_path / "x.bin")
    with pytest.raises(DataError):
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
