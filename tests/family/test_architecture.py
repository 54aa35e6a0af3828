"""Configs tell of another architecture before any shape does."""

import json

import pytest

from flexmerge_cli.family.architecture import SIZES, differences

from ..families import plain, write_family
from ..program import fails, succeeds

BERT = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 30}
TOWER = {"model_type": "clip_vision_model", "hidden_size": 32, "patch_size": 16}
CLIP = {"model_type": "clip", "text_config": {"hidden_size": 16}, "vision_config": TOWER}


@pytest.mark.parametrize(("base", "task", "told"), [
    (BERT, BERT, []),
    ({}, BERT, []), (BERT, {}, []), ({}, {}, []),
    (BERT, BERT | {"vocab_size": 99, "num_labels": 7, "dtype": "float16", "max_position_embeddings": 3}, []),
    (BERT, BERT | {"model_type": "gpt2"}, ["model_type is gpt2, bert in the base"]),
    (BERT, BERT | {"hidden_size": 16}, ["hidden_size is 16, 8 in the base"]),
    (BERT, BERT | {"num_attention_heads": 4, "num_hidden_layers": 3},
     ["num_hidden_layers is 3, 2 in the base", "num_attention_heads is 4, 2 in the base"]),
    (BERT, BERT | {"hidden_size": None}, []), (BERT, BERT | {"hidden_size": "8"}, []),
    (BERT, BERT | {"hidden_size": True}, []),
    ({"depths": [2, 2], "hidden_sizes": [8, 16]}, {"depths": [2, 3], "hidden_sizes": [8, 16]},
     ["depths is [2, 3], [2, 2] in the base"]),
    ({"architecture": "resnet18"}, {"architecture": "resnet50"}, ["architecture is resnet50, resnet18 in the base"]),
    ({"_class_name": "UNet2DConditionModel"}, {"_class_name": "AutoencoderKL"},
     ["_class_name is AutoencoderKL, UNet2DConditionModel in the base"]),
    # One is a part of the other, or another name of it.
    (CLIP, TOWER, []), (TOWER, CLIP, []),
    (CLIP, TOWER | {"patch_size": 32}, ["patch_size is 32, 16 in the base"]),
    (CLIP, CLIP | {"vision_config": TOWER | {"hidden_size": 48}}, ["vision_config.hidden_size is 48, 32 in the base"]),
    (CLIP, CLIP | {"text_config": {"hidden_size": 17}}, ["text_config.hidden_size is 17, 16 in the base"]),
    ({"model_type": "vit_mae", "hidden_size": 8}, {"model_type": "vit", "hidden_size": 8}, []),
    ({"model_type": "vit_mae", "hidden_size": 8}, {"model_type": "vit", "hidden_size": 9},
     ["hidden_size is 9, 8 in the base"]),
    ({"model_type": 3, "text_config": []}, {"model_type": [], "text_config": 4}, []),
])  # fmt: skip
def test_what_both_configs_say(base, task, told):
    assert differences(base, task) == told


def test_deep_nesting_ends():
    deep = {"hidden_size": 1}
    for _ in range(500):
        deep = {"decoder": deep}
    assert differences(deep, deep) == []


def test_sizes_are_told_in_one_order():
    base, task = dict.fromkeys(SIZES, 1), dict.fromkeys(SIZES, 2)
    assert [text.split()[0] for text in differences(base, task)] == list(SIZES)


def family_with_configs(tmp_path, base, **tasks):
    folders = write_family(tmp_path / "made", plain(num_tasks=3))
    (folders.base / "config.json").write_text(json.dumps(base))
    for name in folders.tasks:
        (folders.tasks[name] / "config.json").write_text(json.dumps(tasks.get(name, base)))
    return folders


def test_heads_that_no_shape_shows_are_told_with_every_task(tmp_path):
    folders = family_with_configs(
        tmp_path, BERT, task0=BERT | {"num_attention_heads": 4}, task2=BERT | {"model_type": "gpt2"}
    )
    for options in (["--dry-run"], ["-o", tmp_path / "plan.json"]):
        done = fails(3, "plan", *folders.arguments, *options)
        assert "task `task0`: num_attention_heads is 4, 2 in the base" in done.err
        assert "task `task2`: model_type is gpt2, bert in the base" in done.err
        assert "task1" not in done.err
        assert "leave these tasks out" in done.err


def test_shapes_are_listed_where_no_config_tells(tmp_path):
    folders = family_with_configs(tmp_path, BERT, task0=BERT | {"hidden_size": 16})
    from safetensors.torch import save_file

    odd = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in plain().base.items() if value.dim()}
    for name in ("task0", "task1"):
        save_file(odd, folders.tasks[name] / "model.safetensors")
    done = fails(3, "plan", *folders.arguments, "--dry-run")
    first, second = [line for line in done.err.splitlines() if line.startswith("  task ")]
    assert "hidden_size is 16, 8 in the base" in first and "same name and shape" not in first
    assert first.index("task0") and "of the base's" in second and "task1" in second


def test_a_tower_of_the_base_is_merged(tmp_path):
    folders = family_with_configs(tmp_path, CLIP, task0=TOWER, task1=TOWER, task2=TOWER)
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
