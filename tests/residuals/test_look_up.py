"""Decoding by torch gives the bits of decoding by numpy, on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.look_up import scaled_levels_on
from flexmerge_cli.residuals.low_bit import LowBit

from .test_coders import CODERS, DTYPES, matrices

LOOKED_UP = [coder for coder in CODERS if isinstance(coder, (LowBit, BitDelta))]


def assert_same_bits(coder, matrix, dtype, device):
    parts = coder.encode(torch.from_numpy(matrix), dtype)
    found = scaled_levels_on(coder.look_up(parts, matrix.shape), lambda part: torch.from_numpy(part).to(device))
    assert found.device.type == device
    assert found.cpu().numpy().tobytes() == coder.decode(parts, matrix.shape, dtype).tobytes()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(LOOKED_UP), matrices(), DTYPES)
def test_the_bits_are_those_of_numpy(coder, matrix, dtype):
    assert_same_bits(coder, matrix, dtype, "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("coder", LOOKED_UP, ids=repr)
def test_a_cuda_device_gives_them_too(coder):
    matrix = torch.randn(200, 301, generator=torch.Generator().manual_seed(0)).numpy()
    assert_same_bits(coder, matrix, "BF16", "cuda")
