"""A merged LoRA is found by a block of a few matrices; a full fine-tune, and one that rounding hides, are not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexmerge_cli.engine.low_rank_sketch import numerical_rank
from tests.program import succeeds

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(dtype: torch.dtype = torch.float32, side: int = 96) -> dict[str, torch.Tensor]:
    names = [f"layers.{n}.{part}.weight" for n in range(3) for part in ("q", "mlp")]
    state = {name: 0.05 * drawn(seed, side, side + 8) for seed, name in enumerate(names)}
    return {name: value.to(dtype) for name, value in state.items()} | {"norm.weight": torch.ones(side, dtype=dtype)}


def merged(base: dict[str, torch.Tensor], rank: int, seed: int, size: float = 0.02) -> dict[str, torch.Tensor]:
    """Merge as peft does: in float32, rounded once; norms stay as they are."""
    return {
        name: (v.float() + size * drawn(seed + n, v.shape[0], rank) @ drawn(seed - n - 1, rank, v.shape[1])).to(v.dtype)
        if v.ndim == 2
        else v
        for n, (name, v) in enumerate(base.items())
    }


def full(base: dict[str, torch.Tensor], seed: int, size: float = 0.01) -> dict[str, torch.Tensor]:
    return {
        name: (v.float() + size * drawn(seed + n, *v.shape)).to(v.dtype) for n, (name, v) in enumerate(base.items())
    }


def block(state: dict[str, torch.Tensor]) -> np.ndarray:
    return state["layers.1.q.weight"].double().numpy()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_rank_of_a_merged_lora_is_found(dtype: torch.dtype, rank: int) -> None:
    base = model(dtype)
    assert numerical_rank(block(base), block(merged(base, rank, 40)), NAMES[dtype]) == rank


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 0])
def test_a_full_fine_tune_has_no_low_rank(dtype: torch.dtype, size: float) -> None:
    base = model(dtype)
    assert numerical_rank(block(base), block(full(base, 40, size)), NAMES[dtype]) is None


def test_a_rank_that_is_not_low_is_none() -> None:
    base = model()
    assert numerical_rank(block(base), block(merged(base, 40, 7)), "F32") is None


def test_plan_and_inspect_say_it_with_what_it_would_save(tmp_path: Path) -> None:
    base = model(torch.bfloat16)
    tasks = {"lora": merged(base, 4, 50), "other": merged(base, 2, 90), "whole": full(base, 60), "same": base}
    for name, state in {"base": base, **{f"tasks/{name}": state for name, state in tasks.items()}}.items():
        (tmp_path / name).mkdir(parents=True)
        save_file(state, tmp_path / name / "model.safetensors")
    plan = tmp_path / "plan.json"
    arguments = ["plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", plan]
    told = succeeds(*arguments).out
    value = succeeds("inspect", plan, "--json").json
    whole = 6 * 96 * 104 * 2
    assert value["low_rank"] == [
        {"task": "lora", "rank": 4, "matrices": 6, "bytes": whole, "residual_bytes": 6 * 4 * 200 * 2},
        {"task": "other", "rank": 2, "matrices": 6, "bytes": whole, "residual_bytes": 6 * 2 * 200 * 2},
    ]
    for text in (told, succeeds("inspect", plan).out):
        assert "task `lora` is the base plus matrices of rank 4" in text and f"{whole - 9600:,} less" in text
        assert "low_rank:rank=4,centre=base" in text and "`whole`" not in text
    succeeds("merge", plan, "--method", "low_rank:rank=4,centre=base", "-o", tmp_path / "bundle")
    distances = json.loads((tmp_path / "bundle/manifest.json").read_bytes())["tasks"]
    assert distances["lora"]["distance"] < 0.1 < 0.5 < distances["whole"]["distance"]
