import hashlib
import itertools

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.digest import (
    PIECE_BYTES,
    FileHash,
    TensorDigest,
    digest_bytes,
    digest_range,
    file_digests,
)

SIZES = (0, 1, 2, 99, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5)


def noise(num_bytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_a_digest_is_of_the_digests_of_pieces(size):
    data = noise(size).tobytes()
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, size, PIECE_BYTES)]
    expected = xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(piece) for piece in pieces))
    assert digest_bytes(data) == digest_bytes(np.frombuffer(data, np.uint8)) == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SIZES), st.lists(st.integers(0, 3 * PIECE_BYTES + 5), max_size=6), st.booleans())
def test_a_digest_does_not_depend_on_how_the_tensor_was_cut(size, cuts, end_is_told):
    data = noise(size)
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    whole = TensorDigest()
    for start, stop in itertools.pairwise(edges):
        whole.add(digest_range(data[start:stop], start, last=end_is_told and stop == size))
    assert whole.hexdigest() == digest_bytes(data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [997, PIECE_BYTES, 2 * PIECE_BYTES + 3])
def test_a_file_has_the_digest_of_its_bytes_beside_its_sha256(size, step, tmp_path):
    data, whole = noise(size).tobytes(), FileHash()
    for start in range(0, size, step):
        whole.update(data[start : start + step])
    (tmp_path / "file").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest(), digest_bytes(data)
    assert whole.digests() == file_digests(tmp_path / "file") == expected


@pytest.mark.parametrize("size", [1, 99, PIECE_BYTES, PIECE_BYTES + 1])
def test_one_bit_changes_it(size):
    data = noise(size)
    expected = digest_bytes(data)
    for place in {0, size // 2, size - 1}:
        data[place] ^= 0x10
        assert digest_bytes(data) != expected
        data[place] ^= 0x10
    assert digest_bytes(data[:-1]) != expected
    assert digest_bytes(data) == expected
