"""Fine-tunes in bfloat16 change by few distinct values: of those that tie at a threshold every part keeps its share.

Ranked by name and index, whole layers of a Llama would lose what others keep: `layers.10` comes before `layers.2`.
"""

import functools

import pytest
import torch

from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.places import magnitude_keys
from flexmerge_cli.methods.registry import parse_call, parse_step

from .driver import Family, family_of, merge

LAYERS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
SHAPE = (96, 128)


@functools.cache
def llama() -> Family:
    """Weights of 0.02 in bfloat16, tuned by 3e-4: a dozen distinct magnitudes."""
    draw = torch.Generator().manual_seed(0)
    deltas = {}
    for name in LAYERS:
        base = (0.02 * torch.randn(SHAPE, generator=draw)).bfloat16().float()
        tuned = (base + 3e-4 * torch.randn(3, *SHAPE, generator=draw)).bfloat16().float()
        deltas[name] = tuned - base
    return family_of(deltas, blocks={name.removesuffix(".up_proj.weight"): (name,) for name in LAYERS})


def shares(method: str, *steps: str) -> torch.Tensor:
    """The fraction of elements that is not 0 in each quarter of each layer: [layers, 4], quarters by row and column."""
    merged = merge(llama(), parse_call(method), steps=[parse_step(step) for step in steps], chunk=5_000)
    kept = torch.stack([merged[name].unified != 0 for name in LAYERS]).float()
    return kept.view(len(LAYERS), 2, SHAPE[0] // 2, 2, SHAPE[1] // 2).mean((2, 4)).view(len(LAYERS), 4)


def test_thresholds_of_this_family_fall_among_many_ties():
    keys = magnitude_keys(torch.cat([llama().deltas[name][0].flatten() for name in LAYERS])).sort(descending=True)
    at = int(keys.values[int(0.2 * len(keys.values))])
    assert (keys.values == at).float().mean() > 0.05


@pytest.mark.parametrize(
    "use",
    [
        ("ties:K=0.2",),
        ("ties:K=0.2,scope=tensor",),
        ("average", "trim:K=0.2"),
        ("consensus:K=0.2",),
        ("consensus_original:on=ties,K=0.2,kappa=1",),
        ("breadcrumbs:beta=0.2,scope=model",),
        ("breadcrumbs:beta=0.2,scope=block",),
        ("breadcrumbs:beta=0.2,scope=tensor",),
        ("breadcrumbs:beta=0.2,scope=row",),
        ("average", "breadcrumbs:beta=0.2"),
        ("sce:density=0.3",),
        ("sce:density=0.3,scope=row",),
    ],
    ids=lambda use: "-".join(use),
)
def test_every_part_of_every_layer_keeps_its_share(use):
    found = shares(*use)
    assert 0.15 < found.mean() < 0.7
    # A quarter has 3072 elements, of which the ties at the threshold are drawn: 4.5 standard deviations.
    assert (found - found.mean()).abs().max() < 0.04


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_magprune_drops_equal_magnitudes_alike_all_over_a_tensor(scope):
    deltas = torch.full((1, 64, 4096), 3e-4)
    step = parse_step(f"magprune:p=0.5,window=0.9,scope={scope}")
    kept = step(deltas, Where(tasks=("a",), tensor="w", start=0, shape=(64, 4096))) != 0
    for part in (kept[:, :32], kept[:, 32:], kept[..., :2048], kept[..., 2048:]):
        assert float(part.float().mean()) == pytest.approx(0.5, abs=0.01)
