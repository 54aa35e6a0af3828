import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.random import tie_numbers
from flexmerge_cli.residuals.sparse import Sparse

FEW_VALUES = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])  # so that ties are common
SIDES = st.sampled_from([0, 1, 2, 7])


def kept_one_by_one(row, count, start=0):
    numbers = tie_numbers("", np.arange(start, start + len(row), dtype=np.uint64))
    ranked = sorted(range(len(row)), key=lambda index: (-abs(row[index]), numbers[index]))
    return [index in ranked[:count] for index in range(len(row))]


@settings(deadline=None, max_examples=60)
@given(st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.float32, shape, elements=FEW_VALUES)), st.data())
def test_the_largest_are_kept_and_ties_go_by_the_hash_of_their_index(matrix, data):
    density = data.draw(st.sampled_from([0.05, 0.3, 0.5, 1.0]))
    tensor = torch.from_numpy(matrix)
    whole = Sparse(density=density)
    flat = kept_one_by_one(matrix.ravel(), whole.count(matrix.shape))
    assert whole.keep(tensor).numpy().ravel().tolist() == flat
    by_row = Sparse(density=density, select="row")
    expected = [kept_one_by_one(row, int(density * len(row) + 1e-6), at * len(row)) for at, row in enumerate(matrix)]
    assert by_row.keep(tensor).numpy().tolist() == expected
    assert by_row.keep(tensor).sum() == by_row.count(matrix.shape)


@pytest.mark.parametrize("select", ["tensor", "row"])
def test_equal_magnitudes_are_kept_all_over_a_tensor(select):
    kept = Sparse(density=0.25, select=select).keep(torch.ones(64, 256))
    assert kept.sum() == 64 * 64
    for part in (kept[:32], kept[32:], kept[:, :128], kept[:, 128:]):
        assert float(part.float().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("density", "shape", "count"),
    [(0.29, (10, 10), 29), (0.01, (5, 5), 1), (1.0, (3, 3), 9), (0.5, (0, 4), 0), (0.05, (1, 1), 1)],
)
def test_counts_are_truncated_but_for_rounding_and_at_least_one(density, shape, count):
    assert Sparse(density=density).count(shape) == count


@pytest.mark.parametrize(("rescale", "order"), [("l1", 1), ("l2", 2)])
def test_rescaling_restores_the_norm(rescale, order):
    matrix = np.random.default_rng(0).standard_normal((9, 11)).astype(np.float32)
    coder = Sparse(density=0.2, rescale=rescale)
    decoded = coder.decode(coder.encode(torch.from_numpy(matrix), "F32"), matrix.shape, "F32")
    assert np.linalg.norm(decoded.ravel(), order) == pytest.approx(np.linalg.norm(matrix.ravel(), order), rel=1e-6)


def test_kept_values_are_exact_and_all_others_zero():
    matrix = torch.tensor([[0.5, -3.0, 0.25], [1.0, 0.0, -0.125]])
    coder = Sparse(density=0.34)
    assert coder.decode(coder.encode(matrix, "F32"), (2, 3), "F32").tolist() == [[0, -3, 0], [1, 0, 0]]


def test_damaged_positions_are_refused():
    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    coder = Sparse(density=0.05)
    parts = coder.encode(matrix, "F32")
    parts["index"] = np.full_like(parts["index"], 255)
    with pytest.raises(ValueError, match="index of 20 positions"):
        coder.decode(parts, (20, 20), "F32")
