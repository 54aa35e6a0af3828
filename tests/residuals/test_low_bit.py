import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flexmerge_cli.checkpoint.dtypes import from_float32, to_float32
from flexmerge_cli.residuals.low_bit import GAUSS_LEVELS, GAUSS_THRESHOLDS, LowBit, half_range
from flexmerge_cli.residuals.packing import unpack
from flexmerge_cli.residuals.sign_runs import residual_code

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "auto.json").read_text())["vectors"]
SOME = [
    LowBit(bits=bits, gain=gain, scales=scales, clip=clip)
    for bits, gain, scales, clip in itertools.product(
        range(1, 9), ["none", "norm"], ["float32", "bfloat16"], ["none", "search"]
    )
]


def reference(row, coder):
    """One row, in plain numpy: codes and the scale as stored."""
    x = row.astype(np.float64)
    dtype = {"float32": "F32", "bfloat16": "BF16"}[coder.scales]

    def stored(scale):
        return to_float32(from_float32(np.array([scale], np.float32), dtype), dtype)[0]

    if coder.bits <= 3:
        positive = GAUSS_THRESHOLDS[coder.bits]
        thresholds = [*(-t for t in positive[::-1]), 0.0, *positive]
        scale = np.sqrt(np.mean(x**2))
        units = x / scale if scale > 0 else np.zeros_like(x)
        codes = np.array([sum(t <= u for t in thresholds) for u in units])
        scale = stored(scale)
        levels = np.array([*(-v for v in GAUSS_LEVELS[coder.bits][::-1]), *GAUSS_LEVELS[coder.bits]], np.float32)[codes]
    else:
        h, best = half_range(coder.bits), np.inf
        factors = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4) if coder.clip == "search" and coder.bits == 4 else (1,)
        for factor in factors:
            s = stored(factor * np.abs(x).max() / h)
            q = np.clip(np.rint(x / np.float64(s)) if s > 0 else np.zeros_like(x), -h, h)
            error = ((x - np.float64(s) * q) ** 2).sum()
            if error < best:
                best, scale, levels, codes = error, s, q, (q + h).astype(int)
    if coder.gain == "norm":
        length = np.sqrt((levels.astype(np.float64) ** 2).sum())
        scale = stored(np.sqrt((x**2).sum()) / length if length > 0 else 0)
    return codes, scale


@pytest.mark.parametrize("case", VECTORS["codes"]["cases"], ids=lambda case: f"{case['bits']}-{case['gain']}")
def test_codes_and_scales_of_chosen_rows_are_golden(case):
    x = torch.tensor(VECTORS["codes"]["x"])
    coder = LowBit(bits=case["bits"], gain=case["gain"], scales="bfloat16", clip="search")
    parts = coder.encode(x, "F32")
    assert parts["codes"].tobytes().hex() == case["packed"]
    assert to_float32(parts["scale"], "BF16").tolist() == case["scale"]
    assert unpack(parts["codes"], x.shape[1], case["bits"]).tolist() == case["codes"]


def test_scales_are_rounded_half_to_even():
    values, rounded = np.array(VECTORS["bfloat16"], np.float32).T
    assert (to_float32(from_float32(values, "BF16"), "BF16") == rounded).all()
    coder = LowBit(bits=8, scales="bfloat16")
    scale = coder.encode(torch.from_numpy(values * 127)[:, None], "F32")["scale"]
    assert to_float32(scale, "BF16").tolist() == pytest.approx(np.abs(rounded), rel=2**-8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SOME), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 17, 99]))
def test_rows_equal_the_plain_reference(coder, seed, n):
    rows = np.random.default_rng(seed).standard_normal((3, n)).astype(np.float32) * np.float32([[1e-4], [1], [0]])
    parts = coder.encode(torch.from_numpy(rows), "F32")
    codes = unpack(parts["codes"], n, coder.bits)
    scale = to_float32(parts["scale"], {"float32": "F32", "bfloat16": "BF16"}[coder.scales])
    for row, found_codes, found_scale in zip(rows, codes, scale):
        expected_codes, expected_scale = reference(row, coder)
        assert (found_codes == expected_codes).all()
        assert found_scale == pytest.approx(expected_scale, rel=1e-7 if coder.scales == "float32" else 2**-8)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SOME), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 64, 99, 1000]))
def test_a_row_does_not_depend_on_the_rows_beside_it(coder, seed, n):
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((5, n)).astype(np.float32))
    whole = coder.encode(rows, "F32")
    for cut in (1, 2, 4):
        chunks = [coder.encode(rows[:cut], "F32"), coder.encode(rows[cut:], "F32")]
        for role, part in whole.items():
            assert (np.concatenate([chunk[role] for chunk in chunks]) == part).all()


@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, (2, 9), elements=st.floats(-(2.0**99), 2.0**99, width=32)), st.integers(1, 8))
def test_decoded_rows_are_finite_and_spaced_ones_near(rows, bits):
    coder = LowBit(bits=bits)
    decoded = coder.decode(coder.encode(torch.from_numpy(rows), "F32"), rows.shape, "F32")
    assert np.isfinite(decoded).all()
    if bits > 3:
        largest = np.abs(rows).max(axis=1, keepdims=True)
        assert (np.abs(decoded - rows) <= largest / half_range(bits) * 0.501 + 1e-37).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_gain_restores_the_length_of_every_row(bits):
    rows = np.random.default_rng(bits).standard_normal((4, 50)).astype(np.float32)
    coder = LowBit(bits=bits, gain="norm")
    decoded = coder.decode(coder.encode(torch.from_numpy(rows), "F32"), rows.shape, "F32")
    assert np.linalg.norm(decoded, axis=1) == pytest.approx(np.linalg.norm(rows, axis=1), rel=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("value", [-3.0, 0.0, 1e-3])
def test_constant_rows_are_exact_up_to_their_scale(bits, value):
    rows = np.full((2, 7), value, np.float32)
    coder = residual_code(bits, "bfloat16", 4)
    decoded = coder.decode(coder.encode(torch.from_numpy(rows), "F32"), rows.shape, "F32")
    assert decoded.ravel() == pytest.approx(rows.ravel(), rel=2**-8)
    assert (decoded == decoded[0, 0]).all()


@pytest.mark.parametrize(("bits", "kept"), [(1, False), (3, False), (4, True), (8, True)])
def test_one_huge_element_survives_only_evenly_spaced_codes(bits, kept):
    row = np.full((1, 1000), 1e-3, np.float32)
    row[0, 500] = 100
    coder = residual_code(bits, "bfloat16", 4)
    decoded = coder.decode(coder.encode(torch.from_numpy(row), "F32"), row.shape, "F32")
    assert (abs(decoded[0, 500] - 100) < 1) == kept


def test_fitted_levels_are_stored_ascending_and_lose_less():
    rows = torch.from_numpy(np.random.default_rng(0).laplace(size=(20, 100)).astype(np.float32))
    lost = {}
    for levels in ("gauss", "empirical"):
        coder = LowBit(bits=3, levels=levels)
        parts = coder.encode(rows, "F32")
        lost[levels] = float(np.square(coder.decode(parts, rows.shape, "F32") - rows.numpy()).sum())
    assert (np.diff(parts["levels"]) > 0).all()
    assert lost["empirical"] < lost["gauss"]
