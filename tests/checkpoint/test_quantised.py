"""Checkpoints that are quantised already are refused by name, with what to do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.quantised import by_config, by_names
from flexmerge_cli.errors import DataError

from ..families import encoder, normal, write_checkpoint
from ..program import fails

CODES = torch.zeros(4, 8, dtype=torch.int32)
LAYER = "model.layers.0.mlp.up_proj"
PACKED = {
    "GPTQ": {f"{LAYER}.{part}": CODES for part in ("qweight", "qzeros", "g_idx", "scales")},
    "AWQ": {f"{LAYER}.{part}": CODES for part in ("qweight", "qzeros", "scales")},
    "bitsandbytes (4 bits)": {f"{LAYER}.weight": CODES, f"{LAYER}.weight.quant_state.bitsandbytes__nf4": CODES},
    "bitsandbytes (8 bits)": {f"{LAYER}.weight": CODES.to(torch.int8), f"{LAYER}.SCB": normal(0, 4)},
    "compressed-tensors": {f"{LAYER}.weight_packed": CODES, f"{LAYER}.weight_scale": normal(0, 4)},
    "fp8": {f"{LAYER}.weight": CODES, f"{LAYER}.weight_scale_inv": normal(0, 4)},
    "HQQ": {f"{LAYER}.W_q": CODES, f"{LAYER}.meta": normal(0, 4)},
    "MXFP4": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": CODES.to(torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": CODES.to(torch.uint8),
    },
}  # fmt: skip


def save_packed(scheme, folder):
    state = {name: value.clone() for name, value in PACKED[scheme].items()}
    save_file({"model.norm.weight": normal(1, 8), **state}, folder / "model.safetensors")


@pytest.mark.parametrize("scheme", PACKED)
def test_packed_tensors_are_told_by_their_names(scheme, tmp_path):
    save_packed(scheme, tmp_path)
    with pytest.raises(DataError) as raised:
        open_checkpoint(str(tmp_path))
    assert f"is quantised by {scheme}: it holds `model.layers.0" in raised.value.message
    assert "dequantize()" in raised.value.hint


@pytest.mark.parametrize(("told", "scheme"), [
    ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
    ({"quant_method": "awq"}, "AWQ"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"load_in_8bit": True}, "bitsandbytes"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ({"quant_method": "of-next-year"}, "of-next-year"),
    ({"load_in_8bit": False}, None), ({}, None), (None, None), ([], None), ("gptq", None),
])  # fmt: skip
def test_a_config_tells_too(told, scheme, tmp_path):
    assert by_config({"quantization_config": told}) == scheme
    write_checkpoint(tmp_path, encoder())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    if scheme is None:
        open_checkpoint(str(tmp_path))
        return
    with pytest.raises(DataError, match=f"its config.json says {scheme}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("save", [save_file, torch.save])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_told_by_its_dtype(save, dtype, tmp_path):
    path = tmp_path / ("x.safetensors" if save is save_file else "x.bin")
    save({"a": torch.zeros(4, dtype=dtype)}, path)
    with pytest.raises(DataError, match="it is quantised") as raised:
        open_checkpoint(str(path))
    assert "dequantize()" in raised.value.hint


def test_ordinary_names_are_ordinary():
    assert by_names(encoder()) is None
    assert by_names(["blocks.0.scales", "qweights.a", "resnet_blocks", "time_scales", "scale"]) is None
    assert by_config({}) is None


def test_every_command_refuses_them_with_exit_3(family, tmp_path):
    save_packed("GPTQ", tmp_path)
    fails(3, "inspect", tmp_path, says="GPTQ")
    given = [*family.arguments, "--task", f"packed={tmp_path}"]
    fails(3, "plan", *given, "--dry-run", says="GPTQ")


def test_of_the_hub_it_is_told_before_a_weight_is_fetched(hub, tmp_path):
    write_checkpoint(tmp_path, encoder())
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    hub.add("org/packed", tmp_path)
    fails(3, "inspect", "hf://org/packed", says="AWQ")
    assert hub.weights_sent() == 0
