"""Patterns of signs: against Hadamard matrices written out, and the loss that `auto` predicts against the true one."""

import sys

import numpy as np
import pytest
import torch

from flexmerge_cli.residuals.low_bit import weight_code
from flexmerge_cli.residuals.quantise import squared_errors
from flexmerge_cli.residuals.sign_runs import NORMAL_LOSSES, RUNS, SignRuns, patterns

from ..engine.peaks import measured

DRAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "student": lambda rng, shape: rng.standard_t(5, shape),
}


def hadamard(run):
    found = np.ones((1, 1))
    while len(found) < run:
        found = np.block([[found, found], [found, -found]])
    return found


@pytest.mark.parametrize("run", RUNS.values())
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 100])
@pytest.mark.parametrize(("scales", "rounding"), [("bfloat16", 2**-8), ("byte", 2 ** (1 / 8) - 1)])
def test_every_run_decodes_to_the_pattern_of_largest_product_at_the_length_that_its_loss_asks_for(
    run, columns, scales, rounding
):
    matrix = np.random.default_rng(columns).standard_normal((5, columns)).astype(np.float32)
    coder = SignRuns(run=run, scales=scales)
    decoded = coder.decode(coder.encode(torch.from_numpy(matrix), "F32"), matrix.shape, "F32")
    words = np.concatenate([hadamard(run), -hadamard(run)])
    runs, found = (np.pad(x, ((0, 0), (0, -columns % run))).reshape(5, -1, run) for x in (matrix, np.sign(decoded)))
    assert (runs * found).sum(2) == pytest.approx((runs @ words.T).max(2))
    products, energy = (runs @ words.T).max(2).sum(1, keepdims=True), (matrix**2).sum(1, keepdims=True)
    lost = np.minimum(1 - products**2 / (energy * columns), NORMAL_LOSSES[run])
    length = np.sqrt(energy / columns) / (1 - lost) ** (1 / 3)
    assert np.abs(decoded) == pytest.approx(length.repeat(columns, 1), rel=rounding)


@pytest.mark.parametrize("run", RUNS.values())
def test_patterns_are_the_rows_of_a_hadamard_matrix_and_their_negatives(run):
    signs = np.unpackbits(patterns(run), axis=1, bitorder="little", count=run)
    assert np.array_equal(2.0 * signs - 1, np.concatenate([hadamard(run), -hadamard(run)]))


@pytest.mark.parametrize("run", RUNS.values())
@pytest.mark.parametrize("draw", DRAWS)
def test_the_predicted_loss_is_near_the_true_one(run, draw):
    matrix = torch.from_numpy(DRAWS[draw](np.random.default_rng(run), (400, 512)).astype(np.float32))
    coder = SignRuns(run=run)
    decoded = torch.from_numpy(coder.decode(coder.encode(matrix, "F32"), tuple(matrix.shape), "F32"))
    energy = matrix.square().sum(1)
    true = 1 - ((matrix * decoded).sum(1).square() / decoded.square().sum(1)).sum() / energy.sum()
    of_signs = float(squared_errors(matrix, weight_code(1)).sum() / energy.sum())
    assert coder.loss(of_signs) == pytest.approx(float(true), abs=0.03)
    if draw == "normal":
        assert NORMAL_LOSSES[run] == pytest.approx(float(true), abs=0.005)


def test_bits_are_those_of_the_codes():
    for bits, run in RUNS.items():
        assert bits == (np.log2(run) + 1) / run
        (codes,) = [part for part in SignRuns(run=run).parts((3, 32 * 64), "F32") if part.role == "codes"]
        assert 8 * codes.num_bytes == bits * 3 * 32 * 64


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_rows_shorter_than_a_run_take_no_more_memory_than_is_told(tmp_path):
    shapes = [(32, (300_000, 2)), (4, (300_000, 5)), (32, (1000, 1000))]
    for case in measured([{"sign_runs": run, "shape": shape} for run, shape in shapes], tmp_path):
        assert case["peak"] <= case["told"] + (1 << 20), case
