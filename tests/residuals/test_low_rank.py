import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.residuals.low_rank import LowRank


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(1, 1), (2, 99), (99, 2), (20, 30), (30, 20)]), st.integers(1, 25), st.integers(0, 9))
def test_it_is_the_truncated_singular_value_decomposition(shape, rank, seed):
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    coder = LowRank(rank=rank)
    decoded = coder.decode(coder.encode(torch.from_numpy(matrix), "F32"), shape, "F32")
    assert decoded == pytest.approx(expected, abs=1e-5 * float(values[0]))


def test_a_matrix_of_low_rank_comes_back_whatever_its_scale():
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e4):
        matrix = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 60)) * scale).astype(np.float32)
        coder = LowRank(rank=5)
        decoded = coder.decode(coder.encode(torch.from_numpy(matrix), "F16"), matrix.shape, "F16")
        assert decoded == pytest.approx(matrix, abs=2e-3 * float(np.abs(matrix).max()))


@pytest.mark.parametrize(
    ("coder", "shape", "rank"),
    [
        (LowRank(), (768, 3072), 96),
        (LowRank(fraction=0.29), (100, 100), 29),
        (LowRank(fraction=0.01), (16, 64), 1),
        (LowRank(rank=200), (16, 64), 16),
        (LowRank(shared_by=8), (16, 64), 2),
        (LowRank(shared_by=20), (16, 64), 1),
        (LowRank(), (0, 5), 0),
    ],
)
def test_rank_is_at_least_one_and_at_most_the_matrix_has(coder, shape, rank):
    assert coder.rank_of(shape) == rank
    assert [part.shape for part in coder.parts(shape, "BF16")] == [(shape[0], rank), (rank, shape[1])]
