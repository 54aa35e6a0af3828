import itertools

import numpy as np
import pytest
import torch

from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES, NUMPY, TO_TORCH, from_float32, promote, to_float32

from ..families import normal


def torch_dtype(name):
    return getattr(torch, TO_TORCH[name])


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(FLOATING, 2)))
def test_promotion_is_that_of_torch(pair):
    for order in (pair, pair[::-1]):
        assert torch_dtype(promote(order)) == torch.promote_types(*map(torch_dtype, order))


@pytest.mark.parametrize("three", list(itertools.product(FLOATING, repeat=3)))
def test_promotion_of_three_does_not_depend_on_their_order(three):
    expected = torch.promote_types(torch.promote_types(*map(torch_dtype, three[:2])), torch_dtype(three[2]))
    assert torch_dtype(promote(three)) == expected


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_sizes_are_those_of_torch_and_numpy(dtype):
    assert (
        ITEM_BYTES[dtype] == torch.empty(0, dtype=torch_dtype(dtype)).element_size() == np.dtype(NUMPY[dtype]).itemsize
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_half_is_the_float_that_torch_makes_of_it(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours = to_float32(bits.view(NUMPY[dtype]), dtype)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch_dtype(dtype)).float().numpy()
    finite = ~np.isnan(theirs)
    assert np.array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))
    assert np.isnan(ours[~finite]).all()


@pytest.mark.parametrize("dtype", FLOATING)
def test_rounding_is_that_of_torch(dtype):
    """Halfway cases, the ends of the range, subnormal numbers, infinities, both zeros."""
    halfway = torch.arange(1 << 15, dtype=torch.int32).repeat_interleave(3)
    halfway = (halfway << 16) + torch.tensor([0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(1 << 15)
    numbers = torch.cat([
        halfway.view(torch.float32), -halfway.view(torch.float32), normal(0, 1000) * 1e-6, normal(1, 1000) * 1e5,
        torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, 3.4e38, float("inf"), -float("inf"), 2.0**-25]),
    ])  # fmt: skip
    numbers = numbers[~numbers.isnan()]
    ours = np.ascontiguousarray(from_float32(numbers.numpy(), dtype))
    theirs = numbers.to(torch_dtype(dtype))
    assert np.array_equal(ours.view(np.uint8), theirs.view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", FLOATING)
def test_not_a_number_stays_one(dtype):
    bits = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(bits, dtype), dtype)).all()
