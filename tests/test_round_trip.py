"""Sources -> plan -> bundle -> view, export: what must come back bit by bit does."""

import pytest
from safetensors.torch import load_file

from flexmerge_cli import open_bundle, verify

from .families import LAYOUTS, ODD, Models, assert_same_state, encoder, plain, same_bits, tuned, write_family
from .program import succeeds


def exported(bundle, task, folder):
    folder.parent.mkdir(exist_ok=True)
    succeeds("export", bundle, "--task", task, "-o", folder)
    return load_file(folder / "model.safetensors")


def assert_gives_back(bundle, models: Models, tmp_path):
    opened = open_bundle(bundle)
    assert opened.tasks == tuple(sorted(models.tasks))
    for name, state in models.tasks.items():
        assert_same_state(opened.view(name), state)
        assert_same_state(opened.view(name, copy=True), state)
        assert_same_state(exported(bundle, name, tmp_path / f"exported-{name}"), state)
        assert opened.manifest.tasks[name].exact
        assert opened.manifest.tasks[name].distance == 0
    assert verify(bundle, decode=True).bad == {}


@pytest.mark.parametrize("name", ODD)
def test_every_model_comes_back_when_nothing_is_merged(name, odd_family, odd_plan, tmp_path):
    succeeds("merge", odd_plan(name), "-o", tmp_path / "bundle")
    assert_gives_back(tmp_path / "bundle", odd_family(name).models, tmp_path)


@pytest.mark.parametrize("method", ["average", "ties", "emr"])
@pytest.mark.parametrize(
    "name", ["plain", "bf16", "fp16", "mixed_dtypes", "heads", "confusing_names", "running_statistics"]
)
def test_every_model_comes_back_at_its_full_size(name, method, odd_family, odd_plan, tmp_path):
    models = odd_family(name).models
    full = f"{len(models.tasks)}x"
    result = succeeds("merge", odd_plan(name), "--method", method, "--size", full, "-o", tmp_path / "bundle", "--json")
    assert result.json["allocation"]["merges"] == 0
    assert_gives_back(tmp_path / "bundle", models, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bf16", "buffers", "small_shapes", "tied"])
def test_every_layout_of_a_checkpoint_comes_back(name, layout, tmp_path):
    models = ODD[name]()
    folders = write_family(tmp_path / "family", models, layout=layout)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    assert_gives_back(tmp_path / "bundle", models, tmp_path)


def test_models_that_differ_in_private_tensors_alone_come_back_at_1x(odd_family, odd_plan, tmp_path):
    for method in ("average", "task_arithmetic", "ties"):
        bundle = tmp_path / method
        result = succeeds("merge", odd_plan("private_only"), "--method", method, "--size", "1x", "-o", bundle, "--json")
        one, heads = encoder(), 4 * (4 * 8 + 4) + 3 * 8
        assert result.json["tensor_bytes"] == sum(4 * v.numel() for v in one.values()) + 3 * heads
        assert_gives_back(bundle, odd_family("private_only").models, tmp_path / f"exports-{method}")


@pytest.mark.parametrize("method", ["task_arithmetic", "emr"])
@pytest.mark.parametrize("name", ODD)
def test_what_is_not_mergeable_comes_back_whatever_is_merged(name, method, odd_family, odd_plan, tmp_path):
    bundle = tmp_path / "bundle"
    models = odd_family(name).models
    succeeds("merge", odd_plan(name), "--method", method, "-o", bundle)
    opened = open_bundle(bundle)
    kinds = {tensor.name: tensor.class_ for tensor in opened.manifest.tensors}
    for task, state in models.tasks.items():
        view = opened.view(task)
        own = opened.manifest.tasks[task].names
        assert sorted(view) == sorted(state)
        for tensor in opened.manifest.tensors:
            if task not in tensor.digests:
                continue
            key = own.get(tensor.name, tensor.name)
            assert (view[key].dtype, view[key].shape) == (state[key].dtype, state[key].shape)
            if kinds[tensor.of or tensor.name] != "mergeable":
                assert same_bits(view[key], state[key]), key
        assert_same_state(exported(bundle, task, tmp_path / task), view)
    assert verify(bundle, decode=True).bad == {}


def test_a_group_of_one_keeps_every_bit_and_no_other_does(tmp_path):
    folders = write_family(tmp_path, plain())
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--size", "2.5x", "-o", tmp_path / "bundle")
    opened = open_bundle(tmp_path / "bundle")
    alone = merged = 0
    for unit in opened.manifest.units:
        for group in unit.groups:
            for task in group.tasks:
                for name in unit.tensors:
                    same = same_bits(opened.view(task)[name], folders.models.tasks[task][name])
                    assert same == (len(group.tasks) == 1) == (group.kind == "copy"), (unit.name, name)
                    assert (group.distance[task] == 0) == same
            alone += len(group.tasks) == 1
            merged += len(group.tasks) > 1
    assert alone and merged


def test_a_task_of_one_group_with_an_equal_one_is_exact(tmp_path):
    """Two equal fine-tunes are one copy, and their group of two is exact, however it is merged."""
    base = encoder()
    models = Models(base=base, tasks={"a": tuned(base, 1), "b": tuned(base, 1), "c": tuned(base, 2)})
    folders = write_family(tmp_path, models)
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "plan.json")
    result = succeeds(
        "merge", tmp_path / "plan.json", "--method", "task_arithmetic", "--size", "2x", "-o", tmp_path / "b", "--json"
    )
    assert result.json["factor"] == 2
    assert_gives_back(tmp_path / "b", models, tmp_path / "exports")
