"""A task's tensors out of a bundle: shared where the group is dense, each in its own dtype, names and shape."""

import pytest
import torch

from flexmerge_cli import load_plan, open_bundle
from flexmerge_cli.errors import SourceError

from ..families import ODD, assert_same_state, write_family
from ..program import succeeds, tree
from .bundles import make


def test_two_tasks_of_a_group_share_storage_and_others_do_not(merged):
    bundle = open_bundle(merged)
    views = {task: bundle.view(task) for task in bundle.tasks}
    sizes = set()
    for unit in bundle.manifest.units:
        for name in unit.tensors:
            for group in unit.groups:
                places = {views[task][name].data_ptr() for task in group.tasks}
                assert len(places) == 1
                sizes.add(len(group.tasks))
            assert len({views[task][name].data_ptr() for task in views}) == len(unit.groups)
    assert {1, 2} <= sizes


def test_writing_to_a_view_is_seen_by_its_group_and_never_by_the_file(merged):
    before = tree(merged)
    bundle = open_bundle(merged)
    unit = next(unit for unit in bundle.manifest.units if len(unit.groups[0].tasks) > 1)
    first, second = unit.groups[0].tasks[:2]
    bundle.view(first)[unit.tensors[0]].fill_(42)
    assert bool((bundle.view(second)[unit.tensors[0]] == 42).all())
    assert tree(merged) == before
    assert not bool((open_bundle(merged).view(second)[unit.tensors[0]] == 42).all())


@pytest.mark.parametrize("kind", ["merged", "masked", "tied", "coded"])
def test_a_copy_is_ones_own(kind, request):
    bundle = open_bundle(request.getfixturevalue(kind))
    for name in bundle.view("task0"):
        one, other = bundle.view("task0", copy=True)[name], bundle.view("task1", copy=True)
        if name in other:
            assert one.data_ptr() != other[name].data_ptr()
        expected = bundle.view("task0")[name].clone()
        one.zero_()
        assert bundle.view("task0")[name].equal(expected)


def test_a_view_is_a_mapping_in_the_order_of_the_base(merged):
    view = open_bundle(merged).view("task1")
    names = [t.name for t in load_plan(merged.parent / "plan.json").tensors]
    assert list(view) == [name for name in names if name in view]
    assert len(view) == len(list(view)) == len(dict(view))
    assert "nothing" not in view
    with pytest.raises(KeyError):
        view["nothing"]
    with pytest.raises(TypeError):
        view["x"] = torch.zeros(1)
    with pytest.raises(SourceError):
        open_bundle(merged).view("nobody")


@pytest.mark.parametrize("method", ["average", "ties", "emr", "low_bit:bits=4"])
@pytest.mark.parametrize("name", ["bf16_of_fp32", "mixed_dtypes", "doubles", "fp16"])
def test_every_task_gets_its_own_dtype(name, method, tmp_path):
    bundle = open_bundle(make(tmp_path, "--method", method, name=name))
    for task, state in ODD[name]().tasks.items():
        view = bundle.view(task)
        assert {key: value.dtype for key, value in view.items()} == {key: value.dtype for key, value in state.items()}


def test_a_group_of_several_dtypes_is_stored_in_what_holds_them_all(tmp_path):
    """Each task's cast is of the one value: a bf16 task gets the float32 value rounded."""
    bundle = open_bundle(make(tmp_path, "--method", "average", name="mixed_dtypes"))
    for name in ("pooler.dense.weight", "encoder.layer.0.attention.self.query.weight"):
        wide = bundle.view("single")[name]
        assert wide.dtype is torch.float32
        for task in ("brain", "half", "two"):
            mine = bundle.view(task)[name]
            assert mine.equal(wide.to(mine.dtype))
    models = ODD["mixed_dtypes"]()
    del models.tasks["single"], models.tasks["half"], models.tasks["two"]
    models.tasks["brain2"] = {key: value + 1 for key, value in models.tasks["brain"].items()}
    folders = write_family(tmp_path / "narrow", models)
    succeeds("plan", *folders.arguments, "-o", tmp_path / "narrow.json")
    result = succeeds("merge", tmp_path / "narrow.json", "--method", "average", "-o", tmp_path / "narrow-b", "--json")
    assert result.json["factor"] == 1


@pytest.mark.parametrize("name", ["wrapped_tasks", "wrapped_base", "confusing_names"])
@pytest.mark.parametrize("method", ["average", "emr"])
def test_every_task_gets_its_own_names(name, method, tmp_path):
    bundle = open_bundle(make(tmp_path, "--method", method, name=name))
    models = ODD[name]()
    aligned = {}
    for task, state in models.tasks.items():
        assert set(bundle.view(task)) == set(state)
        aligned[task] = {key.removeprefix("bert.").removeprefix("model."): key for key in state}
    key = "encoder.layer.0.output.dense.weight"
    values = {task: bundle.view(task)[aligned[task][key]] for task in models.tasks}
    if method == "average":
        assert len({value.data_ptr() for value in values.values()}) == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_cast_bundle_gives_every_floating_tensor_in_that_dtype(dtype, tmp_path):
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    bundle = open_bundle(make(tmp_path, "--dtype", dtype, name="buffers"))
    for task, state in ODD["buffers"]().tasks.items():
        expected = {key: value.to(wanted) if value.is_floating_point() else value for key, value in state.items()}
        assert_same_state(bundle.view(task), expected)
        assert bundle.manifest.tasks[task].exact == (dtype == "fp32")


@pytest.mark.parametrize("method", ["average", "emr"])
def test_a_cast_and_a_method_go_together(method, tmp_path):
    bundle = open_bundle(make(tmp_path, "--dtype", "bf16", "--method", method, "--size", "1.5x", name="plain"))
    assert {value.dtype for value in bundle.view("task2").values()} == {torch.bfloat16}


def test_a_views_model_is_the_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertModel(config)
    base.save_pretrained(tmp_path / "base")
    models = {}
    for number in range(3):
        model = transformers.BertForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter, start in zip(model.bert.parameters(), base.parameters()):
                parameter.copy_(start + 0.05 * torch.randn_like(start))
        model.save_pretrained(tmp_path / f"tasks/task{number}")
        models[f"task{number}"] = model
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    ids = torch.tensor([[1, 2, 3, 4]])
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    for method in ((), ("--method", "average")):
        bundle = tmp_path / f"b{len(method)}"
        succeeds("merge", tmp_path / "plan.json", *method, "-o", bundle)
        for task in models:
            ours = open_bundle(bundle).model(task)
            exported, linked = tmp_path / f"{bundle.name}-{task}", tmp_path / f"link-{bundle.name}-{task}"
            succeeds("export", bundle, "--task", task, "-o", exported)
            succeeds("export", bundle, "--task", task, "--link", "-o", linked)
            others = [load(exported), load(linked), load(bundle / "tasks" / task), *([] if method else [models[task]])]
            for other in others:
                assert_same_state(ours.state_dict(), other.state_dict())
                with torch.no_grad():
                    # Weights are equal. Products of matrices may differ with the place of the weights in memory.
                    assert ours(ids).logits.allclose(other(ids).logits, rtol=0, atol=1e-6)
