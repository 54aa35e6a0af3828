import numpy as np
import pytest
import torch

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES, TO_TORCH
from flexmerge_cli.engine.device import as_tensor, choose_device, single_threaded, to_bytes
from flexmerge_cli.errors import UsageError

from ..program import fails


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_bytes_are_a_tensor_and_back(dtype, count):
    raw = np.arange(count * ITEM_BYTES[dtype], dtype=np.uint8)
    if dtype == "BOOL":
        raw %= 2
    tensor = as_tensor(raw, dtype)
    assert (tensor.dtype, tensor.shape) == (getattr(torch, TO_TORCH[dtype]), (count,))
    assert to_bytes(tensor).tobytes() == raw.tobytes()


@pytest.mark.parametrize("wanted", ["tpu", "cuda:99", "meta", "", "cpu:x", "mps"])
def test_a_device_that_is_not_there_is_refused(wanted):
    with pytest.raises(UsageError):
        choose_device(wanted)


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(plan, tmp_path):
    fails(2, "merge", plan, "-o", tmp_path / "b", "--device", "cuda:99", says="no device `cuda:99`")


def test_threads_of_torch_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), single_threaded():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before
