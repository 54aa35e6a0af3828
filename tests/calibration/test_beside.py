"""Calibrations, coefficients and corrections of a family that has a LoRA adapter beside its whole models."""

import pytest

from flexmerge_cli import calibrate, load_plan, make_plan, merge, open_bundle, tune

from ..families import normal
from ..test_golden_bundles import PEFT, write_adapter
from .families import TASKS


@pytest.fixture
def kept(pictures, tmp_path):
    """The plan of the pictures and an adapter, whose spec has the pictures alone."""
    folder, path = tmp_path / "kept", f"{PEFT}.vit.encoder.layer.0.attention.attention.query"
    width = pictures.family.weights("a")["vit.layernorm.weight"].numel()
    factors = {f"{path}.lora_A.weight": normal(1, 2, width), f"{path}.lora_B.weight": normal(2, width, 2)}
    write_adapter(folder / "lora", factors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]})
    sources = {task: pictures.family.folder / "tasks" / task for task in TASKS} | {"lora": folder / "lora"}
    make_plan(pictures.family.folder / "base", sources, output=folder / "plan.json", assume_base=True)
    assert load_plan(folder / "plan.json").kept_names == ("lora",)
    return folder / "plan.json"


def test_kept_adapters_need_no_examples(pictures, kept, tmp_path):
    """`calibrate` and `tune` asked for examples of the adapter, which a spec cannot have."""
    spec, bundle = pictures.family.spec, tmp_path / "bundle"
    calibrate(kept, spec, tmp_path / "through", through="regmean", size="3x", device="cpu")
    merge(kept, bundle, method="regmean", size="3x", calibration=tmp_path / "through", device="cpu")
    tune(kept, spec, tmp_path / "c.json", method="fw_merging:steps=1", examples=1, device="cpu")
    asked = {"method": "surgery:rank=1,steps=2", "examples": 1, "device": "cpu"}
    tune(kept, spec, tmp_path / "corrected", bundle=bundle, **asked)
    found = open_bundle(tmp_path / "corrected")
    assert set(found.manifest.surgery.layers) == set(TASKS) and set(found.tasks) == {*TASKS, "lora"}
    assert found.view("lora")
