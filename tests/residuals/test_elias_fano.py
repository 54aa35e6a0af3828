import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.residuals.elias_fano import decode_positions, encode_positions, index_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "methods-2.json").read_text())["vectors"]


@st.composite
def some_positions(draw):
    size = draw(st.sampled_from([0, 1, 2, 99, 1000, 123_457]))
    count = draw(st.integers(0, min(size, 40)) | st.just(size).filter(lambda n: n <= 1000))
    places = draw(st.permutations(range(size))) if size <= 99 else None
    chosen = places[:count] if places else np.random.default_rng(draw(st.integers(0, 9))).permutation(size)[:count]
    return size, np.sort(np.array(chosen, np.int64))


@pytest.mark.parametrize("name", ["elias_fano", "elias_fano_2", "bitmap"])
def test_blobs_are_golden(name):
    size, positions = VECTORS[name]["n"], np.array(VECTORS[name]["positions"])
    blob = encode_positions(positions, size)
    assert blob.tobytes().hex() == VECTORS[name]["hex"]
    assert (decode_positions(blob, size, len(positions)) == positions).all()


@settings(deadline=None, max_examples=60)
@given(some_positions())
def test_decoding_gives_the_positions_back(case):
    size, positions = case
    blob = encode_positions(positions, size)
    assert blob.dtype == np.uint8
    assert blob.shape == (index_bytes(size, len(positions)),)
    assert (decode_positions(blob, size, len(positions)) == positions).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**12), st.data())
def test_no_index_is_larger_than_a_bitmap(size, data):
    count = data.draw(st.integers(0, size))
    assert index_bytes(size, count) <= -(-size // 8)
    assert index_bytes(size, 0) == 0


@pytest.mark.parametrize(("size", "count", "bytes_each"), [(10**8, 10**6, 8.6), (10**8, 5 * 10**6, 6.3)])
def test_a_position_costs_what_the_module_says(size, count, bytes_each):
    assert index_bytes(size, count) * 8 / count == pytest.approx(bytes_each, abs=0.1)


def test_numbers_wider_than_a_byte_are_kept():
    positions = np.array([0, 1, 2**31, 2**40 - 1])
    assert (decode_positions(encode_positions(positions, 2**40), 2**40, 4) == positions).all()


@settings(deadline=None, max_examples=60)
@given(some_positions(), st.data())
def test_damage_is_refused_or_gives_other_ascending_positions(case, data):
    size, positions = case
    blob = encode_positions(positions, size)
    if not len(blob):
        return
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = decode_positions(blob, size, len(positions))
    except ValueError:
        return
    assert len(found) == len(positions)
    assert (np.diff(found) > 0).all() and found[0] >= 0 and found[-1] < size


def test_a_blob_of_another_size_is_refused():
    with pytest.raises(ValueError, match="3 positions"):
        decode_positions(np.zeros(9, np.uint8), 1000, 3)
