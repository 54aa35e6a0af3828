"""The folder of the base of kept adapters: a checkpoint that loads as it lies, or nothing that loaders take for one."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.manifest_check import check_manifest

from ..adapters import IA3, LORA, Adapted, make
from ..families import assert_same_state
from ..program import fails, stored_sizes, succeeds, tree
from .bundles import copy, manifest_of

CONFIGS = {"a": LORA(r=2, target_modules=["q_proj"]), "b": IA3(task_type="CAUSAL_LM")}
HEAD = LORA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])


def packed(root: Path, configs=CONFIGS, *options: object, full: bool = False) -> tuple[Adapted, Path]:
    """Adapters, and full fine-tunes beside them, in a bundle."""
    adapted = make(root / "made", "llama", configs)
    whole = [f"--task=full{n}={adapted.full(f'full{n}', n)}" for n in range(2) if full]
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, *whole, "-o", root / "plan.json")
    told = succeeds("merge", root / "plan.json", *options, "-o", root / "bundle", "--json").json
    assert told["total_bytes"] == sum(stored_sizes(root / "bundle").values())
    return adapted, root / "bundle"


def assert_adapters_load(adapted: Adapted, bundle: Path, names) -> None:
    for name in names:
        model = peft.PeftModel.from_pretrained(adapted.model(bundle / "base"), bundle / "tasks" / name).eval()
        theirs = peft.PeftModel.from_pretrained(adapted.model(), adapted.tasks / name).eval()
        assert adapted.logits(model).equal(adapted.logits(theirs))


@pytest.mark.parametrize(
    ("configs", "full", "num_files"),
    [
        (CONFIGS, False, 1),
        # What every adapter replaces, and what only some of them read, is the base's all the same.
        ({"a": HEAD, "b": HEAD}, False, 1),
        ({"a": HEAD, "b": CONFIGS["a"]}, False, 2),
        (CONFIGS, True, 1),
    ],
    ids=["adapters", "a head that all replace", "a head that one replaces", "beside full fine-tunes"],
)
def test_peft_loads_the_adapters_over_the_base_as_it_lies(configs, full, num_files, tmp_path):
    adapted, bundle = packed(tmp_path, configs, full=full)
    links = [path for path in (bundle / "base").iterdir() if path.is_symlink()]
    assert len(links) == num_files and {path.readlink().parts[:2] for path in links} == {("..", "weights")}
    assert (bundle / "base/model.safetensors.index.json").exists() == (num_files > 1)
    state = {key: value for path in links for key, value in load_file(path).items()}
    assert_same_state(state, load_file(adapted.base / "model.safetensors"))
    assert_adapters_load(adapted, bundle, configs)
    assert (verify(bundle, decode=True).bad, verify(bundle).unknown) == ({}, ())
    assert set(open_checkpoint(str(bundle / "base")).tensors) == set(state)


def test_a_copy_of_the_base_in_a_bundle_is_planned_from_like_the_base(tmp_path):
    adapted, bundle = packed(tmp_path)
    for place, base in (("one", adapted.base), ("two", bundle / "base")):
        succeeds("plan", "--base", base, "--tasks", adapted.tasks, "--assume-base", "-o", tmp_path / f"{place}.json")
        succeeds("merge", tmp_path / f"{place}.json", "-o", tmp_path / place)
    ours, theirs = (tree(tmp_path / place) for place in ("one", "two"))
    assert {n: d for n, d in ours.items() if n.startswith("tasks")} == {
        n: d for n, d in theirs.items() if n.startswith("tasks")
    }
    assert_same_state(
        load_file(tmp_path / "one/base/model.safetensors"), load_file(tmp_path / "two/base/model.safetensors")
    )


def test_a_manifest_is_checked_in_as_many_passes_whatever_the_number_of_adapters(tmp_path, monkeypatch):
    """Each adapter looked at all tensors and at all files of the base: many of both took hours."""
    manifest, passes = open_bundle(packed(tmp_path)[1]).manifest, []

    class Counted(tuple):
        def __iter__(self):
            passes.append("tensors")
            return super().__iter__()

    def passes_of(kept):
        passes.clear()
        monkeypatch.setattr(Manifest, "kept", property(lambda _manifest: kept))
        check_manifest(manifest.model_copy(update={"tensors": Counted(manifest.tensors)}))
        return sorted(passes)

    of_base = Manifest.base_files
    monkeypatch.setattr(Manifest, "base_files", property(lambda self: passes.append("base") or of_base.fget(self)))
    found = passes_of(["a", "b"])
    assert found.count("base") == 1
    assert passes_of(["a", "b"] * 50) == found


def test_a_task_may_be_called_base(tmp_path):
    adapted, bundle = packed(tmp_path, {"base": CONFIGS["a"]})
    assert_adapters_load(adapted, bundle, ["base"])
    assert open_checkpoint(str(bundle / "tasks/base")).tensors


def test_a_base_that_others_decode_with_is_no_checkpoint(tmp_path):
    """Its parts have names that keep the tasks which decode with them from taking them for their own."""
    adapted, bundle = packed(tmp_path, CONFIGS, "--method", "low_bit:bits=2,centre=base", full=True)
    assert sorted(path.name for path in (bundle / "base").iterdir()) == [
        "README.md",
        "config.json.aside",
        "generation_config.json.aside",
    ]
    assert "no checkpoint" in (bundle / "base/README.md").read_text()
    assert manifest_of(bundle).get("base_stem") is None
    fails(2, "inspect", bundle / "base", says="--merged")
    succeeds("export", bundle, "--task", "a", "--merged", "-o", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    with torch.no_grad():
        model = open_bundle(bundle).model("a")
        assert adapted.logits(model).equal(adapted.logits(adapted.model(tmp_path / "out")))


def test_without_links_the_base_has_an_index(tmp_path):
    adapted, bundle = packed(tmp_path, CONFIGS, "--layout", "pointer")
    index = json.loads((bundle / "base/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"../weights/all.safetensors"}
    assert_adapters_load(adapted, bundle, CONFIGS)
    succeeds("export", bundle, "--task", "a", "--merged", "-o", tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_a_missing_link_of_the_base_is_damage_of_the_adapters(tmp_path):
    _, bundle = packed(tmp_path, full=True)
    broken = copy(bundle, tmp_path / "b")
    (broken / "base/model.safetensors").unlink()
    found = verify(broken)
    assert found.bad == {"base/model.safetensors": "missing"} and found.broken_tasks == ("a", "b")
    (broken / "base/model.safetensors").symlink_to("../../bundle/manifest.json")
    fails(3, "inspect", broken, says="is a link out of the bundle")


def test_a_bundle_with_a_base_is_replaced(tmp_path):
    _, bundle = packed(tmp_path)
    before = tree(bundle)
    succeeds("merge", tmp_path / "plan.json", "-o", bundle, "--force")
    assert tree(bundle) == before
