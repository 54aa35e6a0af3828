"""Models are built from config and weights: without a copy, and with nothing missing or left over."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation import loading, skeletons
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.models import Lazy

from . import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.source_model("it", str(tiny.bert(tmp_path / "model", 3)))


def with_weights(model, **changed):
    """The same, some tensors replaced; None: left out."""
    weights = dict(model.weights) | changed
    return replace(model, weights={name: tensor for name, tensor in weights.items() if tensor is not None})


def test_parameters_lie_on_the_weights_own_memory(model):
    weights = dict(model.weights)
    built = build_model(replace(model, weights=weights), None, "cpu")
    there = {tensor.data_ptr() for tensor in weights.values()}
    assert {parameter.data_ptr() for parameter in built.parameters()} <= there
    assert not built.training


def test_the_model_is_that_of_from_pretrained(model):
    ours = build_model(model, None, "cpu")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(model.folder).eval()
    inputs = {"input_ids": torch.arange(4, 14)[None]}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    assert all(buffer.device.type == "cpu" for buffer in ours.buffers())


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.t5, tiny.clip])
def test_buffers_that_no_checkpoint_has_are_made(tmp_path, make):
    """Rotary frequencies, position numbers, causal masks: on the meta device they have no values."""
    model = tiny.source_model("it", str(make(tmp_path / "model")))
    built = build_model(model, None, "cpu")
    whole = type(built).from_pretrained(model.folder)
    for (name, ours), theirs in zip(built.named_buffers(), whole.buffers()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classifier.bias": None}, "missing: classifier.bias"),
        ({"extra.weight": torch.zeros(2)}, "unexpected: extra.weight"),
        ({"classifier.weight": torch.zeros(5, 16)}, "of another shape: classifier.weight"),
    ],
)
def test_what_does_not_fit_is_listed(model, changed, said):
    with pytest.raises(DataError) as raised:
        build_model(with_weights(model, **changed), None, "cpu")
    assert said in raised.value.message and "task `it`" in raised.value.message


def test_all_that_does_not_fit_is_listed_at_once(model):
    changed = {"classifier.bias": None, "bert.pooler.dense.bias": None, "x": torch.zeros(1), "y": torch.zeros(1)}
    with pytest.raises(DataError) as raised:
        build_model(with_weights(model, **changed), None, "cpu")
    assert "missing: bert.pooler.dense.bias, classifier.bias\n  unexpected: x, y" in raised.value.message


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_computes_in_the_dtype_that_was_asked_for(model, dtype):
    built = build_model(model, dtype, "cpu")
    assert {parameter.dtype for parameter in built.parameters()} == {getattr(torch, dtype)}


def test_without_a_dtype_it_computes_in_the_stored_one(model):
    half = replace(model, weights={name: tensor.bfloat16() for name, tensor in model.weights.items()})
    assert {parameter.dtype for parameter in build_model(half, None, "cpu").parameters()} == {torch.bfloat16}


def test_a_config_that_is_missing_or_names_no_model_is_asked_wrongly(model):
    path = model.folder / "config.json"
    config = json.loads(path.read_text())
    for changed, said in (({"architectures": ["NoSuchModel"]}, "NoSuchModel"), ({"model_type": "none"}, "`none`")):
        path.write_text(json.dumps(config | changed))
        with pytest.raises(UsageError, match=said):
            build_model(model, None, "cpu")
    path.unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        build_model(model, None, "cpu")


def test_equal_weights_have_one_digest_and_other_weights_another(tmp_path):
    first, second = (tiny.source_model("it", str(tiny.gpt2(tmp_path / name))) for name in "ab")
    other = tiny.source_model("it", str(tiny.llama(tmp_path / "c")))
    assert first.digest == second.digest != other.digest


def test_a_strided_tensor_of_a_pickle_is_read_in_its_own_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    torch.save({"t": tensor}, tmp_path / "pytorch_model.bin")
    assert torch.equal(tiny.source_model("it", str(tmp_path)).weights["t"], tensor)


def test_lazy_weights_are_made_when_asked_for():
    calls = []
    lazy = Lazy({"a": lambda: calls.append(1) or torch.ones(1)})
    assert len(lazy) == 1 and list(lazy) == ["a"] and not calls
    assert np.asarray(lazy["a"]).item() == 1 and calls == [1]


def test_a_model_generates_by_its_generation_config(tmp_path):
    """Only config.json was looked at: a forced first token, or a penalty, was lost."""
    path = tiny.t5(tmp_path)
    options = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(options | {"forced_bos_token_id": 7}))
    built = build_model(tiny.source_model("it", str(path)), None, "cpu")
    wanted = transformers.T5ForConditionalGeneration.from_pretrained(path)
    assert built.generation_config == wanted.generation_config
    ids = torch.tensor([[5, 6, 3]])
    assert built.generate(ids, max_new_tokens=3).equal(wanted.generate(ids, max_new_tokens=3))
    (path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match="generation_config"):
        build_model(tiny.source_model("it", str(path)), None, "cpu")


def counted(monkeypatch):
    """Calls of transformers' own, slow way to build."""
    calls, build = [], loading.assigned_model
    monkeypatch.setattr(loading, "assigned_model", lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs))
    monkeypatch.setattr(skeletons, "_kept", {})
    return calls


def state_of(built):
    return {name: value.clone() for name, value in built.state_dict().items()}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("make", [lambda path: tiny.bert(path, 3), tiny.vit, tiny.llama, tiny.gpt2, tiny.t5, tiny.clip])
def test_what_is_built_again_is_what_would_have_been_built(tmp_path, monkeypatch, make, dtype):
    """Other weights of the same config; and neither model has anything of the other."""
    calls = counted(monkeypatch)
    model = tiny.source_model("it", str(make(tmp_path / "model")))
    others = {n: v * 2 + 1 if v.is_floating_point() else v for n, v in dict(model.weights).items()}
    other = replace(model, weights=others)
    first = build_model(model, dtype, "cpu")
    before = state_of(first)
    second = build_model(other, dtype, "cpu")
    assert all(value.equal(before[name]) for name, value in first.state_dict().items())
    monkeypatch.setattr(skeletons, "_kept", {})
    expected = build_model(other, dtype, "cpu")
    assert len(calls) in (2, 3) and type(second) is type(expected) and not second.training
    assert second.state_dict().keys() == expected.state_dict().keys()
    for (name, mine), theirs in zip(second.state_dict().items(), expected.state_dict().values()):
        assert mine.dtype is theirs.dtype and mine.equal(theirs), name
    for (name, mine), theirs in zip(second.named_buffers(), expected.buffers()):
        assert mine.equal(theirs), name
    assert str(second.config) == str(expected.config)
    grads = [parameter.requires_grad for parameter in second.parameters()]
    assert grads == [parameter.requires_grad for parameter in expected.parameters()]


@pytest.mark.parametrize("make", [tiny.vit, tiny.llama, lambda path: tiny.bert(path, 3)])
def test_a_model_is_built_once_and_again_for_another_config(tmp_path, monkeypatch, make):
    calls = counted(monkeypatch)
    model = tiny.source_model("it", str(make(tmp_path / "model")))
    for _ in range(3):
        build_model(model, "float32", "cpu")
    assert len(calls) == 1
    config = json.loads((model.folder / "config.json").read_text())
    (model.folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5, "note": 1}))
    built = build_model(model, "float32", "cpu")
    assert len(calls) == 2 and built.config.note == 1


def test_weights_that_do_not_fit_are_told_after_some_that_did(model, monkeypatch):
    calls = counted(monkeypatch)
    build_model(model, None, "cpu")
    for changed, said in (
        ({"classifier.bias": None}, "missing: classifier.bias"),
        ({"classifier.bias": None, "extra": torch.zeros(3)}, "unexpected: extra"),
        ({"classifier.bias": torch.zeros(7)}, "of another shape: classifier.bias"),
    ):
        with pytest.raises(DataError, match=said):
            build_model(with_weights(model, **changed), None, "cpu")
    build_model(model, None, "cpu")
    assert len(calls) == 4
