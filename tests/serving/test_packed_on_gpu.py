"""Packed weights on a GPU: a pretended one for torch's way, and Triton's interpreter for the kernel."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from flexmerge_cli import open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.bundle.packed_on import CodesOn, PackedOn  # noqa: E402
from flexmerge_cli.residuals.packing import pack  # noqa: E402
from flexmerge_cli.serving import weight  # noqa: E402

from ..pretended_gpu import GPU, pretended_gpu  # noqa: E402
from ..transformers_families import FAMILIES, TASKS  # noqa: E402
from .test_packed import AUTO, FORMS, packed_weights  # noqa: E402

CASES = [(name, AUTO) for name in ("vit", "t5", "llama, tied", "gpt2", "resnet")] + [
    ("bert with its prefix", options) for options in FORMS
]


@pytest.fixture(autouse=True)
def _every_weight_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(weight, "TILE_ELEMENTS", 100)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: case if isinstance(case, str) else case["method"])
def test_every_form_decodes_and_computes_there_what_it_does_on_the_cpu(
    name: str, options: dict, bundle_of: Callable[..., Path]
) -> None:
    bundle, family = open_bundle(bundle_of(name, **options)), FAMILIES[name]
    inputs = {k: v.to(family.dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    tolerance = 2e-2 if family.dtype is torch.bfloat16 else 1e-5
    with torch.inference_mode():
        expected = getattr(bundle.model("beta")(**inputs), family.output)
    here = {own: held.decoded() for own, held in packed_weights(bundle.runtime(weights="packed").model("beta")).items()}
    with pretended_gpu(), torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model = bundle.runtime(weights="packed", device=GPU.type).model("beta")
        there = packed_weights(model)
        assert there.keys() == here.keys() and {held.device for held in model.parameters()} == {GPU}
        for own, held in there.items():
            assert held.decoded().device == GPU and torch.equal(held.decoded().cpu(), here[own])
        found = getattr(model(**{k: v.to(GPU) for k, v in inputs.items()}), family.output)
        assert found.device == GPU and torch.allclose(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_tasks_share_the_arrays_of_a_centre_there(bundle_of: Callable[..., Path]) -> None:
    bundle = open_bundle(bundle_of("vit", method="low_bit:bits=2,centre_bits=8"))
    with pretended_gpu():
        runtime = bundle.runtime(weights="packed", device=GPU.type)
        first, second = (runtime.model(task).vit.layers[0].mlp.fc1.weight.packed.codes for task in TASKS[:2])
        assert first[0].codes.data_ptr() == second[0].codes.data_ptr()
        assert first[1].codes.data_ptr() != second[1].codes.data_ptr()
        runtime.drop("alpha")
        third = runtime.model("gamma").vit.layers[0].mlp.fc1.weight.packed.codes
        assert third[0].codes.data_ptr() == second[0].codes.data_ptr()
        pixels = torch.ones(3, 3, 16, 16).to(GPU)
        with sdpa_kernel(SDPBackend.MATH):
            rows = runtime({"pixel_values": pixels}, ["beta", "gamma", "beta"])
        assert torch.equal(rows[0].logits.cpu(), rows[2].logits.cpu())


def test_a_cpu_imports_no_triton(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "has_triton", lambda: pytest.fail("asked for Triton"))
    model = open_bundle(bundle_of("vit", **AUTO)).runtime(weights="packed").model("beta")
    assert len(model(**FAMILIES["vit"].inputs()).logits)


def codes(m: int, n: int, bits: int, *, by_row: bool, device: str) -> CodesOn:
    draw = np.random.default_rng(bits)
    levels = draw.standard_normal(1 << bits).astype(np.float32)
    scale = draw.random((m if by_row else 1, 1)).astype(np.float32)
    packed = pack(draw.integers(0, 1 << bits, (m, n)).astype(np.uint8), bits)
    there = [torch.from_numpy(part).to(device) for part in (packed, levels, scale)]
    return CodesOn(codes=there[0], bits=bits, levels=levels, table=there[1], scale=there[2])


IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads it when it is first imported."""


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="TRITON_INTERPRET=1 is not set")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "bits"),
    [(40, 300, 3, (3, 1)), (33, 129, 20, (8,)), (7, 5, 1, (2, 4)), (64, 64, 16, (5, 7)), (1, 1, 1, (6,))],
)
def test_the_kernel_is_within_the_bound_of_products(m, n, k, bits, dtype, device) -> None:
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from flexmerge_cli.serving import fused

    dtype = getattr(torch, dtype)
    parts = tuple(codes(m, n, own, by_row=own != 1, device=device) for own in bits)
    packed = PackedOn(
        matrix=(m, n), dtype=dtype, device=torch.device(device), dense=None, masked=None, codes=parts, factors=None,
        kept=None,
    )  # fmt: skip
    assert packed.is_codes_alone
    x = torch.randn(k, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    decoded = packed.decode(slice(0, m)).double()
    bound = (n + 8) * torch.finfo(dtype).eps / 2 * (x.double().abs() @ decoded.abs().T)
    found = fused.product(x, packed)
    assert found.dtype is torch.float32
    assert bool(((found.double() - x.double() @ decoded.T).abs() <= bound + 1e-7).all())
