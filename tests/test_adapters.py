"""PEFT adapters as tasks, made and loaded by peft: merged into the base on reading, or kept in their own factors."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmerge_cli import open_bundle
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import IntegrityError
from flexmerge_cli.evaluation.memory import forms_of_bundle, forms_of_plan
from flexmerge_cli.formats.plan_file import read_plan
from samples import read_bundle
from tests.adapters import IA3, LORA, Adapted, make
from tests.families import same_bits
from tests.program import fails, flexmerge, stored_sizes, succeeds, tree

CONFIGS = {
    "llama": {
        "plain": LORA(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "patterns": LORA(
            r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear", exclude_modules=["lm_head"],
            rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 32, "o_.*": 3},
        ),
        "words": LORA(r=4, target_modules=["embed_tokens", "k_proj"], modules_to_save=["lm_head"]),
        "scaled": IA3(task_type="CAUSAL_LM"),
    },
    "t5": {"lora": LORA(r=3, target_modules=["q", "v"]), "scaled": IA3(task_type="SEQ_2_SEQ_LM")},
    "vit": {
        "conv": LORA(
            r=4, target_modules=["q_proj", "v_proj", "projection"], modules_to_save=["classifier"], bias="all"
        ),
        "scaled": IA3(
            target_modules=["k_proj", "fc2", "projection"], feedforward_modules=["fc2"], modules_to_save=["classifier"]
        ),
    },
    "gpt2": {
        "turned": LORA(r=4, target_modules=["c_attn", "c_proj"]),
        "scaled": IA3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return make(tmp_path_factory.mktemp(request.param), request.param, CONFIGS[request.param])


@pytest.fixture(scope="module")
def kept(adapted: Adapted) -> Path:
    """A bundle of the kept adapters."""
    root = adapted.base.parent
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "-o", root / "kept.json")
    succeeds("merge", root / "kept.json", "-o", root / "kept")
    return root / "kept"


def test_the_models_that_a_gate_scores_have_the_memory_that_the_plan_counts(kept):
    """The plan knew no tensors of kept adapters: `curve --max-memory` ended with a ValueError."""
    plan, bundle = read_plan(kept.parent / "kept.json"), Bundle.open(kept)
    for task in bundle.tasks:
        assert sorted(forms_of_plan(plan, task)) == sorted(forms_of_bundle(bundle, task))


def assert_one_rounding(folder: Path, expected: Path) -> None:
    """Every tensor within a rounding of what peft makes, where terms cancel of the largest in the tensor.

    Of float32, peft's own sum of r products in float32 is off by some roundings: four bound it for r = 4.
    """
    found, wanted = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        roundings = 4 if value.dtype is torch.float32 else 1
        allowed = roundings * torch.finfo(value.dtype).eps * value.abs().max().double().clamp(min=1e-6)
        assert (found[name].double() - value.double()).abs().max() <= allowed, name


def test_merged_adapters_are_what_peft_makes_of_them(adapted: Adapted) -> None:
    root = adapted.base.parent
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "merge", "-o", root / "m.json")
    succeeds("merge", root / "m.json", "-o", root / "m")
    succeeds("export", root / "m", "--all", "-o", root / "m-export")
    for name in CONFIGS[adapted.kind]:
        assert_one_rounding(root / "m-export" / name, adapted.merged / name)


def test_kept_adapters_come_back_byte_for_byte(adapted: Adapted, kept: Path, tmp_path: Path) -> None:
    succeeds("export", kept, "--all", "-o", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(adapted.tasks)
    for name in CONFIGS[adapted.kind]:
        before = peft.PeftModel.from_pretrained(adapted.model(), adapted.tasks / name).eval()
        after = peft.PeftModel.from_pretrained(adapted.model(), tmp_path / "out" / name).eval()
        assert adapted.logits(after).equal(adapted.logits(before))
        assert not adapted.logits(after).equal(adapted.logits(adapted.model()))


def test_a_kept_adapter_is_exported_as_the_model_it_makes(adapted: Adapted, kept: Path, tmp_path: Path) -> None:
    succeeds("export", kept, "--all", "--merged", "-o", tmp_path / "out")
    for name in CONFIGS[adapted.kind]:
        assert_one_rounding(tmp_path / "out" / name, adapted.merged / name)
        expected = adapted.logits(adapted.model(adapted.merged / name))
        torch.testing.assert_close(adapted.logits(adapted.model(tmp_path / "out" / name)), expected)


def test_every_reader_decodes_the_same_bits_of_a_kept_adapter(adapted: Adapted, kept: Path, tmp_path: Path) -> None:
    from flexmerge_cli import open_bundle

    assert "sound" in succeeds("inspect", kept, "--verify", "--decode").out
    for name in CONFIGS[adapted.kind]:
        assert read_bundle.check(kept, name) > 0
        succeeds("export", kept, "--task", name, "--merged", "-o", tmp_path / name)
        exported = load_file(tmp_path / name / "model.safetensors")
        view = open_bundle(kept).view(name)
        assert sorted(view) == sorted(exported) and all(same_bits(view[key], exported[key]) for key in exported)
    name = next(iter(CONFIGS[adapted.kind]))
    assert adapted.logits(open_bundle(kept).model(name)).equal(adapted.logits(adapted.model(tmp_path / name)))


def test_the_base_is_stored_once_for_all_kept_adapters(adapted: Adapted, kept: Path) -> None:
    manifest = json.loads((kept / "manifest.json").read_bytes())
    base = sum(value.nbytes for value in load_file(adapted.base / "model.safetensors").values())
    own = sum(v.nbytes for n in CONFIGS[adapted.kind] for v in _own(adapted, n).values())
    assert manifest["stored_bytes"] <= base + own
    assert set(manifest["units"]) == set() and all(task["exact"] for task in manifest["tasks"].values())


def test_kept_adapters_have_no_curve_and_the_error_says_what_has_a_score(kept: Path, tmp_path: Path) -> None:
    """It said that the spec's task is none of the plan's, of which there were none."""
    (tmp_path / "eval.yaml").write_text('{"version": 1, "tasks": {"a": {"kind": "regression", "data": "d.jsonl"}}}')
    plan = kept.parent / "kept.json"
    fails(2, "curve", plan, "--spec", tmp_path / "eval.yaml", says=("no task that merges", "eval bundle/"))


def _own(adapted: Adapted, name: str) -> dict[str, torch.Tensor]:
    return load_file(adapted.tasks / name / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        [], ["--method", "average", "--size", "1x"], ["--method", "emr"], ["--method", "auto", "--size", "2x"],
        ["--method", "low_bit:bits=2,centre=base"], ["--dtype", "bf16"], ["--method", "ties", "--size", "320kB"],
    ],
)  # fmt: skip
def test_kept_adapters_stand_beside_full_fine_tunes(adapted: Adapted, options: list[str], tmp_path: Path) -> None:
    if adapted.kind != "llama":
        pytest.skip("one architecture is enough")
    full = [f"--task=full{n}={adapted.full(f'full{n}', n)}" for n in range(3)]
    # One that left some weights as they were: its copies are the base's, and the adapters read them too.
    frozen = adapted.base.parent / "full" / "full0" / "model.safetensors"
    state, base = load_file(frozen), load_file(adapted.base / "model.safetensors")
    save_file({key: base[key] if "mlp" in key else value for key, value in state.items()}, frozen, {"format": "pt"})
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, *full, "-o", tmp_path / "p.json")
    dry = succeeds("merge", tmp_path / "p.json", *options, "-o", tmp_path / "b", "--dry-run", "--json").json
    told = succeeds("merge", tmp_path / "p.json", *options, "-o", tmp_path / "b", "--json").json
    files = stored_sizes(tmp_path / "b")
    assert dry["files"] == told["files"] == files and dry["total_bytes"] == sum(files.values())
    assert "sound" in succeeds("inspect", tmp_path / "b", "--verify", "--decode").out
    for name in (*CONFIGS["llama"], "full0", "full1", "full2"):
        assert read_bundle.check(tmp_path / "b", name) > 0
    succeeds("export", tmp_path / "b", "--all", "--merged", "-o", tmp_path / "out")
    for name in CONFIGS["llama"]:
        assert_one_rounding(tmp_path / "out" / name, adapted.merged / name)
        assert told["tasks"][name]["distance"] == 0


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    configs = {"lora": LORA(r=4, target_modules=["q_proj"]), "scaled": IA3(task_type="CAUSAL_LM")}
    for dtype in (torch.bfloat16, torch.float16):
        adapted = make(tmp_path / str(dtype), "llama", configs, dtype=dtype)
        plan = adapted.base.parent / "plan.json"
        succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "merge", "-o", plan)
        succeeds("merge", plan, "-o", plan.parent / "bundle")
        succeeds("export", plan.parent / "bundle", "--all", "-o", plan.parent / "out")
        for name in configs:
            assert_one_rounding(plan.parent / "out" / name, adapted.merged / name)


def test_a_pickled_adapter_is_the_same(tmp_path: Path) -> None:
    adapted = make(
        tmp_path,
        "gpt2",
        {"a": LORA(r=4, target_modules=["c_attn"]), "b": IA3(target_modules=["c_attn"], feedforward_modules=[])},
    )
    shutil.copytree(adapted.tasks, tmp_path / "bins")
    for name in ("a", "b"):
        (tmp_path / "bins" / name / "adapter_model.safetensors").unlink()
        torch.save(_own(adapted, name), tmp_path / "bins" / name / "adapter_model.bin")
    for mode in ("keep", "merge"):
        out = tmp_path / mode
        succeeds("plan", "--base", adapted.base, "--tasks", tmp_path / "bins", "--adapters", mode, "-o", f"{out}.json")
        succeeds("merge", f"{out}.json", "-o", out)
        assert "sound" in succeeds("inspect", out, "--verify", "--decode").out
        succeeds("export", out, "--all", *(["--merged"] if mode == "keep" else []), "-o", tmp_path / f"{mode}-out")
        assert read_bundle.check(out, "a") > 0
        for name in ("a", "b"):
            assert_one_rounding(tmp_path / f"{mode}-out" / name, adapted.merged / name)


def test_an_unwrapped_base_is_the_adapters_own(tmp_path: Path) -> None:
    adapted = make(tmp_path, "gpt2", {"a": LORA(r=4, target_modules=["c_attn"])})
    state = load_file(adapted.base / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in state.items()}
    save_file(bare, adapted.base / "model.safetensors", {"format": "pt"})
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "-o", tmp_path / "p.json")
    succeeds("merge", tmp_path / "p.json", "-o", tmp_path / "b")
    succeeds("export", tmp_path / "b", "--task", "a", "--merged", "-o", tmp_path / "out")
    assert_one_rounding(tmp_path / "out", adapted.merged / "a")


def test_an_edited_adapter_is_refused(tmp_path: Path) -> None:
    adapted = make(tmp_path, "gpt2", {"a": LORA(r=4, target_modules=["c_attn"])})
    weights = adapted.tasks / "a" / "adapter_model.safetensors"
    sound = weights.read_bytes()
    for mode in ("keep", "merge"):
        plan = tmp_path / f"{mode}.json"
        succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", mode, "-o", plan)
        weights.write_bytes(sound[:-4] + b"\0\0\0\0")
        fails(3, "merge", plan, "-o", tmp_path / mode, says="changed since the plan")
        assert not (tmp_path / mode).exists()
        weights.write_bytes(sound)
    config = adapted.tasks / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    fails(3, "merge", tmp_path / "keep.json", "-o", tmp_path / "b", says="changed since the plan")


def test_a_flipped_byte_of_a_kept_adapter_is_found(tmp_path: Path) -> None:
    adapted = make(
        tmp_path,
        "gpt2",
        {"a": LORA(r=4, target_modules=["c_attn"]), "b": IA3(target_modules=["c_attn"], feedforward_modules=[])},
    )
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "-o", tmp_path / "p.json")
    succeeds("merge", tmp_path / "p.json", "-o", tmp_path / "bundle")
    weights = tmp_path / "bundle" / "tasks" / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    result = flexmerge("inspect", tmp_path / "bundle", "--verify")
    assert (
        result.code == 5
        and "a" in result.err
        and "sound: b" in (result.out + result.err).replace("sound tasks", "sound")
    )
    bundle = open_bundle(tmp_path / "bundle")
    with pytest.raises(IntegrityError, match="adapter_model"):
        dict(bundle.view("a"))
    assert len(dict(bundle.view("b")))
    for more in ((), ("--merged",)):
        fails(5, "export", tmp_path / "bundle", "--task", "a", "-o", tmp_path / "out", *more, says="adapter_model")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["keep", "merge"])
def test_another_base_is_refused_unless_it_is_assumed(mode: str, tmp_path: Path) -> None:
    adapted = make(tmp_path, "gpt2", {"a": LORA(r=4, target_modules=["c_attn"])})
    config = adapted.tasks / "a" / "adapter_config.json"
    fields = json.loads(config.read_text())
    arguments = ["plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", mode]
    for named, same in {
        str(adapted.base): True, "": True, None: True, "org/other": False, "org/base": True, "/nowhere/else": False,
        str(tmp_path): False,
    }.items():  # fmt: skip
        config.write_text(json.dumps(fields | {"base_model_name_or_path": named}))
        if same:
            succeeds(*arguments, "--dry-run")
        else:
            fails(3, *arguments, "--dry-run", says=("adapters trained on another base", str(named), "--assume-base"))
            succeeds(*arguments, "--dry-run", "--assume-base")
    plan = tmp_path / "p.json"
    succeeds(*arguments, "--assume-base", "-o", plan)
    assert json.loads(plan.read_bytes())["settings"]["assume_base"] is True
    succeeds("merge", plan, "-o", tmp_path / "bundle")


def test_a_recipe_says_what_becomes_of_adapters(tmp_path: Path) -> None:
    adapted = make(
        tmp_path, "gpt2", {"a": LORA(r=4, target_modules=["c_attn"]), "b": LORA(r=2, target_modules=["c_attn"])}
    )
    recipe = tmp_path / "recipe.yaml"
    for mode, count in (("merge", 2), ("keep", 0)):
        told = f"adapters: {mode}\nassume_base: true\n"
        recipe.write_text(f"version: 1\nbase: {adapted.base}\ntasks: {{a: tasks/a, b: tasks/b}}\n{told}")
        value = succeeds("plan", recipe, "-o", tmp_path / f"{mode}.json", "--json").json
        plan = json.loads((tmp_path / f"{mode}.json").read_bytes())
        assert len(plan["tasks"]) == count and plan["settings"]["adapters"] == mode
        assert {task["adapter"]["becomes"] for task in value["tasks"]} == {mode}
    recipe.write_text(f"version: 1\nbase: {adapted.base}\ntasks: {{a: tasks/a}}\nadapters: melt\n")
    fails(2, "plan", recipe, "--dry-run", says="adapters")
    fails(2, "plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "melt", "--dry-run", says="melt")


def test_whole_tensors_of_an_adapter_bring_a_warning(tmp_path: Path) -> None:
    adapted = make(tmp_path, "llama", {"a": LORA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])})
    result = succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "-o", tmp_path / "p.json")
    assert "lm_head.weight" in result.err and "vLLM" in result.err
    succeeds("plan", "--base", adapted.base, "--tasks", adapted.tasks, "--adapters", "merge", "-o", tmp_path / "m.json")
    tensors = {tensor["name"]: tensor for tensor in json.loads((tmp_path / "m.json").read_bytes())["tensors"]}
    assert tensors["lm_head.weight"]["class"] == "private"
