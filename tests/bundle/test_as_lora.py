"""`export --as-lora`: a base and an adapter per task, which peft runs side by side to the outputs of the bundle's."""

import json
import shlex
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import open_bundle

from ..adapters import IA3, LORA, Adapted, make
from ..program import fails, succeeds, tree
from .bundles import manifest_of

CONFIGS = {"a": LORA(r=2, target_modules=["q_proj", "down_proj"]), "b": LORA(r=4, target_modules=["v_proj"])}
TURNED = LORA(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
OF_BASE = ("--method", "low_rank:rank=4,centre=base")


def packed(root: Path, *options: object, kind="llama", configs=CONFIGS, of="tasks", more=()) -> tuple[Adapted, Path]:
    """A bundle of adapters, or (of="merged") of the full models that they make."""
    adapted = make(root / "made", kind, configs)
    sources = {"tasks": adapted.tasks, "merged": adapted.merged}[of]
    succeeds("plan", "--base", adapted.base, "--tasks", sources, *more, "-o", root / "plan.json")
    succeeds("merge", root / "plan.json", *options, "-o", root / "bundle")
    return adapted, root / "bundle"


def served(adapted: Adapted, folder: Path, base: Path, names) -> torch.Tensor:
    """Logits of one batch whose rows are of different adapters, [rows, …]."""
    model = peft.PeftModel.from_pretrained(adapted.model(base), folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    words = torch.randint(0, 50, (len(names), 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=words, adapter_names=list(names)).logits


def of_bundle(bundle: Path, names) -> torch.Tensor:
    words = torch.randint(0, 50, (len(names), 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = [open_bundle(bundle).model(name)(input_ids=words[[row]]).logits for row, name in enumerate(names)]
    return torch.cat(found)


@pytest.mark.parametrize(
    ("kind", "configs", "of", "options"),
    [
        ("llama", CONFIGS, "tasks", ()),
        ("llama", CONFIGS, "merged", OF_BASE),
        ("llama", CONFIGS, "merged", ("--method", "low_rank:rank=2,centre=average")),
        ("gpt2", dict.fromkeys("ab", TURNED), "merged", OF_BASE),
    ],
    ids=["kept adapters", "over the base", "over the average", "weights of [in, out]"],
)  # fmt: skip
def test_a_batch_of_mixed_adapters_gives_what_the_models_of_the_bundle_give(kind, configs, of, options, tmp_path):
    adapted, bundle = packed(tmp_path, *options, kind=kind, configs=configs, of=of)
    value = succeeds("export", bundle, "--as-lora", "-o", tmp_path / "out", "--json").json
    assert set(value["commands"]) == {"vllm", "sglang", "peft"}
    names = ["a", "b", "a"]
    found = served(adapted, tmp_path / "out/adapters", tmp_path / "out/base", ["a", "b"])
    expected = of_bundle(bundle, names[:2])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], adapted.logits(adapted.model())[0], atol=1e-3)
    if of == "tasks":
        assert tree(tmp_path / "out/adapters/a") == tree(adapted.tasks / "a")


def test_the_lines_of_each_engine_name_base_rank_and_adapters(tmp_path):
    _, bundle = packed(tmp_path)
    out = tmp_path / "their own"
    said = succeeds("export", bundle, "--as-lora", "-o", out).out
    named = ["--lora-modules", f"a={out}/adapters/a", f"b={out}/adapters/b"]
    vllm, sglang = (
        shlex.split(next(line for line in said.splitlines() if word in line)) for word in ("vllm serve", "sglang.")
    )
    serve = ["serve", f"{out}/base", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    assert vllm[-len(serve) - len(named) :] == [*serve, *named]
    launch = ["--model-path", f"{out}/base", "--enable-lora", "--max-loras-per-batch", "3", "--max-lora-rank", "4"]
    assert sglang[-len(launch) - len(named) :] == [*launch, "--lora-paths", *named[1:]]
    assert f"PeftModel.from_pretrained(base, '{out}/adapters/a', adapter_name='a')" in said
    before = tree(out)
    fails(2, "export", bundle, "--as-lora", "-o", out, says="exists")
    succeeds("export", bundle, "--as-lora", "-o", out, "--force")
    assert tree(out) == before
    (out / "notes").write_text("ours")
    fails(2, "export", bundle, "--as-lora", "-o", out, "--force", says="notes")


def test_the_adapters_of_a_pool_come_without_a_base(tmp_path):
    configs = {name: LORA(r=2, target_modules=["q_proj"]) for name in "ab"}
    adapted, bundle = packed(
        tmp_path, "--method", "average", "--size", "1x", configs=configs, more=("--adapters", "pool")
    )
    value = succeeds("export", bundle, "--as-lora", "-o", tmp_path / "out", "--json").json
    assert not (tmp_path / "out/base").exists() and "vllm serve BASE" in value["commands"]["vllm"][0]
    succeeds("export", bundle, "--task", "a", "-o", tmp_path / "a")
    assert tree(tmp_path / "out/adapters/a") == tree(tmp_path / "a")
    assert served(adapted, tmp_path / "out/adapters", adapted.base, ["a", "b"]).isfinite().all()


def test_a_task_that_changes_nothing_has_an_adapter_of_zeros(tmp_path):
    adapted = make(tmp_path / "made", "llama", CONFIGS)
    tasks = (f"--task=a={adapted.merged / 'a'}", f"--task=same={adapted.base}")
    succeeds("plan", "--base", adapted.base, *tasks, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", *OF_BASE, "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--as-lora", "-o", tmp_path / "out")
    found = served(adapted, tmp_path / "out/adapters", tmp_path / "out/base", ["same", "a"])
    torch.testing.assert_close(found, of_bundle(tmp_path / "bundle", ["same", "a"]), rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "out/adapters/same/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapters/same/adapter_config.json").read_text())
    assert weights and config["r"] == config["lora_alpha"] == 4


# What is not low rank.


REFUSED = {
    "copies of fine-tunes": ({}, (), "lm_head.weight", True),
    "masks": ({}, ("--method", "emr"), "lm_head.weight", True),
    "bits": ({}, ("--method", "low_bit:bits=2,centre=base"), "lm_head.weight", True),
    "a vector of (IA)³": ({"a": IA3(task_type="CAUSAL_LM")}, (), "down_proj.weight", False),
    "what an adapter saves whole": (
        {"a": LORA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])}, (), "lm_head.weight", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_low_rank_is_refused_by_its_first_tensor_and_nothing_is_written(what, tmp_path):
    configs, options, tensor, full = REFUSED[what]
    adapted = make(tmp_path / "made", "llama", configs)
    sources = [f"--task=t{n}={adapted.full(f't{n}', n)}" for n in range(3)] if full else ["--tasks", adapted.tasks]
    succeeds("plan", "--base", adapted.base, *sources, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", *options, "-o", tmp_path / "bundle")
    done = fails(2, "export", tmp_path / "bundle", "--as-lora", "-o", tmp_path / "out", says=(tensor, "LoRA"))
    first = next(t["name"] for t in manifest_of(tmp_path / "bundle")["tensors"] if t["name"] in done.err)
    assert first.endswith(tensor) and not (tmp_path / "out").exists()


def test_other_options_have_no_meaning_beside_it(tmp_path):
    _, bundle = packed(tmp_path)
    for more in (["--task", "a"], ["--all"], ["--link"], ["--merged"]):
        fails(2, "export", bundle, "--as-lora", *more, "-o", tmp_path / "out", says="--as-lora exports all tasks")
