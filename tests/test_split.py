"""Blocks finer than a tensor: heads of an attention, groups of neurons of an MLP, each merged as a block of its own."""

from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import OrderSettings, export, load_plan, make_plan, merge, open_bundle, verify
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.view import View
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.evaluation.in_memory import MemoryBundles
from flexmerge_cli.evaluation.models import base_model, bundle_model
from flexmerge_cli.evaluation.planned import planned_models
from flexmerge_cli.family.split import Split, check_splits
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.request.merge import merge_request
from samples import read_bundle

from .families import LAYOUTS, ODD, assert_same_state, normal, plain, write_checkpoint, write_family
from .program import fails, succeeds
from .test_golden_bundles import PEFT, write_adapter

PARTS = 4
RULES = f"""
split:
  - match: [attention.self.query, intermediate.dense]
    parts: {PARTS}
  - {{match: output.dense, parts: {PARTS}, dim: 1}}
"""
ROWS, COLUMNS = (
    ("attention.self.query.weight", "attention.self.query.bias", "intermediate.dense.weight"),
    "output.dense",
)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "split.yaml"
    path.write_text(RULES)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, rules):
    found = write_family(tmp_path_factory.mktemp("family"), plain())
    succeeds("plan", "-q", *found.arguments, "--blocks", rules, "-o", found.root / "plan.json")
    return found


def merged(folders, to, *options):
    succeeds("merge", folders.root / "plan.json", "-o", to, *options)
    return to


def exported(bundle, to, task):
    succeeds("export", bundle, "--task", task, "-o", to)
    return load_file(to / "model.safetensors")


# The reference: slices cut out with torch, and Algorithm 1 over them, written down once more.


def blocks_by_hand(state):
    """Name of a block -> its slices, as (tensor, slice)."""
    everything, found = slice(None), {}
    for name, value in state.items():
        layer = (
            name.rpartition("attention" if "attention" in name else "intermediate")[0] or name.rpartition("output")[0]
        )
        kind = "attention" if "query" in name else "mlp"
        if name.endswith(ROWS):
            size = value.shape[0] // PARTS
            cuts = [(slice(place * size, (place + 1) * size),) for place in range(PARTS)]
        elif COLUMNS in name:
            size = value.shape[1] // PARTS
            cuts = [(everything, slice(place * size, (place + 1) * size)) for place in range(PARTS)]
        else:
            found[name] = [(name, (everything,))]
            continue
        for place, cut in enumerate(cuts):
            found.setdefault(f"{layer}{kind} {place}", []).append((name, cut))
    return found


def merged_by_hand(models, num_merges):
    """The models after so many greedy merges by complete linkage of cosines, each group at its mean."""
    names, blocks = list(models.tasks), blocks_by_hand(models.base)

    def vector(block, task):
        return torch.cat([(models.tasks[task][t] - models.base[t])[cut].flatten() for t, cut in blocks[block]]).double()

    cosines = {}
    for block in blocks:
        vectors = torch.stack([vector(block, task) for task in names])
        cosines[block] = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], -1)
    groups = {block: [(place,) for place in range(len(names))] for block in blocks}
    for _ in range(num_merges):
        _, block, a, b = max(
            (min(float(cosines[block][i, j]) for i in a for j in b), block, a, b)
            for block in blocks
            for a, b in combinations(groups[block], 2)
        )
        groups[block] = [group for group in groups[block] if group not in (a, b)] + [tuple(sorted(a + b))]
    found = {name: {tensor: value.clone() for tensor, value in models.base.items()} for name in names}
    for block, of_block in groups.items():
        for group in of_block:
            for tensor, cut in blocks[block]:
                mean = torch.stack([models.tasks[names[place]][tensor][cut].double() for place in group]).mean(0)
                for place in group:
                    found[names[place]][tensor][cut] = mean.float()
    return found


@pytest.mark.parametrize("num_merges", [1, 17, 40, 60, 69])
def test_slices_merge_as_in_a_reference_that_cuts_them_itself(folders, tmp_path, num_merges):
    bundle = merged(folders, tmp_path / "bundle", "--method", "average", "--merges", num_merges)
    view = open_bundle(bundle)
    for task, expected in merged_by_hand(folders.models, num_merges).items():
        found = dict(view.view(task))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=3e-7)


def test_a_slice_of_a_layer_is_one_block_of_rows_and_columns(folders):
    blocks = {block.name: set(block.tensors) for block in load_plan(folders.root / "plan.json").blocks}
    path = "encoder.layer.0"
    assert blocks[f"{path}.mlp@part2"] == {
        f"{path}.intermediate.dense.weight@part2",
        f"{path}.output.dense.weight@part2",
    }
    assert blocks[f"{path}.attention@part3"] == {f"{path}.attention.self.query.{w}@part3" for w in ("weight", "bias")}
    assert len(blocks) == len(blocks_by_hand(folders.models.base))


@pytest.mark.parametrize(
    "name, layout",
    [
        *(("bf16", layout) for layout in LAYOUTS),
        *((name, "file") for name in ("mixed_dtypes", "wrapped_tasks", "constants", "duplicates", "tied")),
    ],
)
def test_models_come_back_bit_by_bit(tmp_path, rules, name, layout):
    folders = write_family(tmp_path, ODD[name](), layout=layout)
    succeeds("plan", "-q", *folders.arguments, "--blocks", rules, "-o", tmp_path / "plan.json")
    bundle = merged(folders, tmp_path / "bundle")
    assert verify(bundle, decode=True).broken_tasks == ()
    opened = open_bundle(bundle)
    for task, state in folders.models.tasks.items():
        assert_same_state(dict(opened.view(task)), state)
        assert opened.manifest.tasks[task].exact
    task = next(iter(folders.models.tasks))
    assert_same_state(exported(bundle, tmp_path / "out", task), folders.models.tasks[task])


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "auto", "--size", "1.5x"),
        ("--method", "residual-2bit"),
        ("--method", "emr"),
        ("--method", "ties", "--size", "2x"),
        ("--method", "tsv_m", "--size", "2x"),
        ("--method", "average", "--cluster", "channels", "--size", "2x"),
        ("--method", "average", "--method-for", "*.mlp@part0=keep"),
        ("--dtype", "bf16"),
    ],
)
def test_every_way_to_read_a_bundle_joins_the_parts(folders, tmp_path, options):
    bundle = merged(folders, tmp_path / "bundle", *options)
    assert verify(bundle, decode=True).broken_tasks == ()
    opened = open_bundle(bundle)
    assert not (bundle / "tasks/task1/model.safetensors").exists()
    state = dict(opened.view("task1"))
    shapes = {name: value.shape for name, value in folders.models.tasks["task1"].items()}
    assert {name: value.shape for name, value in state.items()} == shapes
    assert_same_state(exported(bundle, tmp_path / "out", "task1"), state)
    alone = read_bundle.read_task(bundle, "task1")
    assert {name: bits.tobytes() for name, (_, bits) in alone.items()} == {
        name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in state.items()
    }
    assert "@part0" in succeeds("inspect", bundle, "--json").out
    fails(2, "export", bundle, "--task", "task1", "-o", tmp_path / "linked", "--link", says="decoded")
    fails(2, "export", bundle, "--as-lora", "-o", tmp_path / "lora", says="is stored in parts")
    # What `curve` scores is what `merge` writes.
    plan = load_plan(folders.root / "plan.json")
    sources = open_sources(plan, folders.root)
    words = dict(zip((word.strip("-").replace("-", "_") for word in options[::2]), options[1::2]))
    words |= {"method_for": (words["method_for"],)} if "method_for" in words else {}
    made = MemoryBundles(sources=sources.located, device=torch.device("cpu"), threads=1)
    held = made.bundle(allocate(plan, merge_request(**words)), range(len(plan.tasks)))
    assert_same_state(dict(View(held, "task1")), state)
    assert bundle_model(held, "task1").digest == bundle_model(Bundle.open(bundle), "task1").digest


@pytest.mark.parametrize("name", ["bf16", "constants"])
def test_references_are_the_sources_and_the_base(tmp_path, rules, name):
    folders = write_family(tmp_path, ODD[name]())
    succeeds("plan", "-q", *folders.arguments, "--blocks", rules, "-o", tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    bundle = Bundle.open(merged(folders, tmp_path / "bundle"))
    sources = open_sources(plan, tmp_path)
    fine_tuned, base = planned_models(plan, sources.located, sources.folders(plan), ["task0"])
    assert_same_state(dict(fine_tuned["task0"].weights), folders.models.tasks["task0"])
    assert fine_tuned["task0"].digest == bundle_model(bundle, "task0").digest
    of_bundle = base_model(bundle, "task0", open_checkpoint(str(folders.base)), {})
    shared = {tensor.name for tensor in plan.tensors if tensor.class_ == "constant"}
    state = folders.models
    expected = {
        n: state.tasks["task0"][n] if n in shared or f"{n}@part0" in shared else v for n, v in state.base.items()
    }
    assert_same_state(dict(base["task0"].weights), expected)
    assert_same_state(dict(of_bundle.weights), expected)
    assert of_bundle.digest == base["task0"].digest


def test_merged_adapters_are_split_and_others_refuse(tmp_path, rules):
    base = plain().base
    write_checkpoint(tmp_path / "base", base)
    shapes = {"intermediate.dense": (16, 8), "output.dense": (8, 16)}
    for number in range(3):
        factors = {}
        for module, (rows, columns) in shapes.items():
            path = f"{PEFT}.encoder.layer.0.{module}"
            factors[f"{path}.lora_A.weight"] = normal(10 + number, 2, columns)
            factors[f"{path}.lora_B.weight"] = normal(20 + number, rows, 2)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(shapes)}
        write_adapter(tmp_path / "tasks" / f"task{number}", factors, config)
    sources = ("--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "--assume-base")
    for kind in ("keep", "pool"):
        fails(2, "plan", *sources, "--blocks", rules, "--adapters", kind, "-o", tmp_path / "no.json", says="split")
    states = {}
    for kind, blocks in (("whole", "component"), ("split", rules)):
        succeeds("plan", "-q", *sources, "--adapters", "merge", "--blocks", blocks, "-o", tmp_path / f"{kind}.json")
        succeeds("merge", tmp_path / f"{kind}.json", "-o", tmp_path / kind)
        states[kind] = dict(open_bundle(tmp_path / kind).view("task1"))
    assert_same_state(states["split"], states["whole"])


def test_other_blocks_of_the_same_measurements(folders, tmp_path, rules):
    """Whole blocks merge what is in a tensor's parts together; another split needs the weights."""
    plan = folders.root / "plan.json"
    succeeds("plan", "-q", *folders.arguments, "-o", tmp_path / "whole.json")
    succeeds("plan", "-q", plan, "--blocks", "component", "-o", tmp_path / "joined.json")
    whole, joined = load_plan(tmp_path / "whole.json"), load_plan(tmp_path / "joined.json")
    assert [block.name for block in joined.blocks] == [block.name for block in whole.blocks]
    assert [(m.block, m.left, m.right) for m in joined.order] == [(m.block, m.left, m.right) for m in whole.order]
    succeeds("plan", "-q", tmp_path / "joined.json", "--blocks", rules, "-o", tmp_path / "again.json")
    again = load_plan(tmp_path / "again.json")
    assert (again.order, again.blocks) == (load_plan(plan).order, load_plan(plan).blocks)
    (tmp_path / "other.yaml").write_text(RULES.replace(f"parts: {PARTS}", "parts: 2"))
    fails(2, "plan", plan, "--blocks", tmp_path / "other.yaml", "-o", tmp_path / "no.json", says="splits other tensors")
    fails(2, "plan", tmp_path / "whole.json", "--blocks", rules, "-o", tmp_path / "no.json", says="from its sources")


def test_a_task_is_added_to_and_removed_from_a_plan_with_splits(folders, tmp_path, rules):
    wanted = folders.root / "plan.json"
    some = [word for name, path in list(folders.tasks.items())[:3] for word in ("--task", f"{name}={path}")]
    last = folders.tasks["task3"]
    for plan, sources in (("fewer", some), ("none", [*some[2:], "--task", f"task3={last}"])):
        succeeds("plan", "-q", "--base", folders.base, *sources, "--blocks", rules, "-o", tmp_path / f"{plan}.json")
    succeeds(
        "plan", tmp_path / "fewer.json", "--add", f"task3={last}", "--blocks", rules, "-o", tmp_path / "added.json"
    )
    added, whole = load_plan(tmp_path / "added.json"), load_plan(wanted)
    assert (added.tensors, added.splits, added.order) == (whole.tensors, whole.splits, whole.order)
    succeeds("plan", "-q", wanted, "--remove", "task0", "--blocks", rules, "-o", tmp_path / "removed.json")
    removed, fresh = load_plan(tmp_path / "removed.json"), load_plan(tmp_path / "none.json")
    assert (removed.tensors, removed.order) == (fresh.tensors, fresh.order)


@pytest.mark.parametrize(
    "text, says",
    [
        ("split:\n  - {match: query, parts: 3}", ("`encoder.layer.0.attention.self.query.weight` [8, 8]", "8", "3")),
        ("split:\n  - {match: output.dense, parts: 5, dim: 1}", ("16", "5")),
        ("split:\n  - {match: nowhere, parts: 2}", "no tensor"),
        ("split:\n  - {match: query, parts: 1}", "`1`"),
        ("split:\n  - {match: query, parts: x}", "`x`"),
        ("split:\n  - {match: query, parts: 2, dim: 2}", "`2`"),
        ("split:\n  - {match: query}", "without `parts`"),
        ("split:\n  - {parts: 2}", "without `match`"),
        ("split: {query: 2}", "list"),
        ("split: []", "list"),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_weights_are_read(folders, tmp_path, text, says):
    (tmp_path / "rules.yaml").write_text(text)
    arguments = ("plan", *folders.arguments, "--blocks", tmp_path / "rules.yaml", "-o", tmp_path / "no.json")
    fails(2, *arguments, says=("rules.yaml", *((says,) if isinstance(says, str) else says)))
    assert not (tmp_path / "no.json").exists()


def test_a_checkpoint_with_a_name_of_a_part_is_refused(tmp_path):
    models = plain()
    models.base["pooler.dense.weight@part0"] = models.base["pooler.dense.weight"].clone()
    folders = write_family(tmp_path, models)
    fails(3, "plan", *folders.arguments, "-o", tmp_path / "plan.json", says="pooler.dense.weight@part0")


def test_a_dry_run_has_the_splits(folders, rules):
    succeeds("plan", "-q", *folders.arguments, "--blocks", rules, "--dry-run")
    assert load_plan(folders.root / "plan.json").splits[0].parts == PARTS


@pytest.mark.parametrize("options", [{"method": "average", "size": "2x"}, {"method": "low_bit:bits=2"}])
def test_models_and_runtimes_have_whole_tensors(tmp_path, options):
    pytest.importorskip("transformers")
    from .transformers_families import FAMILIES, TASKS, make, outputs

    family = FAMILIES["bert with its prefix"]
    make(family, tmp_path)
    (tmp_path / "split.yaml").write_text(
        RULES.replace(f"parts: {PARTS}", "parts: 2").replace("query", "query|key|value")
    )
    sources = {task: tmp_path / "tasks" / task for task in TASKS}
    order = OrderSettings(blocks=str(tmp_path / "split.yaml"))
    plan = make_plan(tmp_path / "base", sources, output=tmp_path / "plan.json", order=order)
    assert len(plan.splits) > 6
    merge(tmp_path / "plan.json", tmp_path / "bundle", **options)
    bundle = open_bundle(tmp_path / "bundle")
    dense, packed = bundle.runtime(), bundle.runtime(weights="packed")
    for task in TASKS:
        expected = outputs(family, bundle.model(task))
        export(tmp_path / "bundle", task, tmp_path / task)
        assert torch.equal(outputs(family, family.task.from_pretrained(tmp_path / task).eval()), expected)
        assert torch.equal(outputs(family, dense.model(task)), expected)
        assert torch.allclose(outputs(family, packed.model(task)), expected, atol=1e-5)


FORM = {"a": ("F32", (2, 4))}


@pytest.mark.parametrize(
    "forms",
    [
        {"x@part0": FORM},
        {"x@part0": FORM, "x@part1": {"a": ("F32", (3, 4))}},
        {"x@part0": FORM, "x@part1": FORM, "x": FORM},
        {"x@part0": FORM, "x@part1": FORM, "x@part2": FORM},
        {"x@part0": FORM, "x@part1": FORM, "y@part0": FORM},
        {"x@part0": {"a": ("F32", ())}, "x@part1": {"a": ("F32", ())}},
    ],
)
def test_files_whose_parts_do_not_make_a_tensor_are_unsound(forms):
    split = Split(tensor="x", dim=0, parts=2)
    check_splits([split], {"x@part0": FORM, "x@part1": FORM})
    with pytest.raises(ValueError, match=r"part|split"):
        check_splits([split], forms)
