"""Mixtures of experts, whose weights transformers joins when it loads them, are shared like any other weight."""

import gc
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flexmerge_cli import export, make_plan, merge, open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.bundle.view import load_model  # noqa: E402

CONFIG = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
TOKENS = {"input_ids": torch.arange(8).reshape(2, 4)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> "object":
    """Two fine-tunes of a base, merged at 1x, and as they are."""
    root = tmp_path_factory.mktemp("experts")
    model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**CONFIG))
    for seed, name in enumerate(("base", "a", "b")):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=draw)
        model.save_pretrained(root / name)
    make_plan(root / "base", {name: root / name for name in "ab"}, output=root / "plan.json")
    merge(root / "plan.json", root / "merged", method="average", size="1x")
    merge(root / "plan.json", root / "exact")
    return root


@pytest.mark.parametrize("models", [lambda b: b.model, lambda b: b.runtime().model], ids=["model", "runtime"])
def test_all_that_a_bundle_stores_once_lies_in_memory_once(models: Callable, root) -> None:
    load = models(open_bundle(root / "merged"))
    a, b = (dict(load(task).named_parameters()) for task in "ab")
    assert EXPERTS in a and [name for name in a if a[name].data_ptr() != b[name].data_ptr()] == []
    assert not any(parameter.requires_grad for parameter in [*a.values(), *b.values()])


@pytest.mark.parametrize("kind", ["merged", "exact"])
def test_the_models_compute_what_an_export_does(kind, root, tmp_path) -> None:
    bundle = open_bundle(root / kind)
    for task in "ab":
        export(root / kind, task, tmp_path / task)
        with torch.no_grad():
            expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / task).eval()(**TOKENS).logits
            assert bundle.model(task)(**TOKENS).logits.equal(expected)
            assert bundle.runtime().model(task)(**TOKENS).logits.equal(expected)


def test_inspect_knows_that_joined_experts_do_not_stay_packed(root, monkeypatch) -> None:
    """Routers it takes for layers: their weights are called as those of layers."""
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)
    merge(root / "plan.json", root / "coded", method="low_bit:bits=4")
    bundle = open_bundle(root / "coded")
    told = {k: v for k, v in resident.resident(bundle._bundle).items() if not k.endswith("mlp.gate.weight")}
    for weights in ("dense", "packed"):
        held = [h for h in bundle.runtime(weights=weights).describe() if not h.name.endswith("mlp.gate.weight")]
        assert sum(getattr(found, weights) for found in told.values()) == sum(found.num_bytes for found in held)
    assert {name for name, found in told.items() if found.stays_packed and ".experts." in name} == set()


def test_what_is_joined_is_freed_with_the_last_model(root) -> None:
    bundle = open_bundle(root / "merged")
    model = bundle.model("a")
    held = bundle._bundle.joined
    assert len(held) == 4
    del model
    gc.collect()
    assert len(held) == 0


def test_copies_are_ones_own(root) -> None:
    bundle = open_bundle(root / "merged")
    a, b = (dict(load_model(bundle.view(task, copy=True)).named_parameters()) for task in "ab")
    assert not {p.data_ptr() for p in a.values()} & {p.data_ptr() for p in b.values()}
    assert all(parameter.requires_grad for parameter in a.values())
