"""Paths that compute on a device, on a pretended GPU: nothing lies on the wrong one, and results are the CPU's."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from flexmerge_cli import make_plan, merge, open_bundle  # noqa: E402
from flexmerge_cli.bundle import resident  # noqa: E402
from flexmerge_cli.errors import MachineError  # noqa: E402
from flexmerge_cli.methods.method import Where  # noqa: E402
from flexmerge_cli.methods.registry import parse_call  # noqa: E402
from flexmerge_cli.methods.sums import Sums  # noqa: E402

from . import bench_gpu  # noqa: E402
from .bundle.bundles import make as make_bundle  # noqa: E402
from .families import Folders, mixed_dtypes, same_bits, write_family  # noqa: E402
from .methods.driver import Family  # noqa: E402
from .methods.driver import merge as merge_plainly  # noqa: E402
from .methods.test_every_method import flat, small_family  # noqa: E402
from .methods.variants import CALLS, STEPS  # noqa: E402
from .pretended_gpu import GPU, pretended_gpu  # noqa: E402
from .residuals.test_coders import CODERS  # noqa: E402
from .residuals.test_look_up import LOOKED_UP, scaled_levels_on  # noqa: E402
from .transformers_families import FAMILIES, TASKS, make  # noqa: E402

FORMS = ["average", "ties", "emr", "consensus", "low_bit:bits=3", "low_rank", "sparse", "auto", "tsv_m"]


def on_gpu(family: Family) -> Family:
    return Family(tasks=family.tasks, blocks=family.blocks, deltas={k: v.to(GPU) for k, v in family.deltas.items()})


def test_the_script_for_gpus_says_where_there_is_none() -> None:
    done = subprocess.run(
        ["bash", str(Path(__file__).with_name("gpu.sh"))],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip
    assert torch.cuda.is_available() or (done.returncode == 1 and "error: no CUDA device" in done.stderr)


def test_the_script_for_gpus_compares_results_with_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "CALLS", {name: CALLS[name] for name in ("average", "emr")})
    monkeypatch.setattr(bench_gpu, "METHODS", ["average", "emr", "low_bit:bits=4"])
    with pretended_gpu():
        rows = list(bench_gpu.rows(GPU.type, tmp_path, width=8, layers=1))
    assert len(rows) == 9 and not [row for row in rows if row[1].endswith("DIFFERS")]
    # A device that computes something else is found.
    double = lambda *, deltas, **of: Family(deltas={k: 2 * v for k, v in deltas.items()}, **of)  # noqa: E731
    monkeypatch.setattr(bench_gpu, "Family", double)
    assert next(bench_gpu.methods("cpu"))[1].endswith("DIFFERS")


def test_the_gpu_refuses_what_a_real_one_does() -> None:
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, dtype=torch.int64).to(GPU)
        for wrong in (lambda: here + there, lambda: there @ there, lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        assert (there + 1).device == GPU and (there + 1).cpu().tolist() == [2, 2, 2]
    with pytest.raises((RuntimeError, ImportError)):
        torch.ones(3).to(GPU)


@pytest.mark.parametrize("name", [*CALLS, *STEPS])
def test_a_method_or_step_stays_on_the_device(name: str) -> None:
    call, steps = (CALLS[name], []) if name in CALLS else (parse_call("average"), [STEPS[name]])
    family = small_family()
    expected = flat(merge_plainly(family, call, steps=steps, bypass=False), family.tasks)
    with pretended_gpu():
        found = flat(merge_plainly(on_gpu(family), call, steps=steps, bypass=False), family.tasks)
        assert found.device == GPU
        assert torch.equal(found.cpu(), expected)


def test_coders_of_residuals_give_the_bytes_of_the_cpu() -> None:
    matrix = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))
    for coder in CODERS:
        expected = coder.encode(matrix, "BF16")
        with pretended_gpu():
            found = coder.encode(matrix.to(GPU), "BF16")
        assert {role: part.tobytes() for role, part in found.items()} == {
            role: part.tobytes() for role, part in expected.items()
        }, coder


def test_codes_are_looked_up_on_the_device() -> None:
    matrix = torch.randn(20, 31, generator=torch.Generator().manual_seed(0))
    for coder in LOOKED_UP:
        look_up = coder.look_up(coder.encode(matrix, "F32"), (20, 31))
        with pretended_gpu():
            found = scaled_levels_on(look_up, lambda part: torch.from_numpy(part).to(GPU))
            assert found.device == GPU
        assert torch.equal(found.held, scaled_levels_on(look_up, torch.from_numpy)), coder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Tasks of several dtypes, with integers, and their plan."""
    return write_family(tmp_path_factory.mktemp("mixed"), mixed_dtypes())


def weights_of(bundle: Path) -> dict[str, bytes]:
    return {str(file.relative_to(bundle)): file.read_bytes() for file in bundle.rglob("*.safetensors")}


def test_a_plan_measures_what_it_does_on_the_cpu(mixed: Folders, tmp_path: Path) -> None:
    """What is added in float32 differs in its last bits where C adds otherwise."""
    plans = []
    for place, device in enumerate(("cpu", GPU.type)):
        with pretended_gpu():
            make_plan(mixed.base, mixed.sources, output=tmp_path / f"{place}.json", device=device)
        plans.append(json.loads((tmp_path / f"{place}.json").read_text()))
    assert plans[0].pop("sha256") and plans[1].pop("sha256")
    numbers_agree(*plans)


def numbers_agree(left: Any, right: Any) -> None:
    if isinstance(left, (dict, list)):
        assert len(left) == len(right)
        for key in left if isinstance(left, dict) else range(len(left)):
            numbers_agree(left[key], right[key])
    elif isinstance(left, float):
        assert right == pytest.approx(left, rel=2e-6, abs=1e-12)
    else:
        assert left == right


@pytest.fixture(scope="module")
def mixed_plan(mixed: Folders) -> Path:
    make_plan(mixed.base, mixed.sources, output=mixed.root / "plan.json", device="cpu")
    return mixed.root / "plan.json"


@pytest.mark.parametrize("method", FORMS)
def test_a_merge_gives_the_bytes_of_the_cpu(method: str, mixed_plan: Path, tmp_path: Path) -> None:
    options = {"size": "2x"} if method == "auto" else {}
    merge(mixed_plan, tmp_path / "cpu", method=method, device="cpu", **options)
    with pretended_gpu():
        merge(mixed_plan, tmp_path / "gpu", method=method, device=GPU.type, **options)
    assert weights_of(tmp_path / "gpu") == weights_of(tmp_path / "cpu")


@pytest.mark.parametrize("method", ["ties", "emr", "low_bit:bits=3"])
def test_what_finds_no_memory_on_the_device_runs_on_the_cpu(method: str, mixed_plan: Path, tmp_path: Path) -> None:
    merge(mixed_plan, tmp_path / "cpu", method=method, device="cpu")
    with pretended_gpu() as device, pytest.warns(UserWarning, match="out of memory"):
        device.allocations_left = 100
        merge(mixed_plan, tmp_path / "gpu", method=method, device=GPU.type, threads=1)
    assert weights_of(tmp_path / "gpu") == weights_of(tmp_path / "cpu")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("average", "mixed_dtypes"),
        ("emr", "mixed_dtypes"),
        ("low_bit:bits=3", "mixed_dtypes"),
        ("low_bit:bits=3", "resized_vocabulary"),
        ("low_bit:bits=3", "tied"),
        ("low_rank", "tied"),
        ("sparse", "tied"),
    ],
)
def test_a_view_has_the_bits_of_the_cpu(method: str, name: str, tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path, "--method", method, name=name))
    for task in bundle.tasks:
        with pretended_gpu():
            there = dict(bundle.view(task, device=GPU.type))
            assert all(held.device == GPU for held in there.values())
            there = {own: held.cpu() for own, held in there.items()}
        assert all(same_bits(there[own], held) for own, held in bundle.view(task).items())


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    roots: dict[str, Path] = {}

    def bundle(name: str, method: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp("family")
            make(FAMILIES[name], roots[name])
            sources = {task: roots[name] / "tasks" / task for task in TASKS}
            make_plan(roots[name] / "base", sources, output=roots[name] / "plan.json", device="cpu")
        path = roots[name] / method
        if not path.exists():
            merge(roots[name] / "plan.json", path, method=method, **({"size": "2x"} if method == "average" else {}))
        return path

    return bundle


@pytest.mark.parametrize("method", ["average", "low_bit:bits=4"])
@pytest.mark.parametrize("name", ["vit", "t5", "llama, tied", "gpt2"])
def test_a_runtime_computes_on_the_device_what_it_does_on_the_cpu(
    name: str, method: str, bundle_of: Callable[..., Path]
) -> None:
    bundle, family = open_bundle(bundle_of(name, method)), FAMILIES[name]
    inputs = {k: v.to(family.dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    for task in TASKS[:2]:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            expected = getattr(bundle.runtime().model(task)(**inputs), family.output)
        with pretended_gpu(), torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            model = bundle.runtime(device=GPU.type).model(task)
            assert {held.device for held in [*model.parameters(), *model.buffers()]} == {GPU}
            found = getattr(model(**{k: v.to(GPU) for k, v in inputs.items()}), family.output)
            assert found.device == GPU
            assert torch.allclose(found.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_what_is_stored_once_is_placed_once_per_device_and_dtype(
    dtype: str | None, bundle_of: Callable[..., Path]
) -> None:
    bundle = open_bundle(bundle_of("vit", "average"))
    with pretended_gpu():
        runtime = bundle.runtime(device=GPU.type, dtype=dtype)
        told = runtime.num_bytes
        models = [runtime.model(task) for task in TASKS]
        held = {tensor.held.data_ptr(): tensor.nbytes for model in models for tensor in tensors_of(model)}
        assert told == {str(GPU): sum(held.values())}
        assert len(held) < sum(len(tensors_of(model)) for model in models)
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(GPU, models[0].dtype)
        with sdpa_kernel(SDPBackend.MATH):
            rows = runtime({"pixel_values": pixels}, ["beta", "alpha", "beta", "gamma"])
        assert {row.logits.device for row in rows} == {GPU}


@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_a_task_that_finds_no_memory_leaves_nothing_and_the_others_run_on(
    weights: str, left: int, bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "LEAST_ELEMENTS", 0)
    bundle = open_bundle(bundle_of("vit", "low_bit:bits=4"))
    pixels = torch.ones(1, 3, 16, 16)
    with pretended_gpu() as device, sdpa_kernel(SDPBackend.MATH):
        runtime = bundle.runtime(device=GPU.type, weights=weights)
        inputs = {"pixel_values": pixels.to(GPU)}
        before = runtime(inputs, ["alpha"])[0].logits.cpu()
        held = set(runtime._placed)
        begun = num_begun()
        device.allocations_left = left
        with pytest.raises(MachineError, match=r"has no memory left for .*task `beta`") as raised:
            runtime.model("beta")
        assert raised.value.__traceback__ is not None and num_begun() == begun, "the error holds the task"
        device.allocations_left = float("inf")
        assert set(runtime._placed) == held and runtime._tasks["beta"] is None
        assert torch.equal(runtime(inputs, ["alpha"])[0].logits.cpu(), before)
        assert runtime.model("beta") is not None


def test_a_copying_view_on_a_device_maps_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map ends the process where the disk fails."""
    bundle = open_bundle(make_bundle(tmp_path, "--method", "low_bit:bits=3", name="tied"))
    expected = dict(bundle.view(bundle.tasks[0]))
    monkeypatch.setattr("flexmerge_cli.bundle.files.BundleFiles.map", None)
    with pretended_gpu():
        found = {name: value.cpu() for name, value in bundle.view(bundle.tasks[0], copy=True, device=GPU.type).items()}
    assert all(same_bits(found[name], value) for name, value in expected.items())


def test_what_a_thread_hands_on_for_another_to_add_up_lies_on_the_cpu() -> None:
    sums = Sums(scope="task", terms=lambda deltas, _where: [deltas.double()], then=lambda found: found)
    with pretended_gpu():
        total = sums.measure(torch.ones(2, 100).to(GPU), Where(tasks=(0, 1), tensor="w", start=0, shape=(50, 40)))
        (part,) = total.ahead
        assert not isinstance(part, np.ndarray) and part.deltas.device.type == "cpu"


def num_begun() -> int:
    """The number of tasks that runtimes hold, or that something else keeps alive."""
    gc.collect()
    return sum(type(value).__name__ == "_Task" for value in gc.get_objects())


def tensors_of(model: Any) -> list[Any]:
    return [*model.parameters(), *model.buffers()]
