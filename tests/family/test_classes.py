"""The five classes, by name and header; what the bits decide is in test_family.py."""

import itertools

import pytest

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.family.classes import HEADS, aliases, is_resnet, target_rank, tied_by_config, why_private


def tensor(name="w", dtype="F32", shape=(4, 2), **where):
    return StoredTensor(**{"name": name, "dtype": dtype, "shape": shape, "path": _Path(), "offset": 0} | where)


class _Path:
    suffix = ".bin"


def why(name="layer.0.mlp.weight", base=None, tasks=None, **options):
    return why_private(name, base or tensor(), tasks if tasks is not None else [tensor(), tensor()], **options)


def test_what_the_base_and_every_task_has_in_one_shape_is_mergeable():
    assert why() is None
    assert why(tasks=[tensor(dtype="BF16"), tensor(dtype="F16")]) is None
    assert why(base=tensor(shape=()), tasks=[tensor(shape=())]) is None


@pytest.mark.parametrize(("reason", "arguments"), [
    ("not floating point", {"tasks": [tensor(dtype="I64"), tensor()]}),
    ("not floating point", {"tasks": [tensor(dtype="BOOL")], "base": tensor(dtype="BOOL")}),
    ("not floating point in the base", {"base": tensor(dtype="I64")}),
    ("missing in a task", {"tasks": [tensor(), None]}),
    ("of another shape", {"tasks": [tensor(), tensor(shape=(5, 2))]}),
    ("of another shape", {"tasks": [tensor(shape=(2, 4)), tensor(shape=(2, 4))]}),
    ("running statistic", {"name": "bn1.running_mean"}),
    ("running statistic", {"name": "layer1.0.bn1.running_var"}),
    ("asked for", {"private": ["layer.0.*"]}),
    ("asked for", {"private": ["nothing", "*.mlp.*"]}),
])  # fmt: skip
def test_what_is_private_says_why(reason, arguments):
    assert why(**arguments) == reason


def test_missing_in_the_base_is_private():
    assert why_private("w", None, [tensor(), tensor()]) == "missing in the base"


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_a_leading_whole_segment(head):
    assert why(f"{head}.weight") == why(f"{head}.dense.bias") == why(f"model.{head}.weight") == "task head"
    assert why(f"{head}.weight", merge_heads=True) is None
    for name in (
        f"{head}s_of_state.weight",
        f"layer.0.{head}.weight",
        f"my{head}.weight",
        f"encoder.model.{head}.weight",
    ):
        assert why(name) is None or name.split(".")[0] in HEADS


def test_fc_is_the_head_of_a_resnet_alone():
    assert why("fc.weight", resnet=True) == "task head"
    assert why("fc.weight") is None
    assert is_resnet(["conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.weight"])
    assert not is_resnet(["conv1.weight", "layer1.weight", "fc.weight"])


def stored(*names_and_offsets, dtype="F32", shape=(4, 2)):
    path = _Path()
    return {name: tensor(name, dtype, shape, offset=offset, path=path) for name, offset in names_and_offsets}


def test_shared_storage_is_an_alias_of_the_embedding():
    found = aliases(stored(("lm_head.weight", 0), ("model.embed_tokens.weight", 0), ("other.weight", 32)))
    assert found == {"lm_head.weight": "model.embed_tokens.weight"}
    found = aliases(stored(("decoder.embed_tokens.weight", 0), ("lm_head.weight", 0), ("shared.weight", 0)))
    assert set(found.values()) == {"shared.weight"}


def test_equal_places_of_other_form_or_no_bytes_are_no_alias():
    path = _Path()
    part = {
        "a": tensor("a", path=path),
        "b": tensor("b", shape=(2, 4), path=path),
        "c": tensor("c", dtype="I32", path=path),
    }
    assert aliases(part) == {}
    assert aliases(stored(("a", 0), ("b", 0), shape=(0, 2))) == {}


def test_target_does_not_depend_on_the_order_of_names():
    names = ["lm_head.weight", "z.weight", "shared.weight", "encoder.embed_tokens.weight"]
    assert {min(order, key=target_rank) for order in itertools.permutations(names)} == {"shared.weight"}


TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(("config", "expected"), [
    ({}, {}),
    ({"tie_word_embeddings": False}, {}),
    ({"tie_word_embeddings": True}, TIED),
    ({"model_type": "gpt2"}, TIED),
    ({"text_config": {"tie_word_embeddings": True}}, TIED),
    ({"text_config": {"tie_word_embeddings": False}}, {}),
    ({"text_config": "odd", "tie_word_embeddings": True}, TIED),
    ({"text_config": {}, "tie_word_embeddings": False}, {}),
])  # fmt: skip
def test_the_config_ties_output_to_input_embeddings(config, expected):
    assert tied_by_config(config, stored(("model.embed_tokens.weight", 0), ("lm_head.weight", 32))) == expected


def test_the_config_ties_only_what_has_one_form():
    found = stored(("model.embed_tokens.weight", 0)) | {"lm_head.weight": tensor("lm_head.weight", shape=(5, 2))}
    assert tied_by_config({"tie_word_embeddings": True}, found) == {}
