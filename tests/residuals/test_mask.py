import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.residuals import mask

SIZES = st.sampled_from([0, 1, 2, 7, 8, 9, 99])


def test_bits_are_least_significant_first_and_the_tail_is_zero():
    packed = mask.pack(np.array([1, 0, 0, 1, 1, 1, 0, 1, 1, 0], bool))
    assert packed.tobytes().hex() == "b901"


@settings(deadline=None, max_examples=60)
@given(SIZES.flatmap(lambda n: arrays(bool, (3, n))))
def test_unpacking_gives_the_mask_back(tasks):
    packed = mask.pack(tasks)
    assert packed.shape == (3, mask.packed_bytes(tasks.shape[1]))
    assert (mask.unpack(packed, tasks.shape[1]) == tasks).all()
    assert (mask.unpack(packed[1], tasks.shape[1]) == tasks[1]).all()


@settings(deadline=None, max_examples=60)
@given(arrays(bool, 99), st.sampled_from([8, 16, 64, 96]))
def test_ranges_that_start_at_whole_bytes_are_packed_alone(bits, cut):
    parts = [mask.pack(bits[:cut]), mask.pack(bits[cut:])]
    assert (np.concatenate(parts) == mask.pack(bits)).all()


@pytest.mark.parametrize("packed", [np.zeros(1, np.uint8), np.zeros(2, np.int8), np.array([0, 4], np.uint8)])
def test_bytes_that_are_no_mask_of_ten_elements_are_refused(packed):
    with pytest.raises(ValueError, match="mask of 10 elements"):
        mask.unpack(packed, 10)


def test_a_task_takes_its_elements_times_its_factor():
    base, unified = np.array([1, 2, -0.0, 4], np.float32), np.array([8, 16, 32, 64], np.float32)
    taken = np.array([True, False, False, True])
    found = mask.apply(base, unified, taken, 0.5)
    assert found.dtype == np.float32
    assert found.tobytes() == np.array([5, 2, -0.0, 36], np.float32).tobytes()


def test_the_factor_is_rounded_to_float32_before_the_product():
    gamma = 1 / 3
    found = mask.apply(np.zeros(1, np.float32), np.ones(1, np.float32), np.ones(1, bool), gamma)
    assert found[0] == np.float32(gamma)
