"""The run of `merge`: the same bytes however it is cut, an error for every source that is not the plan's."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmerge_cli import load_plan, open_bundle
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.engine.spans import CHUNK_ELEMENTS
from flexmerge_cli.errors import DataError
from flexmerge_cli.merging import merge
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.merge import merge_request

from ..calls import no_thread_outlives
from ..families import Models, encoder, normal, plain, tuned, write_family
from ..program import fails, succeeds, tree
from .merges import write_bundle

CPU = torch.device("cpu")
METHODS = ("average", "task_arithmetic", "ties", "emr", "consensus:K=0.3", "ties:scope=block", "emr:gamma=tensor_mean")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of more than 2^16 elements, of odd sizes, one in bf16; tasks with parts of other lengths."""
    base = encoder(width=8) | {
        "encoder.layer.0.intermediate.dense.weight": normal(1, 261, 257),
        "encoder.layer.1.intermediate.dense.weight": normal(2, 70_001).bfloat16(),
    }
    models = Models(base=base, tasks={f"task{n}": tuned(base, n + 1) for n in range(4)})
    for number, state in enumerate(models.tasks.values()):
        state["classifier.weight"] = normal(number, 9 + 70_000 * (number % 2), 1)
    folders = write_family(tmp_path_factory.mktemp("large"), models)
    succeeds("plan", "-q", *folders.arguments, "-o", folders.root / "plan.json")
    return folders


def write(folders, request, target, *, threads=2, chunk_elements=CHUNK_ELEMENTS):
    plan = load_plan(folders.root / "plan.json")
    sources = open_sources(plan, folders.root)
    return write_bundle(
        allocate(plan, request), sources.located, sources.side_files, target,
        device=CPU, threads=threads, chunk_elements=chunk_elements,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_bundle_is_the_same_for_any_chunk_size_and_number_of_threads(method, large, tmp_path):
    request = merge_request(method=method, size="3x")
    bundles = []
    for chunk_elements in (1024, 65536, 1 << 24):
        for threads in (1, 3):
            target = tmp_path / f"{chunk_elements}-{threads}"
            write(large, request, target, threads=threads, chunk_elements=chunk_elements)
            bundles.append(tree(target))
    assert all(bundle == bundles[0] for bundle in bundles)


def test_bundle_is_the_same_in_every_run(large, tmp_path):
    for name in ("first", "second"):
        succeeds("merge", large.root / "plan.json", "--method", "emr", "--size", "3.2x", "-o", tmp_path / name)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", None])
@pytest.mark.parametrize("method", METHODS)
def test_recorded_distances_are_those_of_the_definition(method, dtype, large, tmp_path):
    """‖θ̂ - θ‖ / ‖τ‖ over the mergeable tensors; of a group of a unit, over the whole task's ‖τ‖."""
    cast = ["--dtype", dtype] if dtype else []
    succeeds(
        "merge",
        large.root / "plan.json",
        "--method",
        method,
        "--size",
        "2x" if dtype else "3x",
        *cast,
        "-o",
        tmp_path / "b",
    )
    bundle = open_bundle(tmp_path / "b")
    mergeable = [tensor.name for tensor in bundle.manifest.tensors if tensor.class_ == "mergeable"]
    base = large.models.base
    for task, state in large.models.tasks.items():
        view = bundle.view(task)
        lost = {name: float((view[name].double() - state[name].double()).square().sum()) for name in mergeable}
        energy = sum(float((state[name].float() - base[name].float()).double().square().sum()) for name in mergeable)
        assert bundle.manifest.tasks[task].distance == pytest.approx((sum(lost.values()) / energy) ** 0.5, rel=1e-5)
        for unit in bundle.manifest.units:
            (distance,) = (group.distance[task] for group in unit.groups if task in group.tasks)
            assert distance == pytest.approx((sum(lost[name] for name in unit.tensors) / energy) ** 0.5, rel=1e-5)


def test_distance_is_null_where_the_task_is_the_base_and_is_changed(tmp_path):
    base = encoder()
    models = Models(base=base, tasks={"same": dict(base), "other": tuned(base, 1)})
    folders = write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    result = succeeds("merge", tmp_path / "plan.json", "--method", "average", "-o", tmp_path / "b", "--json")
    assert result.json["tasks"]["same"]["distance"] is None
    assert result.json["tasks"]["other"]["distance"] == pytest.approx(0.5, rel=1e-3)
    fails(
        6,
        "merge",
        tmp_path / "plan.json",
        "--method",
        "average",
        "--max-distance",
        9,
        "-o",
        tmp_path / "c",
        says="same (none)",
    )
    assert not (tmp_path / "c").exists()


def flip(path, name, *, bit=0):
    """Change one bit of the last element of a tensor."""
    state = load_file(path)
    raw = state[name].reshape(-1).view(torch.uint8)
    raw[-1] ^= 1 << bit
    save_file(state, path)


@pytest.mark.parametrize("size", ["4x", "1x"])
@pytest.mark.parametrize(
    ("where", "name", "says"),
    [
        ("tasks/task1", "encoder.layer.0.attention.self.query.weight", "task `task1` has changed since the plan"),
        ("tasks/task3", "classifier.weight", "task `task3` has changed since the plan"),
        ("tasks/task0", "encoder.layer.0.intermediate.dense.weight", "task `task0` has changed since the plan"),
    ],
)
def test_one_changed_bit_of_a_source_is_an_error(where, name, says, size, large, tmp_path):
    folders = write_family(tmp_path, large.models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    flip(tmp_path / where / "model.safetensors", name)
    before = sorted(tmp_path.iterdir())
    fails(
        3, "merge", tmp_path / "plan.json", "--method", "ties", "--size", size, "-o", tmp_path / "b", says=(says, name)
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_changed_base_is_an_error_where_it_is_needed(large, tmp_path):
    """At full size nothing is compared with the base, and none is needed."""
    folders = write_family(tmp_path, large.models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    flip(tmp_path / "base/model.safetensors", "pooler.dense.weight")
    fails(
        3,
        "merge",
        tmp_path / "plan.json",
        "--method",
        "average",
        "-o",
        tmp_path / "b",
        says="the base has changed since the plan",
    )
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "b")


def test_no_thread_outlives_a_run_that_failed(large, tmp_path):
    folders = write_family(tmp_path, large.models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    flip(tmp_path / "tasks/task0/model.safetensors", "classifier.weight")
    with no_thread_outlives(), pytest.raises(DataError) as raised:
        write(folders, merge_request(method="average"), tmp_path / "b", chunk_elements=1024, threads=3)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("name", ["pooler.dense.weight", "scale", "position_scale"])
def test_a_cast_that_overflows_is_an_error(name, tmp_path):
    """1e6 is no float16: infinity in a bundle would be data that nobody wrote. Of a scalar the place is []."""
    models = plain(num_tasks=3)
    for number, state in enumerate([models.base, *models.tasks.values()]):
        state["scale"] = torch.tensor(1.0 + number)
        if number:
            state["position_scale"] = normal(number, 2)  # private: the base has none
    state = models.tasks["task1"]
    state[name].view(-1)[-1] = 1e6
    folders = write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    place = str([n - 1 for n in state[name].shape])
    for method in ((), ("--method", "average")):
        fails(
            3,
            "merge",
            tmp_path / "plan.json",
            *method,
            "--dtype",
            "fp16",
            "-o",
            tmp_path / "b",
            says=(name, place, "F16"),
        )
    assert not (tmp_path / "b").exists()
    succeeds("merge", tmp_path / "plan.json", "--dtype", "bf16", "-o", tmp_path / "b")


def test_a_method_that_overflows_is_an_error_with_its_place(tmp_path):
    models = plain(num_tasks=3)
    for state in models.tasks.values():
        state["pooler.dense.weight"][2, 3] = 3e38
    folders = write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    models.tasks["task0"]["pooler.dense.weight"][2, 3] = 2e38
    write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json", "--force")
    fails(
        3, "merge", tmp_path / "plan.json", "--method", "task_arithmetic:scale=1.5", "-o", tmp_path / "b",
        says=("`task_arithmetic` gives a value that is not finite as F32 in `pooler.dense.weight` at [2, 3]",),
    )  # fmt: skip


def test_a_row_too_large_for_a_scale_of_a_byte_is_an_error_with_its_tensor(tmp_path):
    models = plain(num_tasks=2)
    models.tasks["task1"]["pooler.dense.weight"][2] = 1e6
    folders = write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    words = ("merge", tmp_path / "plan.json", "-o", tmp_path / "b", "--method")
    fails(
        3, *words, "low_bit:bits=2,centre=base,scales=byte",
        says=("`pooler.dense.weight` of task `task1` cannot be coded", "scales=bfloat16"),
    )  # fmt: skip
    assert not (tmp_path / "b").exists()
    succeeds(*words, "low_bit:bits=2,centre=base,scales=bfloat16")


def test_infinities_of_private_tensors_are_copied_and_cast_as_they_are(tmp_path):
    models = plain(num_tasks=2)
    odd = torch.tensor([float("inf"), float("nan"), -float("inf"), 1.0])
    for state in models.tasks.values():
        state["classifier.bias"] = odd.clone()
    folders = write_family(tmp_path, models)
    result = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert "classifier.bias" in result.err
    succeeds("merge", tmp_path / "plan.json", "--dtype", "fp16", "-o", tmp_path / "b")
    assert (
        torch.equal(open_bundle(tmp_path / "b").view("task0")["classifier.bias"], odd.half()) is False
    )  # NaN is not NaN
    assert str(open_bundle(tmp_path / "b").view("task0")["classifier.bias"].tolist()) == str(odd.tolist())


def test_negative_zero_is_written_as_zero_where_values_are_made(tmp_path):
    base = {"layer.0.mlp.weight": torch.tensor([-0.0, 1.0, -1e-40]), "layer.0.attn.weight": torch.ones(3)}
    tasks = {
        "a": {"layer.0.mlp.weight": torch.tensor([-0.0, 0.0, -1e-40]), "layer.0.attn.weight": torch.zeros(3)},
        "b": {"layer.0.mlp.weight": torch.tensor([0.0, 0.0, 0.0]), "layer.0.attn.weight": torch.ones(3) * 2},
    }
    folders = write_family(tmp_path, Models(base=base, tasks=tasks))
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    for dtype in ("fp32", "bf16", "fp16"):
        succeeds("merge", tmp_path / "plan.json", "--method", "average", "--dtype", dtype, "-o", tmp_path / dtype)
        merged = open_bundle(tmp_path / dtype).view("a")["layer.0.mlp.weight"]
        assert not np.signbit(merged.float().numpy()).any() or (merged[merged == 0] == 0).all()
        assert not torch.signbit(merged[merged == 0]).any()


@pytest.mark.parametrize("method", [None, "average", "emr", "low_bit:bits=2"])
def test_progress_never_passes_its_end(method, large, tmp_path):
    seen = []
    merge(
        load_plan(large.root / "plan.json"),
        merge_request(method=method),
        tmp_path / "bundle",
        plan_folder=large.root,
        device="cpu",
        on_progress=lambda *step: seen.append(step),
    )
    merged = [(done, total) for stage, done, total in seen if stage == "merge"]
    assert merged and all(0 <= done <= total for done, total in merged)
    assert method not in ("average", "emr") or merged[-1][0] == merged[-1][1]
