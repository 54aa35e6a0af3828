"""`export --as-lora`: a base and an adapter per task, which peft runs side by side to the outputs of the bundle's."""

import json
import shlex
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import make_plan, open_bundle
from flexmerge_cli.allocation.allocate import allocate, servable_found
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.errors import GateError, UsageError
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.request.merge import merge_request

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
    succeeds("plan", "-q", "--base", adapted.base, "--tasks", sources, *more, "-o", root / "plan.json")
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
        ("gpt2", dict.fromkeys("ab", TURNED), "merged", ("--servable", "lora:rank=8")),
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


@pytest.mark.parametrize("module", ["q_proj", "embed_tokens"])
def test_the_adapters_of_a_pool_come_without_a_base(tmp_path, module):
    configs = {name: LORA(r=2, target_modules=[module]) for name in "ab"}
    adapted, bundle = packed(
        tmp_path, "--method", "average", "--size", "1x", configs=configs, more=("--adapters", "pool")
    )
    value = succeeds("export", bundle, "--as-lora", "-o", tmp_path / "out", "--json").json
    assert not (tmp_path / "out/base").exists() and "vllm serve BASE" in value["commands"]["vllm"][0]
    assert "--max-lora-rank 2 " in value["commands"]["sglang"][0]
    succeeds("export", bundle, "--task", "a", "-o", tmp_path / "a")
    assert tree(tmp_path / "out/adapters/a") == tree(tmp_path / "a")
    assert served(adapted, tmp_path / "out/adapters", adapted.base, ["a", "b"]).isfinite().all()


def test_a_task_that_changes_nothing_has_an_adapter_of_zeros(tmp_path):
    adapted = make(tmp_path / "made", "llama", CONFIGS)
    tasks = (f"--task=a={adapted.merged / 'a'}", f"--task=same={adapted.base}")
    succeeds("plan", "-q", "--base", adapted.base, *tasks, "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", *OF_BASE, "-o", tmp_path / "bundle")
    succeeds("export", tmp_path / "bundle", "--as-lora", "-o", tmp_path / "out")
    found = served(adapted, tmp_path / "out/adapters", tmp_path / "out/base", ["same", "a"])
    torch.testing.assert_close(found, of_bundle(tmp_path / "bundle", ["same", "a"]), rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "out/adapters/same/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapters/same/adapter_config.json").read_text())
    assert weights and config["r"] == config["lora_alpha"] == 4


@pytest.mark.parametrize("beside", [(), ("kept",)], ids=["alone", "beside a kept adapter"])
def test_tasks_that_are_one_model_have_adapters_of_zeros(beside, tmp_path):
    """They had rank 0 and no module, which peft refuses."""
    adapted = make(tmp_path / "made", "llama", {"kept": LORA(r=2, target_modules=["q_proj"])})
    tasks = {name: adapted.base if beside else adapted.full(name, 1) for name in ("one", "other")}
    make_plan(adapted.base, tasks | {name: adapted.tasks / name for name in beside}, output=tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--servable", "lora:rank=4", "-o", tmp_path / "bundle")
    said = succeeds("export", tmp_path / "bundle", "--as-lora", "-o", tmp_path / "out").out
    assert f"--max-lora-rank {2 if beside else 1} " in said
    names = ["one", *beside, "other"]
    found = served(adapted, tmp_path / "out/adapters", tmp_path / "out/base", names)
    torch.testing.assert_close(found, of_bundle(tmp_path / "bundle", names), rtol=1e-4, atol=1e-4)


# --servable.


def test_servable_tells_the_rank_of_kept_adapters_alone(tmp_path):
    """It said rank 0 and 0 bytes."""
    adapted = make(tmp_path / "made", "llama", {"a": LORA(r=2, target_modules=["q_proj"]), "b": LORA(r=3)})
    make_plan(adapted.base, {name: adapted.tasks / name for name in "ab"}, output=tmp_path / "plan.json")
    words = ("merge", tmp_path / "plan.json", "--servable", "lora:rank=4", "-o", tmp_path / "bundle", "--dry-run")
    told, largest = succeeds(*words, "--json").json["servable"], adapted.tasks / "b/adapter_model.safetensors"
    assert told["rank"] == 3 and told["adapter_bytes"] == sum(t.nbytes for t in load_file(largest).values())
    assert "an adapter of rank 3 with" in (out := succeeds(*words).out) and "captured energy" not in out


def test_servable_keeps_all_of_merged_loras_and_of_full_fine_tunes_at_least_what_it_predicts(tmp_path):
    """Merged LoRAs have the base as centre and their own rank; for full fine-tunes the average is better."""
    adapted = make(tmp_path / "made", "llama", CONFIGS)
    merged = [f"--task={name}={adapted.merged / name}" for name in "ab"]
    full = [f"--task=full{seed}={adapted.full(f'full{seed}', seed)}" for seed in (1, 2)]
    for name, tasks in (("loras", merged), ("mixed", merged + full)):
        words = ("--statistics", "gram", "-q", "-o", tmp_path / f"{name}.json")
        succeeds("plan", "--base", adapted.base, *tasks, *words)
    merge = ("merge", tmp_path / "loras.json", "--servable", "lora:rank=64")
    told = succeeds(*merge, "--dry-run", "-o", tmp_path / "x", "--json").json
    assert told["servable"]["rank"] == 4 and set(told["servable"]["captured"].values()) == {1.0}
    assert "captured energy" in succeeds(*merge, "--dry-run", "-o", tmp_path / "x").out

    bundle, out = tmp_path / "bundle", tmp_path / "out"
    merge = ("merge", tmp_path / "mixed.json", "--servable", "lora:rank=8")
    told = succeeds(*merge, "-o", bundle, "--json").json
    assert manifest_of(bundle)["request"]["servable"] == "lora:rank=8" and told["servable"]["rank"] == 8
    for name, task in told["tasks"].items():
        assert 1 - task["distance"] ** 2 >= told["servable"]["captured"][name] - 1e-6, name
    assert min(told["servable"]["captured"].values()) > 0.1
    succeeds("export", bundle, "--as-lora", "-o", out)
    size = {path.parent.name: path.stat().st_size for path in out.rglob("*.safetensors")}
    assert size["base"] == pytest.approx(told["servable"]["base_bytes"], abs=8192)
    assert size["full1"] == pytest.approx(told["servable"]["adapter_bytes"], abs=8192)
    names = ["a", "b", "full1", "full2"]
    found = served(adapted, out / "adapters", out / "base", names)
    torch.testing.assert_close(found, of_bundle(bundle, names), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A base with adapters, three full fine-tunes, and the plan of these."""
    root = tmp_path_factory.mktemp("full")
    adapted = make(root / "made", "llama", CONFIGS)
    tasks = {f"t{seed}": adapted.full(f"t{seed}", seed) for seed in range(3)}
    make_plan(adapted.base, tasks, output=root / "plan.json", statistics="gram")
    return adapted, tasks, root / "plan.json"


def test_servable_takes_the_largest_rank_that_fits_the_size(full):
    pricer = Pricer(load_plan(full[2]))

    def found(size=None):
        return servable_found(pricer, merge_request(servable="lora:rank=16", size=size))

    largest = found()
    one = pricer.plan.one_model_bytes
    sizes = [1, 1.3, 1.8, largest.layout.tensor_bytes / one]
    ranks = [found(f"{factor:.6f}x").rank for factor in sizes]
    assert ranks == sorted(set(ranks)) and ranks[0] == 0 and ranks[-1] == largest.rank > 8
    assert all(found(f"{factor:.6f}x").layout.tensor_bytes <= (factor + 1e-6) * one for factor in sizes)
    on_disk = found(f"{largest.layout.total_bytes - 1}B")
    assert on_disk.layout.total_bytes < largest.layout.total_bytes and on_disk.rank >= largest.rank - 1
    with pytest.raises(GateError, match=r"its smallest is 1\.0000x"):
        found("0.5x")


def test_servable_names_the_tensor_that_no_engine_can_serve(full, tmp_path):
    adapted, tasks, _ = full
    asked = merge_request(servable="lora")
    heads = make_plan(adapted.base, tasks, private=("*lm_head*",), statistics="gram")
    with pytest.raises(UsageError, match=r"lm_head.weight` is each task's own"):
        allocate(heads, asked)
    mixed = {"kept": adapted.tasks / "a", "t0": tasks["t0"]}
    kept = make_plan(adapted.base, mixed, statistics="gram")
    with pytest.raises(UsageError, match="over which adapters are kept"):
        allocate(kept, asked)
    over_base = {"kept": adapted.tasks / "a", "a": adapted.merged / "a", "b": adapted.merged / "b"}
    found = servable_found(Pricer(make_plan(adapted.base, over_base, statistics="gram")), asked)
    assert {use.text for use in found.layout.allocation.methods} == {"low_rank:rank=4,fraction=null,centre=base"}
    assert found.captured_M.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("adapter", "says"), [
    (LORA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head.weight` is saved whole by an adapter"),
    (IA3(task_type="CAUSAL_LM"), "down_proj.weight` is multiplied by an adapter"),
], ids=["whole", "(IA)³"])  # fmt: skip
def test_servable_refuses_the_kept_adapters_that_no_export_as_lora_takes(adapter, says, tmp_path):
    adapted = make(tmp_path, "llama", {"a": LORA(r=2, target_modules=["q_proj"]), "b": adapter})
    plan = make_plan(adapted.base, {name: adapted.tasks / name for name in "ab"}, statistics="gram")
    with pytest.raises(UsageError, match=says):
        allocate(plan, merge_request(servable="lora"))


def test_servable_refuses_a_kept_adapter_of_a_larger_rank(tmp_path):
    """Its rank was not looked at, and engines that are started for the one that was asked for refuse it."""
    adapted = make(tmp_path, "llama", CONFIGS)
    plan = make_plan(adapted.base, {name: adapted.tasks / name for name in "ab"}, statistics="gram")
    with pytest.raises(UsageError, match="task `b` is kept as an adapter of rank 4, and --servable allows 3"):
        allocate(plan, merge_request(servable="lora:rank=3"))
    allocate(plan, merge_request(servable="lora:rank=4"))


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
def test_what_is_not_low_rank_is_refused_by_its_first_tensor_and_nothing_is_written(what, full, tmp_path):
    configs, options, tensor, is_full = REFUSED[what]
    plan = full[2]
    if not is_full:
        adapted, plan = make(tmp_path / "made", "llama", configs), tmp_path / "plan.json"
        succeeds("plan", "-q", "--base", adapted.base, "--tasks", adapted.tasks, "-o", plan)
    succeeds("merge", plan, *options, "-o", tmp_path / "bundle")
    done = fails(2, "export", tmp_path / "bundle", "--as-lora", "-o", tmp_path / "out", says=(tensor, "LoRA"))
    first = next(t["name"] for t in manifest_of(tmp_path / "bundle")["tensors"] if t["name"] in done.err)
    assert first.endswith(tensor) and not (tmp_path / "out").exists()


def test_other_options_have_no_meaning_beside_it(tmp_path):
    _, bundle = packed(tmp_path)
    for more in (["--task", "a"], ["--all"], ["--link"], ["--merged"]):
        fails(2, "export", bundle, "--as-lora", *more, "-o", tmp_path / "out", says="--as-lora exports all tasks")
