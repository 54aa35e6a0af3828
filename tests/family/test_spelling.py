"""The file of transformers' names is what transformers says, and each of its rules can be applied."""

import json
import re

import pytest

from flexmerge_cli.family import spelling

from .. import transformers_names


@pytest.mark.slow
def test_the_file_of_names_is_that_of_the_version_it_names():
    transformers = pytest.importorskip("transformers")
    written = json.loads(transformers_names.PLACE.read_bytes())
    if transformers.__version__ != written["version"]:
        pytest.skip(f"transformers is {transformers.__version__}, the file is of {written['version']}")
    assert transformers_names.names() == written


def test_every_replacement_refers_to_groups_that_its_pattern_has():
    rules = json.loads(transformers_names.PLACE.read_bytes())["rules"]
    assert {"vit", "llava", "qwen2_vl", "swin", "clip_vision_model", "beit"} <= set(rules)
    for pattern, replacement in (rule for lists in rules.values() for rules in lists for rule in rules):
        groups = re.findall(r"\\(.)", replacement)
        assert all(group.isdecimal() and int(group) <= re.compile(pattern).groups for group in groups), pattern


def test_all_rules_of_a_type_are_tried_together_and_each_alone():
    found = [way("language_model.model.layers.0.w") for way in spelling.by_type(["llava"])]
    assert {"language_model.layers.0.w", "model.language_model.model.layers.0.w"} <= set(found)
    assert list(spelling.by_type(["no such type"])) == []


def test_types_of_the_parts_of_a_model_are_found_and_depth_is_bounded():
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {"model_type": 3}}
    assert spelling.model_types(config, {"model_type": "llava"}) == ("llava", "llama")
    deep: dict = {"model_type": "deepest"}
    for _ in range(9):
        deep = {"text_config": deep}
    assert spelling.model_types(deep) == ()


def test_a_long_name_is_left_as_it_is():
    name = "_orig_mod." * 1000 + "w"
    assert spelling.plain(name) == name
    assert all(way(name) == name for way in spelling.by_type(["vit", "timm_wrapper"]))
