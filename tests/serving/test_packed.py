"""Packed weights: the outputs of the decoded model for every kind of layer and every stored form, in the stored bytes.

The bound. With u the unit roundoff of the dtype that is computed in, every product of a layer is within
(n + 8)·u·|x|·|W| of the exact product with the decoded weight: it is a sum of n products in some order, of weights that
are decoded or, in products with codes, not rounded to that dtype. Logits of tiny models then agree within 1e-5.
"""

import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn import functional  # noqa: E402

from flexmerge_cli import native, open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.errors import UsageError  # noqa: E402
from flexmerge_cli.serving import weight  # noqa: E402
from flexmerge_cli.serving.weight import PackedWeight  # noqa: E402

from ..transformers_families import FAMILIES, TASKS, outputs  # noqa: E402

AUTO = {"method": "auto", "size": "1x"}
FORMS = [
    AUTO,
    {"method": "low_bit:bits=2"},
    {"method": "low_bit:bits=3,levels=empirical,centre_bits=8"},
    {"method": "low_bit:bits=5,centre=base"},
    {"method": "sign_runs:run=4,centre_bits=8"},
    {"method": "sign_runs:run=32"},
    {"method": "low_bit:bits=8,centre=none"},
    {"method": "bitdelta"},
    {"method": "low_rank"},
    {"method": "sparse"},
    {"method": "emr"},
    {"method": "consensus"},
    {"method": "tall_masks"},
    {"method": "randes"},
    {"method": "average", "size": "2x"},
]


@pytest.fixture(autouse=True)
def every_layer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, and in tiles of some rows."""
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(weight, "TILE_ELEMENTS", 100)


def packed_weights(model: "torch.nn.Module") -> dict[str, PackedWeight]:
    return {name: held for name, held in model.named_parameters() if isinstance(held, PackedWeight)}


@pytest.mark.parametrize("name", ["vit", "bert with its prefix", "t5", "llama, tied", "gpt2", "whisper", "resnet"])
def test_every_architecture_gives_the_outputs_of_the_decoded_model(name: str, bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of(name, **AUTO))
    runtime = bundle.runtime(weights="packed")
    family = FAMILIES[name]
    for task in TASKS:
        model = runtime.model(task)
        assert packed_weights(model)
        expected, found = outputs(family, bundle.model(task)), outputs(family, model)
        tolerance = 2e-2 if family.dtype is torch.bfloat16 else 1e-5
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_native", [True, False], ids=["C", "numpy"])
@pytest.mark.parametrize("name", ["bert with its prefix", "gpt2"])
@pytest.mark.parametrize("options", FORMS, ids=lambda options: options["method"])
def test_every_stored_form_gives_the_outputs_of_the_decoded_model(
    options: dict, name: str, is_native: bool, bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(native, "decoding", None)
    bundle = open_bundle(bundle_of(name, **options))
    model = bundle.runtime(weights="packed").model("beta")
    assert bool(packed_weights(model)) == (options["method"] != "average")
    found, expected = outputs(FAMILIES[name], model), outputs(FAMILIES[name], bundle.model("beta"))
    assert (
        torch.equal(found, expected) if options["method"] == "average" else torch.allclose(found, expected, atol=1e-5)
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", FORMS[:-1], ids=lambda options: options["method"])
def test_products_are_within_the_bound(options: dict, dtype: str, bundle_of: Callable[..., Path]) -> None:
    runtime = open_bundle(bundle_of("gpt2", **options)).runtime(weights="packed", dtype=dtype)
    for name, held in packed_weights(runtime.model("alpha")).items():
        decoded = held.decoded()
        for rows in (1, 3, 9):
            generator = torch.Generator().manual_seed(rows)
            is_conv1d = ".c_" in name
            x = torch.randn(rows, held.shape[0 if is_conv1d else 1], generator=generator).to(held.dtype)
            w = decoded if is_conv1d else decoded.T
            found = (
                torch.addmm(torch.zeros(held.shape[1], dtype=held.dtype), x, held)
                if is_conv1d
                else functional.linear(x, held)
            )
            expected = x.double() @ w.double()
            bound = (len(w) + 8) * torch.finfo(held.dtype).eps / 2 * (x.double().abs() @ w.double().abs())
            assert bool(((found.double() - expected).abs() <= bound + 1e-7).all()), (name, rows)


def test_what_a_product_is_added_to_may_lie_in_memory_in_any_order(bundle_of: Callable[..., Path]) -> None:
    """The loops in C wrote rows into a matrix of columns."""
    runtime = open_bundle(bundle_of("gpt2", **AUTO)).runtime(weights="packed")
    name, held = next(pair for pair in packed_weights(runtime.model("alpha")).items() if ".c_" in pair[0])
    x, added = torch.randn(3, held.shape[0]), torch.randn(held.shape[1], 3).T
    assert torch.allclose(torch.addmm(added, x, held), torch.addmm(added, x, held.decoded()), atol=1e-4), name


OPERATIONS: dict[str, Callable[["torch.Tensor"], "torch.Tensor"]] = {
    "squeeze": lambda w: w[:, None].squeeze(1),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "T": lambda w: w.T,
    "view": lambda w: w.view(-1),
    "chunk": lambda w: w.chunk(2)[1],
    "unbind": lambda w: w.unbind(0)[1],
    "item": lambda w: w[3],
    "items": lambda w: w[3:5, 2],
    "more axes": lambda w: w[..., None],
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "product": lambda w: 2 * w,
    "exp": lambda w: -torch.exp(w.float()),
    "cast": lambda w: w.to(torch.float64),
    "matmul": lambda w: w @ w.T,
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "cat": lambda w: torch.cat([w, w]),
    "transposed convolution": lambda w: functional.conv_transpose1d(torch.ones(1, len(w), 4), w[:, :, None]),
    "bag": lambda w: functional.embedding_bag(torch.tensor([[1, 2]]), w),
    "in place": lambda w: torch.zeros(w.shape).add_(w),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "copy": lambda w: copy.deepcopy(w),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_other_operation_gets_the_decoded_weight(
    mode: Callable[[], AbstractContextManager[None]], bundle_of: Callable[..., Path]
) -> None:
    """Layers of state-space models take their weights apart, others write them as sums of products."""
    model = open_bundle(bundle_of("bert with its prefix", **AUTO)).runtime(weights="packed").model("alpha")
    held = next(held for held in packed_weights(model).values() if held.dim() == 2)
    whole = held.decoded()
    with mode():
        for name, operation in OPERATIONS.items():
            found, expected = operation(held), operation(whole)
            found = found.decoded() if isinstance(found, PackedWeight) else found
            assert type(found) is torch.Tensor and torch.equal(found, expected), name


def test_generated_tokens_are_those_of_the_decoded_model(bundle_of: Callable[..., Path]) -> None:
    for name in ("t5", "gpt2"):
        bundle = open_bundle(bundle_of(name, **AUTO))
        ids = {"input_ids": torch.arange(2, 12).view(2, 5)}
        model, expected = bundle.runtime(weights="packed").model("beta"), bundle.model("beta")
        arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**ids, **arguments), expected.generate(**ids, **arguments))


@pytest.mark.parametrize("options", FORMS, ids=lambda options: options["method"])
def test_the_bytes_that_are_told_are_those_that_are_held(options: dict, bundle_of: Callable[..., Path]) -> None:
    """Every array of every packed weight, and every other parameter, once."""
    bundle = open_bundle(bundle_of("vit", **options))
    runtime = bundle.runtime(weights="packed")
    told = runtime.num_bytes["cpu"]
    held: dict[int, int] = {}
    for task in TASKS:
        model = runtime.model(task)
        for tensor in [*model.parameters(), *model.buffers()]:
            if not isinstance(tensor, PackedWeight):
                held[tensor.data_ptr()] = tensor.nbytes
                continue
            p = tensor.packed
            elements = [part for part in (p.dense, *(p.factors or ())) if part is not None]
            arrays = [part.bits for part in elements]
            arrays += [p.masked.unified.bits, p.masked.packed] if p.masked is not None else []
            arrays += [p.kept.starts, p.kept.columns, p.kept.values.bits] if p.kept is not None else []
            arrays += [array for codes in p.codes for array in (codes.codes, codes.scale)]
            held |= {array.ctypes.data: array.nbytes for array in arrays}
    # Scales are held as float32, whatever they are stored as; a factor of a mask is a number.
    assert abs(sum(held.values()) - told) <= 0.25 * told
    dense = bundle.runtime().num_bytes["cpu"]
    assert told <= dense


def test_no_decoded_weight_outlives_a_product(bundle_of: Callable[..., Path]) -> None:
    def tensors() -> list[torch.Tensor]:
        gc.collect()
        return [held for held in gc.get_objects() if type(held) is torch.Tensor and held.dtype is torch.float32]

    before = tensors()  # of other tests; they are kept, so that no new one gets the identity of one that ended
    model = open_bundle(bundle_of("vit", **AUTO)).runtime(weights="packed").model("alpha")
    shapes = {tuple(held.shape) for held in packed_weights(model).values() if held.dim() == 2}
    outputs(FAMILIES["vit"], model)
    known = {id(held) for held in before}
    assert [held for held in tensors() if tuple(held.shape) in shapes and id(held) not in known] == []


def test_tied_matrices_stay_one_packed_weight(bundle_of: Callable[..., Path]) -> None:
    model = open_bundle(bundle_of("gpt2", **AUTO)).runtime(weights="packed").model("beta")
    assert isinstance(model.lm_head.weight, PackedWeight)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tasks_share_the_centre_and_each_has_its_own_residual(bundle_of: Callable[..., Path]) -> None:
    runtime = open_bundle(bundle_of("vit", method="low_bit:bits=2,centre_bits=8")).runtime(weights="packed")
    first, second = (runtime.model(task).vit.layers[0].mlp.fc1.weight.packed.codes for task in TASKS[:2])
    assert first[0].codes.ctypes.data == second[0].codes.ctypes.data
    assert first[1].codes.ctypes.data != second[1].codes.ctypes.data
    found = {}
    for held in runtime.describe():
        if held.name.endswith("layer.0.intermediate.dense.weight"):
            found[held.part] = held.tasks
    assert {len(tasks) for part, tasks in found.items() if "." not in part} == {3}
    assert {part: tasks for part, tasks in found.items() if part.startswith("codes.")} == {
        f"codes.{task}": (task,) for task in TASKS
    }


def test_an_embedding_refuses_what_is_outside_of_it(bundle_of: Callable[..., Path]) -> None:
    model = open_bundle(bundle_of("gpt2", **AUTO)).runtime(weights="packed").model("alpha")
    for ids in ([[0, 40]], [[-1]]):
        with pytest.raises(IndexError):
            model.transformer.wte(torch.tensor(ids))
    assert model.transformer.wte(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 16)


def test_gradients_flow_through_a_packed_layer_to_its_input(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **AUTO))
    layer, own = (
        model.vit.layers[0].mlp.fc1
        for model in (bundle.runtime(weights="packed").model("alpha"), bundle.model("alpha"))
    )
    x = torch.ones(2, 16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, own.weight.sum(0).expand(2, -1), atol=1e-6)


def test_words_and_devices_that_are_not_there_are_refused(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", **AUTO))
    with pytest.raises(UsageError, match="neither `dense` nor `packed`"):
        bundle.runtime(weights="sparse")
    with pytest.raises(UsageError, match="none of fp32"):
        bundle.runtime(dtype="int8")
