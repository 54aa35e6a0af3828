import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.pickles import read_pickle
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import DataError, SourceError

from ..families import normal
from ..hostile import SLOW_FILES


def read(reader, tensor, start, stop):
    buffer = np.full((stop - start) * tensor.item_bytes + 3, 0xAA, np.uint8)
    found = reader.read(tensor, start, stop, buffer)
    assert (buffer[found.size :] == 0xAA).all()
    return found.tobytes()


def bits(value):
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW_FILES)
@given(st.data())
def test_any_range_of_any_layout_is_in_c_order(tmp_path, data):
    """A .bin holds transposed, sliced and shared tensors as they lie in memory."""
    whole = normal(1, 6, 5, 4).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    states = {
        "whole": whole,
        "transposed": whole.permute(2, 0, 1),
        "sliced": whole[1::2, :, 1:3],
        "row": whole[3, 2],
        "column": whole[:, 1, 1],
        "scalar": whole[1, 2, 3],
        "empty": whole[:0],
    }
    torch.save(states, tmp_path / "x.bin")
    name = data.draw(st.sampled_from(sorted(states)))
    tensor, expected = read_pickle(tmp_path / "x.bin")[name], states[name].contiguous().reshape(-1)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    with Reader() as reader:
        assert read(reader, tensor, start, stop) == bits(expected[start:stop])


def test_many_threads_read_one_file(tmp_path):
    save_file({"a": normal(1, 50_000), "b": normal(2, 50_000)}, tmp_path / "x.safetensors")
    tensors, _ = read_header(tmp_path / "x.safetensors")
    expected = {"a": bits(normal(1, 50_000)), "b": bits(normal(2, 50_000))}
    wrong = []
    with Reader() as reader:

        def work(name):
            for start in range(0, 50_000, 5000):
                if read(reader, tensors[name], start, start + 5000) != expected[name][4 * start : 4 * start + 20_000]:
                    wrong.append((name, start))

        threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b") * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    save_file({"a": normal(1, 1000)}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")[0]["a"]
    with Reader() as reader:
        read(reader, tensor, 0, 10)
        with (tmp_path / "x.safetensors").open("r+b") as file:
            file.truncate(500)
        with pytest.raises(DataError, match="ended at byte 500"):
            read(reader, tensor, 0, 1000)


def test_a_file_that_is_gone_is_an_error(tmp_path):
    save_file({"a": normal(1, 10)}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")[0]["a"]
    (tmp_path / "x.safetensors").unlink()
    with Reader() as reader, pytest.raises(SourceError, match="cannot be read"):
        read(reader, tensor, 0, 10)
