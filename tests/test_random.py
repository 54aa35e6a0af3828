import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmerge_cli.random import Stream, key64, mix64, uniform

KEY = 0x915CE8D65D29A4AF


def test_key_is_that_of_the_specification():
    assert key64("flexmerge/drop/1", 7, "cars", "vision_model.encoder.layers.0.self_attn.q_proj.weight") == KEY


@pytest.mark.parametrize(
    ("key", "outputs"),
    [
        (0, ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]),
        (1234567, ["599ed017fb08fc85"]),
        (KEY, ["cc83b7c6915d9bf6", "842b24f62612352a", "682efb4183530c34", "8e37b92ee63f1c03"]),
    ],
)
def test_outputs_are_those_of_splitmix64(key, outputs):
    assert [f"{mix64(key, index):016x}" for index in range(len(outputs))] == outputs


def test_uniform_numbers_are_those_of_the_specification():
    assert uniform(KEY, 0, 1)[0] == float.fromhex("0x1.99076f8d22bb3p-1")
    assert uniform(KEY, 2**33, 1)[0] == float.fromhex("0x1.25c4537eae9b0p-3")


keys = st.integers(0, 2**64 - 1)


@given(key=keys, start=st.one_of(st.integers(0, 2**40), st.integers(2**64 - 50, 2**64 - 1)), count=st.integers(0, 99))
def test_vectors_equal_scalars_and_do_not_depend_on_the_chunk(key, start, count):
    numbers = uniform(key, start, count)
    assert numbers.dtype == np.float64
    assert numbers.shape == (count,)
    assert numbers.tolist() == [(mix64(key, start + index) >> 11) * 2.0**-53 for index in range(count)]
    cut = count // 3
    assert (numbers == np.concatenate([uniform(key, start, cut), uniform(key, start + cut, count - cut)])).all()


@given(key=keys)
def test_stream_takes_one_output_a_draw(key):
    stream = Stream(key)
    assert [stream.uniform(), stream.below(10), stream.uniform(), stream.below(1)] == [
        uniform(key, 0, 1)[0],
        ((mix64(key, 1) >> 11) * 10) >> 53,
        uniform(key, 2, 1)[0],
        0,
    ]


@given(key=keys, n=st.one_of(st.integers(1, 9), st.integers(1, 2**70)))
def test_below_is_below(key, n):
    assert 0 <= Stream(key).below(n) < n


def test_below_reaches_every_integer_about_equally_often():
    stream = Stream(key64("test", 0))
    counts = np.bincount([stream.below(7) for _ in range(7000)], minlength=7)
    assert counts.min() > 850  # five standard deviations below 1000
    assert counts.max() < 1150


def test_names_and_seed_tell_keys_apart():
    keys = [key64("a", 0), key64("a", 1), key64("a", 0, "b"), key64("a", 0, "b", "c"), key64("a", 0, "bc")]
    assert len(set(keys)) == len(keys)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="seed"):
        key64("a", -1)
    with pytest.raises(ValueError, match="integer"):
        Stream(0).below(0)
