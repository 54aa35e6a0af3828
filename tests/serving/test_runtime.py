"""A runtime of dense weights: every stored part placed once, and each model the one that an export gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flexmerge_cli import open_bundle  # noqa: E402
from flexmerge_cli.bundle.placeholder import Placeholder, Value  # noqa: E402
from flexmerge_cli.errors import SourceError, UsageError  # noqa: E402

from ..transformers_families import FAMILIES, TASKS, outputs  # noqa: E402

MERGED = {"method": "average", "size": "2x"}


@pytest.mark.parametrize("name", ["vit", "bert with its prefix", "t5", "llama, tied", "gpt2", "whisper", "resnet"])
@pytest.mark.parametrize("options", [MERGED, {"method": "low_bit:bits=4"}], ids=["merged", "coded"])
def test_every_model_is_the_bundles(name: str, options: dict, bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of(name, **options))
    runtime = bundle.runtime()
    for task in TASKS:
        assert torch.equal(outputs(FAMILIES[name], runtime.model(task)), outputs(FAMILIES[name], bundle.model(task)))


def test_what_is_stored_once_lies_in_memory_once(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **MERGED))
    runtime = bundle.runtime()
    told = runtime.num_bytes
    models = {task: dict(runtime.model(task).named_parameters()) for task in TASKS}
    assert runtime.num_bytes == told
    held = {p.data_ptr(): p.nbytes for parameters in models.values() for p in parameters.values()}
    assert told == {"cpu": sum(held.values())}
    mapped = {bundle.view(task)[name].data_ptr() for task in TASKS for name in bundle.view(task)}
    assert set(held) == mapped
    for resident in runtime.describe():
        places = {
            models[task][name].data_ptr() for task in resident.tasks for name in models[task] if name == resident.name
        }
        assert len(places) <= 1
    assert {len(resident.tasks) for resident in runtime.describe()} >= {1, 2}


def test_no_weight_is_read_before_it_is_needed(bundle_of: Callable[..., Path]) -> None:
    runtime = open_bundle(bundle_of("vit", **MERGED)).runtime()
    runtime._read = None  # type: ignore[assignment,method-assign]
    assert runtime.num_bytes["cpu"] > 0
    assert runtime.describe()
    with pytest.raises(TypeError):
        runtime.model("alpha")


def test_a_dtype_is_placed_once_too(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", method="average", size="1x"))
    runtime = bundle.runtime(dtype="bf16")
    first, second = (runtime.model(task) for task in TASKS[:2])
    assert first.dtype is torch.bfloat16
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert first.get_parameter(name).data_ptr() == second.get_parameter(name).data_ptr()
    expected = outputs_in(torch.bfloat16, bundle.model("alpha", dtype=torch.bfloat16))
    assert torch.equal(outputs_in(torch.bfloat16, first), expected)
    full, half = bundle.runtime().num_bytes["cpu"], runtime.num_bytes["cpu"]
    assert full == 2 * half


def outputs_in(dtype: "torch.dtype", model: "torch.nn.Module") -> "torch.Tensor":
    with torch.inference_mode():
        return model(FAMILIES["vit"].inputs()["pixel_values"].to(dtype)).logits


def test_what_would_break_the_sharing_is_refused(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **MERGED))
    model = bundle.runtime().model("alpha")
    for change in (
        model.half,
        model.double,
        lambda: model.to("meta"),
        lambda: model.to(torch.bfloat16),
        model.vit.half,
    ):
        with pytest.raises(UsageError, match="shared with other tasks"):
            change()
    assert model.to("cpu") is model
    assert model.float() is model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    own = bundle.model("alpha")
    mapped = {bundle.view("alpha")[name].data_ptr() for name in bundle.view("alpha")}
    assert {p.requires_grad for p in own.parameters() if p.data_ptr() in mapped} == {False}


def test_the_models_own_decoded_parameters_can_be_trained(bundle_of: Callable[..., Path]) -> None:
    model = open_bundle(bundle_of("vit", method="low_bit:bits=4")).model("alpha")
    assert model.vit.layers[0].mlp.fc1.weight.requires_grad


def test_tied_matrices_stay_one(bundle_of: Callable[..., Path]) -> None:
    for name in ("llama, tied", "gpt2"):
        model = open_bundle(bundle_of(name, method="low_bit:bits=4")).runtime().model("beta")
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_tokens_of_prompts_reach_a_head_as_rows(count: int, bundle_of: Callable[..., Path]) -> None:
    """They are a slice of all states, for which torch takes another product with frozen weights."""
    model, seen = open_bundle(bundle_of("llama, tied", method="average", size="1x")).runtime().model("alpha"), []
    model.lm_head.register_forward_pre_hook(lambda _head, inputs: seen.extend(inputs))
    ids = torch.tensor([[5, 6, 7]] * count)
    with torch.inference_mode():
        last = model(ids, logits_to_keep=1).logits
        states = model.model(ids).last_hidden_state[:, -1:]
    assert seen[0].stride() == (seen[0].shape[2], seen[0].shape[2], 1) != states.stride()
    assert torch.equal(last, torch.nn.functional.linear(states.contiguous(), model.lm_head.weight))
    assert torch.equal(last, model.lm_head(input=states.contiguous()))


def test_tasks_come_and_go(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **MERGED))
    runtime = bundle.runtime(tasks=["alpha"])
    alone = runtime.num_bytes["cpu"]
    with pytest.raises(UsageError, match="has no task `beta`"):
        runtime.model("beta")
    with pytest.raises(SourceError):
        runtime.add("nobody")
    runtime.add("beta")
    assert runtime.tasks == ("alpha", "beta")
    expected = outputs(FAMILIES["vit"], bundle.model("beta"))
    assert torch.equal(outputs(FAMILIES["vit"], runtime.model("beta")), expected)
    together = runtime.num_bytes["cpu"]
    assert alone < together < 2 * alone
    runtime.drop("alpha")
    assert runtime.tasks == ("beta",)
    assert torch.equal(outputs(FAMILIES["vit"], runtime.model("beta")), expected)
    runtime.drop("beta")
    assert runtime.num_bytes["cpu"] == 0
    assert runtime._placed == {}


def test_a_batch_holds_examples_of_several_tasks_with_heads_of_their_own(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **MERGED))
    tasks = ["beta", "alpha", "beta", "gamma"]
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = bundle.runtime()({"pixel_values": pixels}, tasks)
    for place, task in enumerate(tasks):
        with torch.inference_mode():
            alone = bundle.model(task)(pixels[place : place + 1])
        assert torch.allclose(found[place].logits, alone.logits[0], rtol=0, atol=1e-5)
    assert {len(output.logits) for output in found} == {2, 3, 4}
    with pytest.raises(UsageError, match="there are 3 tasks"):
        bundle.runtime()({"pixel_values": pixels}, tasks[:3])


def test_a_loader_may_compute_with_placeholders() -> None:
    weights = {"a": torch.arange(6.0).view(2, 3)}
    held = Placeholder(Value("key", "a", weights), (2, 3), torch.bfloat16)
    assert isinstance(held.detach(), Placeholder)
    assert held.to(torch.float16).dtype is torch.float16
    assert torch.equal(torch.cat([held, held]), torch.cat([weights["a"]] * 2).bfloat16())
