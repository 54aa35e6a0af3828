"""A new form is one file (toy.py) and one line of the table."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.stored.forms import FORMS

from ..families import plain, write_family
from ..program import fails, stored_sizes, succeeds
from .toy import TOY

METHOD = f"{Path(__file__).parent / 'toy.py'}#shifted"


def test_a_form_of_one_line_goes_from_merge_to_export(tmp_path, monkeypatch):
    folders, path = write_family(tmp_path, plain()), tmp_path / "bundle"
    succeeds("plan", *folders.arguments, "--blocks", "model", "-o", tmp_path / "plan.json")
    monkeypatch.setitem(FORMS, TOY.word, TOY)
    asked = "merge", tmp_path / "plan.json", "--method", METHOD, "--size", "3.2x", "-o", path
    predicted = succeeds(*asked, "--dry-run", "--json").json
    succeeds(*asked)
    assert sum(stored_sizes(path).values()) == predicted["total_bytes"]
    bundle = open_bundle(path)
    assert {group.kind for unit in bundle.manifest.units for group in unit.groups} == {"toy"}
    assert verify(path, decode=True).bad == {}
    assert "toy" in succeeds("inspect", path).out
    succeeds("export", path, "--all", "-o", tmp_path / "out")
    for task, state in folders.models.tasks.items():
        exported, view = load_file(tmp_path / "out" / task / "model.safetensors"), bundle.view(task)
        for name, value in state.items():
            assert torch.equal(exported[name], view[name]) and torch.allclose(view[name], value, atol=1e-3)
    succeeds("diff", path, path)
    fails(2, "export", path, "--as-lora", "-o", tmp_path / "lora", says="low rank")
    monkeypatch.delitem(FORMS, TOY.word)
    fails(3, "inspect", path, says="no form `toy`")
