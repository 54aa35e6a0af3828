"""A model of several parts goes through plan, merge and export, and comes back in its folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmerge_cli import make_plan, open_bundle
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.record import Unsound

from .composites import PIPELINE, SENTENCES, fine_tune, named, write_pipeline, write_sentences
from .families import assert_same_state, normal
from .program import fails, succeeds, tree

WRITE = {"sentences": (write_sentences, SENTENCES), "pipeline": (write_pipeline, PIPELINE)}


class Made:
    """A base and two fine-tunes on disk."""

    def __init__(self, root, kind):
        write, base = WRITE[kind]
        same = ("vae",) if kind == "pipeline" else ()
        self.root, self.parts = root, {"a": fine_tune(base, 1, same=same), "b": fine_tune(base, 9, same=same)}
        write(root / "base", base)
        for name, parts in self.parts.items():
            write(root / "tasks" / name, parts)
        self.arguments = ["--base", root / "base", "--tasks", root / "tasks"]

    def bundle(self, *merge):
        succeeds("plan", *self.arguments, "-o", self.root / "plan.json")
        succeeds("merge", self.root / "plan.json", *merge, "-o", self.root / "bundle")
        return self.root / "bundle"


@pytest.fixture(params=list(WRITE))
def made(request, tmp_path):
    return Made(tmp_path, request.param)


@pytest.fixture
def sentences(tmp_path):
    return Made(tmp_path, "sentences")


def texts(folder):
    return {name: data for name, data in tree(folder).items() if name.endswith(".json") and ".index." not in name}


def test_every_part_comes_back_to_its_place_bit_by_bit(made):
    bundle = made.bundle()
    succeeds("inspect", bundle, "--verify")
    succeeds("export", bundle, "--all", "-o", made.root / "out")
    for task, parts in made.parts.items():
        assert_same_state(dict(open_bundle(bundle).view(task)), named(parts))
        out, source = made.root / "out" / task, made.root / "tasks" / task
        assert texts(out) == texts(source)
        for part, state in parts.items():
            stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
            assert_same_state(load_file(out / part / f"{stem}.safetensors"), state)
        assert len(tree(out)) == len(texts(source)) + len(parts)
        found = open_checkpoint(str(out))
        assert set(found.tensors) == set(named(parts)) and not found.left


def test_parts_merge_like_any_tensor(made):
    view = open_bundle(made.bundle("--method", "average", "--size", "1x")).view("a")
    a, b = (named(parts) for parts in made.parts.values())
    for name, value in view.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2)
    blocks = {block.name for block in Plan.model_validate_json((made.root / "plan.json").read_bytes()).blocks}
    assert {name.partition("/")[0] for name in blocks if "/" in name} == set(made.parts["a"]) - {"", "vae"}


def test_what_all_fine_tunes_left_as_it_was_is_stored_once(tmp_path):
    made = Made(tmp_path, "pipeline")
    manifest = Manifest.model_validate_json((made.bundle() / "manifest.json").read_bytes())
    classes = {tensor.name: tensor.class_ for tensor in manifest.tensors}
    assert {kind for name, kind in classes.items() if name.startswith("vae/")} == {"constant"}
    assert {kind for name, kind in classes.items() if name.startswith("unet/")} == {"mergeable"}


def test_blocks_of_a_part_are_those_of_the_part_alone(tmp_path):
    made = Made(tmp_path, "pipeline")
    whole = make_plan(made.root / "base", {name: made.root / "tasks" / name for name in "ab"})
    alone = make_plan(made.root / "base/unet", {name: made.root / "tasks" / name / "unet" for name in "ab"})
    assert [b.name for b in whole.blocks if b.name.startswith("unet/")] == [f"unet/{b.name}" for b in alone.blocks]
    assert next(iter(alone.tasks)).parts == {}


def test_a_part_that_the_base_lacks_is_private_and_heads_are_known_within_parts(sentences):
    shutil.rmtree(sentences.root / "base/2_Dense")
    for name in ("base", "tasks/a", "tasks/b"):
        (sentences.root / name / "4_Head").mkdir()
        save_file({"classifier.weight": normal(5, 2, 4)}, sentences.root / name / "4_Head/model.safetensors")
    bundle = sentences.bundle("--method", "average", "--size", "1x")
    assert_same_state(
        {name: value for name, value in open_bundle(bundle).view("a").items() if name.startswith("2_Dense/")},
        named({"2_Dense": sentences.parts["a"]["2_Dense"]}),
    )
    plan = Plan.model_validate_json((sentences.root / "plan.json").read_bytes())
    assert plan.tensor("2_Dense/linear.weight").reason == "missing in the base"


def test_parts_are_not_linked_and_an_export_of_them_is_replaced(made):
    bundle = made.bundle("--method", "average", "--size", "1x")
    fails(2, "export", bundle, "--task", "a", "-o", made.root / "out", "--link", says="cannot be linked")
    succeeds("export", bundle, "--task", "a", "-o", made.root / "out")
    succeeds("export", bundle, "--task", "b", "-o", made.root / "out", "--force")
    (made.root / "out" / list(made.parts["a"])[-1] / "mine.txt").write_text("mine")
    fails(2, "export", bundle, "--task", "b", "-o", made.root / "out", "--force", says="mine.txt")


def test_large_parts_are_sharded_where_they_lie(sentences, monkeypatch):
    bundle = sentences.bundle()
    monkeypatch.setattr("flexmerge_cli.bundle.export.SHARD_BYTES", 130)
    succeeds("export", bundle, "--task", "a", "-o", sentences.root / "out")
    assert (sentences.root / "out/2_Dense/model.safetensors.index.json").is_file()
    assert set(open_checkpoint(str(sentences.root / "out")).tensors) == set(named(sentences.parts["a"]))
    succeeds("export", bundle, "--task", "b", "-o", sentences.root / "out", "--force")


# Sources on the Hub and the web.


def test_the_hub_gives_the_same_bundle_and_is_asked_nothing_once_all_is_here(made, hub, monkeypatch):
    for name in ("base", "tasks/a", "tasks/b"):
        hub.add(f"org/{name.rpartition('/')[2]}", made.root / name)
    given = ["--base", "hf://org/base", "--task", "a=hf://org/a", "--task", "b=hf://org/b"]
    succeeds("plan", *given, "-o", made.root / "hub.json")
    succeeds("merge", made.root / "hub.json", "-o", made.root / "hub")
    hub.requests.clear()
    succeeds("merge", made.root / "hub.json", "-o", made.root / "again")
    assert hub.requests == []
    succeeds("plan", *given, "--offline", "-o", made.root / "offline.json")
    bundle = made.bundle()
    for task, parts in made.parts.items():
        assert_same_state(dict(open_bundle(made.root / "hub").view(task)), named(parts))
        assert texts(made.root / "hub/tasks" / task) == texts(bundle / "tasks" / task)


def test_a_family_of_composites_in_one_repository(made, hub):
    hub.add("org/family", made.root)
    shown = succeeds(
        "plan", "--base", "hf://org/family:base", "--tasks", "hf://org/family:tasks", "--dry-run", "--json"
    )
    assert [task["name"] for task in shown.json["tasks"]] == ["a", "b"]


# What is not carried.


def test_files_that_are_not_carried_are_counted_and_named(sentences):
    for name in ("a", "b"):
        folder = sentences.root / "tasks" / name
        (folder / "checkpoint-500").mkdir()
        for file in ("checkpoint-500/model.safetensors", "optimizer.pt", "scores.csv", "onnx.onnx"):
            (folder / file).write_text("x")
    result = succeeds("plan", *sentences.arguments, "-o", sentences.root / "plan.json", "--json")
    assert result.json["left_out"][:3] == [
        {"task": "a", "kind": "training", "files": ["checkpoint-500/", "optimizer.pt"]},
        {"task": "a", "kind": "copies", "files": ["onnx.onnx"]},
        {"task": "a", "kind": "other", "files": ["scores.csv"]},
    ]
    notes = result.err.splitlines()
    assert "not carried, left by training, or hidden: 4 of 2 tasks (checkpoint-500/, optimizer.pt)" in notes
    assert "warning: not carried, of no known kind: 2 of 2 tasks (scores.csv)" in result.err
    assert [w for w in result.json["warnings"] if "scores.csv" in w]
    dry = succeeds("plan", *sentences.arguments, "--dry-run", "--json").json
    assert dry["left_out"] == result.json["left_out"]


def test_weights_that_are_not_understood_are_refused_unless_they_are_ignored(sentences):
    (sentences.root / "tasks/a/5_Odd").mkdir()
    (sentences.root / "tasks/a/5_Odd/weights.npz").write_text("x")
    (sentences.root / "tasks/b/model_head.pkl").write_text("x")
    plan = ["plan", *sentences.arguments, "-o", sentences.root / "plan.json"]
    says = ("5_Odd/weights.npz", "model_head.pkl", "--ignore weights.npz --ignore model_head.pkl")
    fails(3, *plan, says=says)
    fails(3, *plan, "--ignore", "*.npz", says="model_head.pkl")
    fails(2, *plan, "--ignore", "*.npz", "--ignore", "*.pkl", "--ignore", "x.json", says="--ignore x.json")
    done = succeeds(*plan, "--ignore", "*.npz", "--ignore", "*.pkl", "--json").json
    assert {"task": "b", "kind": "ignored", "files": ["model_head.pkl"]} in done["left_out"]
    succeeds("merge", sentences.root / "plan.json", "-o", sentences.root / "bundle")
    recipe = {"version": 1, "base": "base", "tasks": {"a": "tasks/a"}, "ignore": ["5_Odd"]}
    (sentences.root / "recipe.yaml").write_text(json.dumps(recipe))
    merge = ["merge", sentences.root / "recipe.yaml", "--plan", sentences.root / "kept.json", "--force"]
    done = succeeds(*merge, "-o", sentences.root / "other")
    assert "not carried, left out by --ignore: 1 of `a` (5_Odd/)\n" in done.err
    assert "not carried" not in succeeds(*merge, "-o", sentences.root / "other").err, "the plan is kept"


def test_code_is_carried_where_it_is_asked_for(sentences):
    config = {"model_type": "own", "auto_map": {"AutoModel": "modeling_own.OwnModel"}}
    for name in ("base", "tasks/a", "tasks/b"):
        (sentences.root / name / "config.json").write_text(json.dumps(config))
        (sentences.root / name / "modeling_own.py").write_text("# model\n")
        (sentences.root / name / "2_Dense/own.py").write_text("# part\n")
    plan = ["plan", *sentences.arguments, "-o", sentences.root / "plan.json", "--force", "--json"]
    said = succeeds(*plan)
    assert "`auto_map`" in said.err and "modeling_own.py" in said.err and "--with-code" in said.err
    said = succeeds(*plan, "--with-code")
    assert "modeling_own.py" not in said.err and said.json["left_out"] == []
    succeeds("merge", sentences.root / "plan.json", "-o", sentences.root / "bundle")
    succeeds("export", sentences.root / "bundle", "--task", "a", "-o", sentences.root / "out")
    for name in ("modeling_own.py", "2_Dense/own.py"):
        assert (sentences.root / "out" / name).read_text() == (sentences.root / "tasks/a" / name).read_text()


# What is unsound.


def test_sources_whose_parts_have_changed_are_refused(sentences):
    sentences.bundle()
    shutil.rmtree(sentences.root / "tasks/a/3_LayerNorm")
    says = "task `a`: other subfolders"
    fails(3, "merge", sentences.root / "plan.json", "-o", sentences.root / "other", says=says)


@pytest.mark.parametrize(("folder", "stem"), [
    ("../2_Dense", "model"), ("2_Dense", "../../model"), ("/tmp", "model"), ("a//b", "model"), ("a", "b/c"), ("", "x"),
])  # fmt: skip
def test_a_manifest_whose_parts_leave_the_folder_is_refused(folder, stem, sentences):
    fields = json.loads((sentences.bundle() / "manifest.json").read_bytes())
    fields["tasks"]["a"]["parts"] = {folder: stem}
    with pytest.raises(Unsound, match="weights of a subfolder lie outside it"):
        Manifest.model_validate(fields)


def test_a_plan_without_parts_has_no_word_of_them(family, plan):
    assert b'"parts"' not in plan.read_bytes() and b'"with_code"' not in plan.read_bytes()


# Adapters over a base of several parts.


@pytest.fixture
def adapted(sentences):
    """A LoRA of the base, kept as it is beside a fine-tune."""
    folder = sentences.root / "tasks/lora"
    folder.mkdir()
    module = "base_model.model.encoder.layer.0.attention.self.query"
    factors = {f"{module}.lora_A.weight": normal(1, 2, 8), f"{module}.lora_B.weight": normal(2, 8, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sentences


def test_a_kept_adapter_comes_back_as_it_was_and_merged_with_the_parts_of_the_base(adapted):
    bundle = adapted.bundle("--method", "average", "--size", "3x")
    succeeds("inspect", bundle, "--verify")
    succeeds("export", bundle, "--task", "lora", "-o", adapted.root / "out")
    assert tree(adapted.root / "out") == tree(adapted.root / "tasks/lora")
    succeeds("export", bundle, "--task", "lora", "--merged", "-o", adapted.root / "merged")
    for part in ("2_Dense", "3_LayerNorm"):
        assert_same_state(load_file(adapted.root / "merged" / part / "model.safetensors"), SENTENCES[part])
    assert texts(adapted.root / "merged") == texts(adapted.root / "base")
    query = "encoder.layer.0.attention.self.query.weight"
    assert not load_file(adapted.root / "merged/model.safetensors")[query].equal(SENTENCES[""][query])
    assert set(open_bundle(bundle).view("lora")) == set(named(SENTENCES))


def test_an_adapter_that_is_merged_has_the_parts_of_the_base(adapted):
    adapted.arguments += ["--adapters", "merge"]
    bundle = adapted.bundle()
    succeeds("export", bundle, "--task", "lora", "-o", adapted.root / "out")
    assert_same_state(load_file(adapted.root / "out/2_Dense/model.safetensors"), SENTENCES["2_Dense"])


def test_weights_beside_an_adapter_are_not_understood(adapted):
    shutil.copytree(adapted.root / "tasks/a/2_Dense", adapted.root / "tasks/lora/2_Dense")
    plan = ["plan", *adapted.arguments, "-o", adapted.root / "plan.json"]
    fails(3, *plan, says="lora/2_Dense/model.safetensors")
    succeeds(*plan, "--ignore", "*_Dense")
