"""Rounding with error feedback: against a plain loop that eliminates one run after another from H⁻¹."""

import numpy as np
import pytest
import torch

from flexmerge_cli.residuals import feedback
from flexmerge_cli.residuals.low_bit import GAUSS_LEVELS, GAUSS_LOSSES
from flexmerge_cli.residuals.scales import VALUES
from flexmerge_cli.residuals.sign_runs import NORMAL_LOSSES, RUNS, SignRuns, residual_code

from .test_sign_runs import hadamard

BITS = (*RUNS, 1, 2)


def words_of(bits):
    if bits < 1:
        return np.concatenate([hadamard(RUNS[bits]), -hadamard(RUNS[bits])])
    levels = np.array(GAUSS_LEVELS[int(bits)])
    return np.concatenate([-levels[::-1], levels])[:, None].astype(np.float32).astype(float)


def drawn(m, n, seed=0):
    """A matrix, and the second moments of inputs that are strongly correlated."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((3 * n + 8, n)) @ (
        np.eye(n) + rng.standard_normal((n, 2)) @ rng.standard_normal((2, n))
    )
    return rng.standard_normal((m, n)).astype(np.float32), inputs.T @ inputs / len(inputs)


def plain_loop(row, words, moments, scale):
    """Choose word after word, each of least loss if later columns could be anything; then change these."""
    n, run = len(row), words.shape[1]
    wanted, rest = row.astype(float), np.linalg.inv(moments)
    chosen, decoded = [], np.zeros(n)
    for low in range(0, n, run):
        own = slice(0, min(run, n - low))
        loss_of = np.linalg.inv(rest[own, own])
        losses = []
        for word in words:
            error = wanted[own] - scale * word[own]
            losses.append(error @ loss_of @ error)
        chosen.append(int(np.argmin(losses)))
        word = words[chosen[-1]][own]
        decoded[low : low + run] = word
        later = rest[own.stop :, own]
        wanted = wanted[own.stop :] - later @ loss_of @ (wanted[own] - scale * word)
        rest = rest[own.stop :, own.stop :] - later @ loss_of @ later.T
    return chosen, decoded


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [3, 7, 40])
def test_codes_and_scales_are_those_of_a_plain_loop(bits, n):
    matrix, moments = drawn(6, n)
    coder = residual_code(bits, "byte", 6)
    found = feedback.encode(torch.from_numpy(matrix), coder, moments.astype(np.float32))
    damped = moments.astype(np.float32) + 0.01 * np.diag(moments).mean() * np.eye(n)
    decoded = coder.decode(found, matrix.shape, "F32")
    for row, got in zip(matrix, decoded):
        tried = [
            plain_loop(row, words_of(bits), damped, factor * np.sqrt(np.mean(row.astype(float) ** 2)))[1]
            for factor in feedback.FACTORS
        ]
        cosines = [row @ damped @ y / np.sqrt((row @ damped @ row) * (y @ damped @ y)) for y in tried]
        y, cosine = tried[int(np.argmax(cosines))], max(cosines)
        usual = NORMAL_LOSSES[RUNS[bits]] if bits < 1 else GAUSS_LOSSES[int(bits)]
        longer = np.clip(cosine**2, 1 - usual, 1) ** (-1 / 3) if cosine > 0 else (1 - usual) ** (-1 / 3)
        scale = longer * np.sqrt((row @ damped @ row) / (y @ damped @ y))
        rounded = VALUES[np.abs(np.log2(VALUES[1:]) - np.log2(scale)).argmin() + 1]
        assert got == pytest.approx(rounded * y, rel=1e-6)


@pytest.mark.parametrize("run", RUNS.values())
def test_inputs_that_are_not_correlated_change_no_code(run):
    matrix = torch.from_numpy(drawn(8, 3 * run)[0])
    coder = SignRuns(run=run)
    found = feedback.encode(matrix, coder, np.eye(3 * run, dtype=np.float32))
    assert np.array_equal(found["codes"], coder.encode(matrix, "F32")["codes"])


@pytest.mark.parametrize("bits", BITS)
def test_the_loss_of_outputs_falls(bits):
    matrix, moments = drawn(32, 96)
    coder = residual_code(bits, "bfloat16", 32)
    plain, fed = (
        coder.encode(torch.from_numpy(matrix), "F32"),
        feedback.encode(torch.from_numpy(matrix), coder, moments),
    )
    losses = []
    for parts in (plain, fed):
        assert {role: part.shape for role, part in parts.items()} == {
            p.role: p.shape for p in coder.parts((32, 96), "F32")
        }
        error = coder.decode(parts, (32, 96), "F32") - matrix
        losses.append((error @ moments * error).sum())
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("bits", BITS)
def test_singular_moments_and_rows_of_zeros_give_finite_values(bits):
    matrix, _ = drawn(4, 40)
    matrix[1] = 0
    coder = residual_code(bits, "byte", 4)
    one_input = np.zeros((40, 40), np.float32)
    one_input[:3, :3] = 1
    decoded = coder.decode(feedback.encode(torch.from_numpy(matrix), coder, one_input), (4, 40), "F32")
    assert np.isfinite(decoded).all() and not decoded[1].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e6])
def test_moments_of_no_inputs_are_refused(value):
    matrix, moments = drawn(4, 8)
    moments[5, 5] = value
    with pytest.raises(feedback.UnsoundMoments):
        feedback.encode(torch.from_numpy(matrix), residual_code(1, "byte", 4), moments)
