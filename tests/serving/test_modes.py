"""A runtime's models under torch.compile, without gradients, in every dtype, and in several threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flexmerge_cli import open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402

from ..transformers_families import FAMILIES, TASKS  # noqa: E402

KINDS = {"dense": {"method": "average", "size": "2x"}, "packed": {"method": "auto", "size": "1.5x"}}


@pytest.fixture(autouse=True)
def _every_weight_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)


def logits(model: Any, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in FAMILIES[name].inputs().items()}
    found: torch.Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize(("name", "kind"), [("vit", "dense"), ("vit", "packed"), ("llama, tied", "packed")])
def test_a_compiled_model_gives_its_own_outputs(name: str, kind: str, bundle_of: Callable[..., Path]) -> None:
    """What is compiled around the products with packed weights is as exact as without; inductor orders sums anew."""
    torch.compiler.reset()
    model = open_bundle(bundle_of(name, **KINDS[kind])).runtime(weights=kind).model("beta")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind == "dense")
    with torch.inference_mode():
        expected = logits(model, name, FAMILIES[name].dtype)
        for _ in range(2):
            assert torch.equal(logits(compiled, name, FAMILIES[name].dtype), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_do_not_depend_on_gradients_or_on_what_ran_before(
    kind: str, dtype: str, bundle_of: Callable[..., Path]
) -> None:
    model = open_bundle(bundle_of("vit", **KINDS[kind])).runtime(weights=kind, dtype=dtype).model("alpha")
    found = []
    for mode in (nullcontext, torch.no_grad, torch.inference_mode, torch.inference_mode):
        with mode():
            found.append(logits(model, "vit", model.dtype))
    assert found[0].dtype is model.dtype and all(torch.equal(found[0], other) for other in found[1:])
    assert not found[0].requires_grad  # every parameter is frozen


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_call_one_runtime_at_once(kind: str, bundle_of: Callable[..., Path]) -> None:
    """Tasks alone, and batches of several, while tasks are loaded, dropped and added."""
    bundle = open_bundle(bundle_of("vit", **KINDS[kind]))
    pixels, tasks = FAMILIES["vit"].inputs()["pixel_values"], ["gamma", "alpha"]
    alone = bundle.runtime(weights=kind)
    expected = [output.logits for output in alone({"pixel_values": pixels}, tasks)]
    of_beta = logits(alone.model("beta"), "vit")
    runtime = bundle.runtime(weights=kind, tasks=["alpha", "gamma"])

    def serve(turn: int) -> bool:
        if turn % 3 == 0:
            runtime.add("beta")
            with torch.inference_mode():
                same = torch.equal(logits(runtime.model("beta"), "vit"), of_beta)
            runtime.drop("beta")
            return same
        found = [output.logits for output in runtime({"pixel_values": pixels}, tasks)]
        return all(map(torch.equal, found, expected))

    with ThreadPoolExecutor(1) as changing, ThreadPoolExecutor(2) as calling:
        turns = [(changing if turn % 3 == 0 else calling).submit(serve, turn) for turn in range(24)]
        assert all(turn.result() for turn in turns)
    assert runtime.tasks == tuple(TASKS[::2])
