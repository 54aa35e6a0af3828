"""Decompositions by the Gram route, the rule of matrices, ranks and filters."""

import numpy as np
import pytest
import torch

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.aswudi import rank
from flexmerge_cli.methods.fr import filtered, pass_mask
from flexmerge_cli.methods.iso import ranks
from flexmerge_cli.methods.matrices import is_matrix
from flexmerge_cli.methods.registry import parse_call
from flexmerge_cli.methods.svd import polar, svd

from .driver import family_of, merge


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 3), (3, 7), (40, 12)])
def test_gram_route_agrees_with_the_full_decomposition(shape):
    matrix = random(*shape)
    found = svd(matrix)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(found.s, s, rtol=1e-12)
    assert torch.allclose(found.product(), matrix, atol=1e-12)
    assert torch.allclose(polar(matrix), u @ vt, atol=1e-11)
    half = len(s) // 2
    assert torch.allclose(found.first(half).product(), (u[:, :half] * s[:half]) @ vt[:half], atol=1e-11)


def test_small_singular_values_are_dropped():
    u, _, vt = torch.linalg.svd(random(6, 4), full_matrices=False)
    found = svd((u * torch.tensor([1.0, 1e-3, 1e-5, 1e-8], dtype=torch.float64)) @ vt)
    assert len(found.s) == 3
    assert np.allclose(found.s[:2], [1, 1e-3], rtol=1e-9)
    assert found.s[2].item() == pytest.approx(1e-5, rel=1e-4)  # the square is 1e-10, half of float64's digits are left
    assert found.above(1e-4).s.shape == (2,)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_zero_and_empty_matrices_have_no_triples(shape):
    matrix = torch.zeros(shape)
    assert svd(matrix).s.shape == (0,)
    assert torch.equal(polar(matrix), matrix.double())


def test_polar_of_a_matrix_of_low_rank_is_a_partial_isometry():
    matrix = random(8, 2) @ random(2, 6, seed=1)
    singular = torch.linalg.svdvals(polar(matrix))
    assert torch.allclose(singular, torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shape", "linear", "two", "every"),
    [
        ("layers.0.q_proj.weight", (4, 4), True, True, True),
        ("layers.0.q_proj.bias", (4,), False, False, False),
        ("position_embedding.weight", (4, 4), False, True, True),
        ("model.Embed_tokens.weight", (4, 4), False, True, True),
        ("wte.weight", (4, 4), False, True, True),
        ("lm_head.weight", (4, 4), False, True, True),
        ("shared_expert.weight", (4, 4), True, True, True),  # a part, not a substring
        ("text_projection", (4, 4), False, False, True),
        ("text_projection.weight", (4, 4), False, False, True),
        ("a.relative_attention_bias.weight", (4, 4), False, True, True),
        ("conv.weight", (4, 3, 2, 2), False, False, True),
        ("row.weight", (1, 4), False, True, False),
        ("thin.weight", (4, 1, 1), False, False, False),
        ("empty.weight", (0, 3), False, True, False),
    ],
)
def test_matrices_are_told_by_name_and_shape(name, shape, linear, two, every):
    assert [is_matrix(name, shape, rule) for rule in ("linear", "2d", "all")] == [linear, two, every]


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "swudi", "aswudi", "wudi:steps=1", "fr", "opcm"])
def test_what_is_no_matrix_gets_the_mean_or_its_like(method):
    """fr weighs by magnitude, opcm keeps the norm; the others give the mean of a vector, to the last bit."""
    deltas = random(3, 9).float().numpy()
    merged = merge(family_of({"bias": deltas}), parse_call(method))["bias"].unified
    mean = merge(family_of({"bias": deltas}), parse_call("average"))["bias"].unified
    if method in ("fr", "opcm"):
        assert torch.isfinite(merged).all()
    else:
        assert torch.equal(merged, mean)


@pytest.mark.parametrize(
    ("smallest", "num_tasks", "fraction", "expected"),
    [
        (768, 3, 0.8, (615, 51)),
        (768, 8, 0.8, (616, 19)),
        (768, 14, 0.8, (614, 11)),
        (768, 20, 0.8, (608, 8)),
        (768, 30, 0.8, (618, 5)),
        (16, 8, 0.8, (16, 0)),
        (16, 20, 0.2, (16, 0)),
        (49, 49, 0.0, (0, 1)),
    ],
)
def test_rank_is_shared_between_common_and_own(smallest, num_tasks, fraction, expected):
    assert ranks(smallest, num_tasks, fraction) == expected


def test_one_triple_is_kept_of_each_of_49_tasks_of_rank_49():
    deltas = random(49, 49, 49)
    merged = merge(family_of({"w.weight": deltas}, tasks=[f"t{i:02}" for i in range(49)]), parse_call("tsv_m"))
    assert torch.linalg.matrix_rank(merged["w.weight"].unified) == 49


def test_rank_at_exact_integers_and_of_flat_spectra():
    flat = torch.ones(8, dtype=torch.float64) / 4
    assert [rank(flat, rule, 8) for rule in ("participation_sqrt", "participation", "stable_rank", "none")] == [8] * 4
    assert rank(torch.tensor([1.0, 1e-8, 1e-8], dtype=torch.float64), "participation", 3) == 2
    assert rank(torch.tensor([1.0, 1e-8, 1e-8], dtype=torch.float64), "gavish_donoho", 3) == 1


@pytest.mark.parametrize(
    ("shape", "variant", "cutoff", "kept", "twice"),
    [
        ((768, 768), "code", 0.7, 0.9998, 4),
        ((2304, 768), "code", 0.7, 0.423, 4),
        ((3072, 768), "code", 0.7, 0.317, 4),
        ((768, 3072), "code", None, 0.317, 4),
        ((1024, 1024), "code", 0.7, 0.9998, 12),
        ((4096, 1024), "code", 0.7, 0.317, 12),
        ((768, 768), "paper", None, 0.9998, 0),
        ((3072, 768), "paper", 0.016, 0.99995, 0),
        ((16, 16), "paper", 0.016, 0.9961, 0),
    ],
)
def test_filter_keeps_the_part_of_the_spectrum_that_was_measured(shape, variant, cutoff, kept, twice):
    mask = pass_mask(*shape, variant, cutoff)
    assert (mask > 0).double().mean().item() == pytest.approx(kept, abs=5e-5 if kept > 0.9 else 5e-4)
    assert (mask == 2).sum() == twice


def test_filter_takes_out_the_mean_and_nothing_at_cutoff_0():
    matrices = random(2, 6, 10)
    assert filtered(matrices, "paper").mean(dim=(1, 2)).abs().max() < 1e-15
    assert torch.allclose(filtered(matrices, "paper", 0.0), matrices, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 10), (9, 4), (1, 5)])
def test_bands_add_up_to_the_matrix_and_hold_their_frequencies(shape):
    matrices = random(2, *shape)
    low, high = (filtered(matrices, "code", 0.4, band) for band in ("low", "high"))
    assert torch.allclose(low + high, matrices, atol=1e-14)
    assert torch.allclose(filtered(matrices, "code", None, "0.0:0.4"), low, atol=1e-14)
    parts = [filtered(matrices, "code", None, band) for band in ("0.0:0.5", "0.5:1.0", "1.0:99.0")]
    assert torch.allclose(sum(parts), matrices, atol=1e-14)


def test_a_wave_passes_the_band_of_its_frequency_alone():
    wave = torch.cos(2 * torch.pi * 3 / 16 * torch.arange(16, dtype=torch.float64)).expand(1, 16, 16)  # 3 of 8
    for band, passes in (("0.3:0.38", True), ("0.0:0.37", False), ("0.376:1.5", False), ("low", True), ("high", False)):
        assert torch.allclose(filtered(wave, "paper", None, band), wave * passes, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5:0.25", "not a band"),
        ("middle", "not a band"),
        ("0.1:0.2,cutoff=0.5", "has both its ends"),
        ("x:y", "not a"),
    ],
)
def test_a_band_that_is_none_is_refused(text, says):
    with pytest.raises(UsageError, match=says):
        parse_call(f"fr:band={text}")


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_task_of_which_the_filter_leaves_rounding_has_no_weight(variant):
    """The filter takes the constant away: a task that changed all elements alike must not weigh 1e16."""
    deltas = torch.randn(2, 9, 14, generator=torch.Generator().manual_seed(0))
    deltas[1] = -0.25
    merged = merge(family_of({"w": deltas}), parse_call(f"fr:variant={variant},coef=align,scale=1"))["w"].unified
    alone = filtered(deltas[:1], variant)[0]
    assert torch.allclose(merged.double(), alone, atol=1e-6)
