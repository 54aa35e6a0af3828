"""Coded tensors decoded on a device: the bits of the view, for every coder, centre and dtype."""

import pytest
import torch

from flexmerge_cli import open_bundle
from flexmerge_cli.bundle.decode_on import decode_on
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.engine.upload import Uploads
from flexmerge_cli.errors import UsageError

from .bundles import make

METHODS = [
    "low_bit:bits=2",
    "low_bit:bits=3,levels=empirical",
    "low_bit:bits=5,centre=base",
    "bitdelta",
    "low_rank",
    "sparse",
    "free",
    "auto",
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def same_bits(one, other):
    return one.dtype is other.dtype and torch.equal(
        one.cpu().contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["heads", "mixed_dtypes", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_a_coded_tensor_has_the_bits_of_the_view(method, name, device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = make(tmp_path, "--method", method, *(("--size", "1x") if method == "auto" else ()), name=name)
    bundle, decoded = Bundle.open(path), 0
    for task in bundle.tasks:
        view, names = open_bundle(path).view(task), bundle.manifest.tasks[task].names
        for tensor in bundle.manifest.tensors:
            stored = bundle.whole(task, tensor.name).packable if task in tensor.digests else None
            if stored is not None and stored.decodes_on_devices:
                found = decode_on(bundle.parts_of(task), bundle.held, stored, torch.device(device), Uploads())
                expected = view[names.get(tensor.name, tensor.name)]
                assert same_bits(found.reshape(expected.shape), expected)
                decoded += 1
    assert decoded


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["merged", "masked", "tied", "coded"])
def test_a_view_on_cuda_is_the_one_on_the_cpu(kind, request):
    bundle = open_bundle(request.getfixturevalue(kind))
    for task in bundle.tasks:
        there = bundle.view(task, device="cuda")
        assert list(there) == list(bundle.view(task))
        for name, value in bundle.view(task).items():
            assert there[name].device.type == "cuda" and there[name].shape == value.shape
            assert same_bits(there[name], value)


def test_what_is_stored_otherwise_is_no_coded_tensor(merged, masked):
    for path in (merged, masked):
        bundle = Bundle.open(path)
        names = [(task, tensor.name) for tensor in bundle.manifest.tensors for task in tensor.digests]
        assert names and not any(bundle.whole(*place).decodes_on_devices for place in names)


def test_a_device_that_is_not_there_is_refused(merged):
    with pytest.raises(UsageError, match="no device `cuda:99`"):
        open_bundle(merged).view("task0", device="cuda:99")
