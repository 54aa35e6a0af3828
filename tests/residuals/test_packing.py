import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.residuals import packing

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "methods-2.json").read_text())["vectors"]


@st.composite
def some_codes(draw):
    bits = draw(st.integers(1, 8))
    shape = draw(st.sampled_from([0, 1, 2, 5])), draw(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 99]))
    return bits, draw(arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))


def packed_bit_by_bit(codes, bits):
    m, n = codes.shape
    out = np.zeros((m, -(-n * bits // 8)), np.uint8)
    for row in range(m):
        for column in range(n):
            for bit in range(bits):
                place = column * bits + bit
                out[row, place // 8] |= (codes[row, column] >> bit & 1) << (place % 8)
    return out


@pytest.mark.parametrize(("vector", "bits"), [("row_codes", 3), ("row_signs", 1)])
def test_packed_rows_are_golden(vector, bits):
    rows = np.array(VECTORS[vector]["rows"], np.uint8)
    assert packing.pack(rows, bits).tobytes().hex() == VECTORS[vector]["hex"]


@settings(deadline=None, max_examples=60)
@given(some_codes())
def test_packing_equals_setting_bit_by_bit(case):
    bits, codes = case
    assert (packing.pack(codes, bits) == packed_bit_by_bit(codes, bits)).all()


@settings(deadline=None, max_examples=60)
@given(some_codes())
def test_unpacking_gives_the_codes_back(case):
    bits, codes = case
    packed = packing.pack(codes, bits)
    assert (packing.unpack(packed, codes.shape[1], bits) == codes).all()
    values = np.random.default_rng(0).random(1 << bits).astype(np.float32)
    assert (packing.unpack(packed, codes.shape[1], bits, values) == values[codes]).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_more_than_a_block_is_packed_and_unpacked(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 40 * 2**10 + 5)).astype(np.uint8)
    packed = packing.pack(codes, bits)
    assert (packing.unpack(packed, codes.shape[1], bits) == codes).all()
    assert (packing.pack(codes[1:2], bits) == packed[1:2]).all()


def test_bytes_of_another_width_are_refused():
    with pytest.raises(ValueError, match="5 codes of 3 bits"):
        packing.unpack(np.zeros((2, 3), np.uint8), 5, 3)
