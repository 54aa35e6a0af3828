"""Kept adapters and vocabularies of their own: what is the base's, or common, lies in memory once."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from flexmerge_cli import make_plan, merge, open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.serving import weight  # noqa: E402
from flexmerge_cli.serving.weight import PackedWeight  # noqa: E402
from flexmerge_cli.stored.packed import JoinedRows, Packed  # noqa: E402

from ..adapters import IA3, LORA, Adapted, make  # noqa: E402


@pytest.fixture(autouse=True)
def every_layer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(weight, "TILE_ELEMENTS", 100)


def bundle_of(adapted: Adapted, tasks: dict[str, Path], **options: object) -> Path:
    root = adapted.base.parent
    make_plan(adapted.base, tasks, output=root / "plan.json")
    merge(root / "plan.json", root / "bundle", **options)  # type: ignore[arg-type]
    return root / "bundle"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_adapters_share_the_base_and_add_their_factors(kind: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}[kind]
    configs = {name: LORA(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2") for name in ("one", "other")}
    adapted = make(tmp_path, kind, configs)
    bundle = open_bundle(bundle_of(adapted, {name: adapted.tasks / name for name in configs}))
    dense, packed = bundle.runtime(), bundle.runtime(weights="packed")
    for name in configs:
        expected = adapted.logits(bundle.model(name))
        assert torch.equal(adapted.logits(dense.model(name)), expected)
        assert torch.allclose(adapted.logits(packed.model(name)), expected, atol=1e-5)
    held = [p.packed for p in packed.model("one").parameters() if isinstance(p, PackedWeight)]
    assert held and all(isinstance(p, Packed) and p.factors is not None for p in held)
    base = sum(tensor.nbytes for tensor in adapted.model().state_dict().values())
    assert packed.num_bytes["cpu"] < dense.num_bytes["cpu"]
    factors = sum(resident.num_bytes for resident in packed.describe() if resident.part in ("left", "right"))
    made = sum(buffer.nbytes for name in configs for buffer in packed.model(name).buffers())
    assert packed.num_bytes["cpu"] <= base + factors + made


def test_other_adapters_are_decoded(tmp_path: Path) -> None:
    adapted = make(
        tmp_path, "llama", {"one": IA3(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])}
    )
    bundle = open_bundle(bundle_of(adapted, {"one": adapted.tasks / "one"}))
    expected = adapted.logits(bundle.model("one"))
    for weights in ("dense", "packed"):
        assert torch.equal(adapted.logits(bundle.runtime(weights=weights).model("one")), expected)


@pytest.mark.parametrize("options", [{"method": "average"}, {"method": "low_bit:bits=4"}], ids=["merged", "coded"])
def test_rows_that_one_task_has_for_itself_are_beside_the_common_ones(options: dict, tmp_path: Path) -> None:
    adapted = make(tmp_path, "llama", {"unused": LORA(r=2, target_modules=["q_proj"])})
    tasks = {name: adapted.full(name, seed) for seed, name in enumerate(("first", "second", "resized"))}
    model = adapted.model(tasks["resized"])
    model.resize_token_embeddings(53)
    model.save_pretrained(tasks["resized"])
    bundle = open_bundle(bundle_of(adapted, tasks, **options))
    runtime, dense = bundle.runtime(weights="packed"), bundle.runtime()
    for name in tasks:
        expected = adapted.logits(bundle.model(name))
        assert torch.equal(adapted.logits(dense.model(name)), expected)
        assert torch.allclose(adapted.logits(runtime.model(name)), expected, atol=1e-5)
    held = runtime.model("resized").model.embed_tokens.weight
    assert isinstance(held, PackedWeight) and isinstance(held.packed, JoinedRows)
    assert torch.equal(held.decoded(), bundle.model("resized").model.embed_tokens.weight)
    ids = torch.arange(48, 53)[None]
    with torch.inference_mode():
        found, expected = (m.model.embed_tokens(ids) for m in (runtime.model("resized"), bundle.model("resized")))
    assert torch.equal(found, expected)
