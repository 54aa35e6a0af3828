"""Pools: adapters merged among themselves are what dense arithmetic on their ΔW gives, and peft loads them."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.products import product_call
from flexmerge_cli.methods.registry import parse_call
from samples import read_bundle
from tests.adapters import IA3, LORA, Adapted, make
from tests.families import same_bits
from tests.program import fails, succeeds

TARGETS = {
    "llama": ["q_proj", "v_proj", "embed_tokens"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj", "projection"],
}


@pytest.fixture(scope="module", params=TARGETS)
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    configs = {name: LORA(r=4, lora_alpha=8, target_modules=TARGETS[request.param]) for name in ("a", "b", "c")}
    adapted = make(tmp_path_factory.mktemp(request.param), request.param, configs)
    arguments = ["--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "pool"]
    succeeds("plan", *arguments, "-o", adapted.base.parent / "plan.json")
    return adapted


def products(folder: Path) -> dict[str, Tensor]:
    """Module -> B · A, float64."""
    state, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, a in state.items():
        for mark, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if name.endswith(mark):
                module = name.removesuffix(mark)
                found[module] = state[module + other].flatten(1).double() @ a.flatten(1).double()
    return found


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


def merge(adapted: Adapted, out: Path, *options: object) -> dict[str, dict[str, Tensor]]:
    succeeds("merge", adapted.base.parent / "plan.json", *options, "-o", out)
    assert "sound" in succeeds("inspect", out, "--verify", "--decode").out
    succeeds("export", out, "--all", "-o", f"{out}-export")
    return {name: products(Path(f"{out}-export") / name) for name in "abc"}


@pytest.mark.parametrize(("method", "factor"), [("average", 1 / 3), ("task_arithmetic:scale=0.9", 0.3)])
def test_pooled_loras_are_the_dense_mean_at_their_rank(
    pool: Adapted, method: str, factor: float, tmp_path: Path
) -> None:
    found = merge(pool, tmp_path / "b", "--method", method, "--size", "1x")
    own = {name: products(pool.tasks / name) for name in "abc"}
    lost, whole = 0.0, 0.0
    for module in own["a"]:
        dense = truncated(sum(own[name][module] for name in "abc") * factor, 4)
        for name in "abc":
            torch.testing.assert_close(found[name][module], dense, rtol=0, atol=1e-5)
        lost += float((dense - own["a"][module]).square().sum())
        whole += float(own["a"][module].square().sum())
    manifest = json.loads((tmp_path / "b/manifest.json").read_bytes())
    assert manifest["tasks"]["a"]["distance"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    own_bytes = sum(v.nbytes for v in load_file(pool.tasks / "a" / "adapter_model.safetensors").values())
    assert manifest["stored_bytes"] == manifest["one_model_bytes"] == own_bytes
    assert read_bundle.check(tmp_path / "b", "a") > 0


def test_pooled_loras_load_in_peft(pool: Adapted, tmp_path: Path) -> None:
    merge(pool, tmp_path / "b", "--method", "average", "--size", "1x")
    folder = tmp_path / "b-export" / "b"
    assert (folder / "adapter_config.json").read_bytes() == (pool.tasks / "b/adapter_config.json").read_bytes()
    model = peft.PeftModel.from_pretrained(pool.model(), folder).eval()
    assert not pool.logits(model).equal(pool.logits(pool.model()))
    state = peft.get_peft_model_state_dict(model)
    written = load_file(folder / "adapter_model.safetensors")
    assert all(same_bits(state[name], written[name]) for name in state if "lora_" in name)


def test_a_method_that_is_not_linear_takes_the_products(pool: Adapted, tmp_path: Path) -> None:
    found = merge(pool, tmp_path / "b", "--method", "magmax", "--size", "1x")
    own = {name: products(pool.tasks / name) for name in "abc"}
    for module in own["a"]:
        stack = torch.stack([own[name][module].float() for name in "abc"])
        largest = stack.gather(0, stack.abs().argmax(0)[None])[0].double()
        torch.testing.assert_close(found["a"][module], truncated(largest, 4), rtol=0, atol=1e-5)


def test_nothing_merged_is_every_bit(pool: Adapted, tmp_path: Path) -> None:
    merge(pool, tmp_path / "b")
    for name in "abc":
        found = load_file(tmp_path / "b-export" / name / "adapter_model.safetensors")
        expected = load_file(pool.tasks / name / "adapter_model.safetensors")
        assert sorted(found) == sorted(expected) and all(same_bits(found[key], expected[key]) for key in expected)


def test_the_plan_compares_products(pool: Adapted) -> None:
    plan = json.loads((pool.base.parent / "plan.json").read_bytes())
    own = [products(pool.tasks / name) for name in "abc"]
    factors = [tensor for tensor in plan["tensors"] if "lora_" in tensor["name"]]
    for tensor in factors:
        module = tensor["name"].partition(".lora_")[0]
        is_b = "lora_B" in tensor["name"] or "embedding_B" in tensor["name"]
        dense = [[float((x[module] * y[module]).sum()) for y in own] for x in own]
        torch.testing.assert_close(
            torch.tensor(tensor["gram"]), torch.tensor(dense) * float(is_b), rtol=1e-9, atol=1e-12
        )
        other = next(t for t in factors if t["name"].startswith(f"{module}.lora_") and t is not tensor)
        assert tensor["block"] == other["block"]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "ties"], ["--method", "emr"], ["--method", "low_bit"], ["--method", "auto", "--size", "1x"],
        ["--method", "average", "--step", "dare"], ["--method", "average", "--method-for", "*=emr"],
        ["--method", "average", "--cluster", "channels", "--size", "1x"],
    ],
)  # fmt: skip
def test_what_cannot_merge_products_is_refused(pool: Adapted, options: list[str], tmp_path: Path) -> None:
    fails(2, "merge", pool.base.parent / "plan.json", *options, "-o", tmp_path / "b", says="LoRA")


def test_products_that_float32_cannot_hold_are_told() -> None:
    """Factors are finite, and their singular values did not converge."""
    factors = {"m.lora_A.weight": torch.full((2, 1, 3), 1e30), "m.lora_B.weight": torch.full((2, 3, 1), 1e30)}
    with pytest.raises(DataError, match="ΔW in `m` exceeds the range of float32"):
        product_call(parse_call("magmax"))(factors, Where(tasks=("a", "b"), tensor="m", start=0, shape=()))


def test_a_pool_is_of_one_kind_rank_and_scale(tmp_path: Path) -> None:
    configs = {
        "a": LORA(r=4, target_modules=["c_attn"]),
        "b": LORA(r=4, lora_alpha=16, target_modules=["c_attn"]),
        "c": IA3(target_modules=["c_attn"], feedforward_modules=[]),
    }
    adapted = make(tmp_path, "gpt2", configs)

    def arguments(*names: str) -> list[str]:
        tasks = [f"--task={name}={adapted.tasks / name}" for name in names]
        return ["plan", "--base", str(adapted.base), *tasks, "--adapters", "pool", "--dry-run"]

    fails(3, *arguments("a", "b"), says=("scale 2 in `a`", "scale 4 in `b`"))
    fails(3, *arguments("a", "c"), says=("one kind", "lora: a", "ia3: c"))
    whole = f"--task=whole={adapted.full('whole', 1)}"
    fails(3, *arguments("a"), whole, says=("only adapters", "whole"))
    succeeds(*arguments("a"))


def test_pooled_ia3_vectors_merge_like_any_tensors(tmp_path: Path) -> None:
    adapted = make(tmp_path, "t5", {name: IA3(task_type="SEQ_2_SEQ_LM") for name in "abc"})
    plan = tmp_path / "plan.json"
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "pool", "-o", plan)
    own = [load_file(adapted.tasks / name / "adapter_model.safetensors") for name in "abc"]
    gram = json.loads(plan.read_bytes())["tensors"][0]
    first = [state[gram["name"]].double() - 1 for state in own]
    assert gram["gram"][0][1] == pytest.approx(float((first[0] * first[1]).sum()))
    for method in ("average", "emr", "low_bit:bits=2"):
        out = tmp_path / method.partition(":")[0]
        succeeds("merge", plan, "--method", method, *(["--size", "1x"] if method == "average" else []), "-o", out)
        assert "sound" in succeeds("inspect", out, "--verify", "--decode").out
        succeeds("export", out, "--task", "a", "-o", f"{out}-a")
        model = peft.PeftModel.from_pretrained(adapted.model(), f"{out}-a").eval()
        assert not adapted.logits(model).equal(adapted.logits(adapted.model()))
    found = load_file(tmp_path / "average-a" / "adapter_model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, torch.stack([state[name] for state in own]).mean(0), rtol=0, atol=1e-6)
    fails(2, "export", tmp_path / "average", "--task", "a", "--link", "-o", tmp_path / "l", says="--link")
