"""Adapters of one of two towers of a size: the class of the model or the names decide, and nothing is guessed."""

import json

import pytest
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.adapters import members_of

from ..families import normal, write_checkpoint

MODULES = [f"encoder.layers.{layer}.self_attn.{part}" for layer in range(3) for part in ("q_proj", "v_proj")]


def changed(root, modules, towers=("text_model", "vision_model"), model_class=None):
    """The towers of the base that a LoRA of these modules changes."""
    (root / "base").mkdir()
    state = {f"{tower}.{module}.weight": normal(0, 8, 8) for tower in towers for module in MODULES}
    write_checkpoint(root / "base", {name: value + number for number, (name, value) in enumerate(state.items())})
    lora = {}
    for module in modules:
        lora[f"base_model.model.{module}.lora_A.weight"] = normal(1, 2, 8)
        lora[f"base_model.model.{module}.lora_B.weight"] = normal(2, 8, 2)
    (root / "lora").mkdir()
    save_file(lora, root / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    config |= {"auto_mapping": {"base_model_class": model_class}} if model_class else {}
    (root / "lora/adapter_config.json").write_text(json.dumps(config))
    found = members_of(open_checkpoint(str(root / "base")), {"a": open_checkpoint(str(root / "lora"))}, "keep")
    return {name.partition(".")[0] for name, tensor in found.kept[0].model.tensors.items() if tensor.change}


@pytest.mark.parametrize(
    ("model_class", "tower"), [("SiglipVisionModel", "vision_model"), ("CLIPTextModel", "text_model")]
)
def test_the_class_that_peft_recorded_decides(model_class, tower, tmp_path):
    assert changed(tmp_path, MODULES, model_class=model_class) == {tower}


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_the_names_of_older_versions_decide(tower, tmp_path):
    assert changed(tmp_path, [f"{tower}.{module}" for module in MODULES]) == {tower}


@pytest.mark.parametrize("modules", [MODULES, MODULES[:1]], ids=["many", "one"])
def test_without_either_both_towers_are_named_and_none_is_changed(modules, tmp_path):
    with pytest.raises(DataError, match="several ways") as raised:
        changed(tmp_path, modules)
    assert "`text_model.*`" in raised.value.message and "`vision_model.*`" in raised.value.message


@pytest.mark.parametrize(("modules", "model_class"), [
    ([f"vision_model.{module}" for module in MODULES], None), (MODULES, "SiglipVisionModel"),
])  # fmt: skip
def test_a_lora_of_a_tower_that_the_base_lacks_fits_no_other(modules, model_class, tmp_path):
    with pytest.raises(DataError, match="does not fit the base"):
        changed(tmp_path, modules, towers=("text_model",), model_class=model_class)
