"""`--method auto` from sources to decoded tensors: bundles are what the layout says, and give what was promised."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexmerge_cli import load_plan, make_plan, merge, open_bundle, verify
from flexmerge_cli.allocation import auto_statistics
from flexmerge_cli.allocation.auto_allocation import auto
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.size import parse_size

from .allocation.test_auto import single_improvements
from .allocation.test_auto_golden import as_golden
from .families import Models, encoder, normal, plain, same_bits, tuned, write_family
from .program import ROOT, fails, stored_sizes, succeeds, tree

GOLDEN = Path(__file__).parent / "golden"
AUTO = json.loads((GOLDEN / "auto.json").read_text())
DECODED = AUTO["decoded"]
PLAIN_BYTES = 4 * sum(value.numel() for value in encoder().values())


def planned(models: Models, folder: Path) -> Path:
    folders = write_family(folder, models)
    make_plan(folders.base, folders.sources, output=folder / "plan.json", device="cpu")
    return folder / "plan.json"


def on_disk(bundle: Path) -> int:
    return sum(stored_sizes(bundle).values())


def pricer_of(plan: Path) -> Pricer:
    return Pricer(load_plan(plan)).asked(merge_request(method="auto"))


def search_of(plan: Path, **limits):
    return auto(pricer_of(plan), Limits(**limits))


def standalone():
    """samples/read_bundle.py as a module."""
    spec = importlib.util.spec_from_file_location("read_bundle", ROOT / "samples/read_bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_sound(bundle: Path, models: Models):
    """Both readers give what was written, in every task's own dtypes; what does not merge is the task's, bit by bit."""
    assert verify(bundle, decode=True).bad == {}
    opened, reader = open_bundle(bundle), standalone()
    kinds = {tensor.name: tensor.class_ for tensor in opened.manifest.tensors}
    for task, state in models.tasks.items():
        view = opened.view(task)
        assert sorted(view) == sorted(state)
        assert reader.check(bundle, task) == len(state)
        own = opened.manifest.tasks[task].names
        for tensor in opened.manifest.tensors:
            if task in tensor.digests:
                key = own.get(tensor.name, tensor.name)
                assert (view[key].dtype, view[key].shape) == (state[key].dtype, state[key].shape)
                if kinds[tensor.of or tensor.name] != "mergeable":
                    assert same_bits(view[key], state[key]), key


def measured_distance(bundle: Path, models: Models, task: str) -> float:
    view, state = open_bundle(bundle).view(task), models.tasks[task]
    lost = sum(float((view[name].double() - state[name].double()).square().sum()) for name in models.base)
    energy = sum(float((state[name].double() - models.base[name].double()).square().sum()) for name in models.base)
    return (lost / energy) ** 0.5


# The golden family


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    tasks = {path.name: path for path in sorted((GOLDEN / "family/tasks").iterdir())}
    make_plan(GOLDEN / "family/base", tasks, output=folder / "plan.json", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            auto_statistics.TensorStatistics, "price", lambda _, loss: loss
        )  # the reference minimises squared error
        merge(folder / "plan.json", folder / "bundle", method="auto", size=f"{DECODED['budget']}x", device="cpu")
    return folder


def test_the_golden_plan_leads_to_the_golden_choices(golden, monkeypatch):
    monkeypatch.setattr(auto_statistics.TensorStatistics, "price", lambda _, loss: loss)
    monkeypatch.setattr(
        auto_statistics, "RUNS", {}
    )  # the reference minimises squared error, and knows no codes of less than one bit
    search = search_of(golden / "plan.json", scales="bfloat16").search
    assert search.smallest_bytes == AUTO["smallest"]
    for case in AUTO["allocations"].values():
        found = search.solve(case["budget"])
        assert {choice.tensor: as_golden(choice) for choice in found.choices} == case["tensors"]
        assert found.num_bytes == case["bytes"]


@pytest.mark.parametrize("name", DECODED["tensors"])
@pytest.mark.parametrize("task", DECODED["tasks"])
def test_the_golden_bundle_has_the_golden_parts_and_weights(name, task, golden):
    bundle = open_bundle(golden / "bundle")._bundle
    parts = {part: stored for file in bundle.parts.values() for part, stored in file.items()}
    for role, expected in DECODED["parts"][f"{name}/{task}"].items():
        assert bundle.bits(parts[f"{name}@{role}.{task}"]).tobytes().hex().startswith(expected)
    weights = load_file(GOLDEN / "auto.safetensors")[f"{name}/{task}"]
    found = open_bundle(golden / "bundle").view(task)[name].numpy()
    assert found == pytest.approx(weights, rel=0, abs=1e-6 * float(np.abs(weights).max()))


def test_the_golden_bundle_has_the_golden_bytes(golden):
    stored = open_bundle(golden / "bundle").manifest.stored_bytes
    assert stored == AUTO["allocations"][DECODED["budget"]]["bytes"]


# Sizes


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_no_better_choice_of_one_tensor_fits_a_target_on_disk(num_tasks, tmp_path):
    """Every choice by brute force, at the bytes that its layout has, headers and small files among them."""
    auto_of = search_of(planned(plain(num_tasks=num_tasks, layers=1, width=16), tmp_path))
    one = auto_of.plan.one_model_bytes
    least, most = auto_of.smallest().layout.total_bytes, auto_of.exact().layout.total_bytes
    for target in np.linspace(least, most, 6).astype(int)[:-1]:
        found = auto_of.cut(parse_size(f"{target}B").target(num_tasks=num_tasks, one_model_bytes=one))
        assert found.layout.total_bytes <= target
        for better in single_improvements(auto_of.search, found.solution):
            assert auto_of._found(better).layout.total_bytes > target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bundles_are_what_the_layout_says_and_never_over(dtype, tmp_path):
    plan = planned(plain(dtype), tmp_path)
    search = search_of(plan)
    smallest, one = search.smallest().layout, load_plan(plan).one_model_bytes
    largest = 4 * one
    for number, tensor_bytes in enumerate(np.linspace(smallest.tensor_bytes, largest, 10)):
        size = f"{-(-tensor_bytes * 1000 // one) / 1000}x"
        if number == 9:
            size = "4x"
        layout = search.cut(parse_size(size).target(num_tasks=4, one_model_bytes=one)).layout
        merge(plan, tmp_path / size, method="auto", size=size, device="cpu")
        assert on_disk(tmp_path / size) == layout.total_bytes
        assert open_bundle(tmp_path / size).manifest.stored_bytes == layout.tensor_bytes <= float(size[:-1]) * one
    for target in np.linspace(
        smallest.total_bytes,
        search.cut(parse_size("4x").target(num_tasks=4, one_model_bytes=one)).layout.total_bytes,
        10,
    ).astype(int):
        layout = search.cut(parse_size(f"{target}B").target(num_tasks=4, one_model_bytes=one)).layout
        merge(plan, tmp_path / f"{target}B", method="auto", size=f"{target}B", device="cpu")
        assert on_disk(tmp_path / f"{target}B") == layout.total_bytes <= target


def test_all_apart_is_exact(tmp_path):
    models = plain()
    merge(planned(models, tmp_path), tmp_path / "bundle", method="auto", size="4x", device="cpu")
    opened = open_bundle(tmp_path / "bundle")
    assert all(entry.exact and entry.distance == 0 for entry in opened.manifest.tasks.values())
    assert all(
        same_bits(opened.view(t)[name], value) for t, state in models.tasks.items() for name, value in state.items()
    )


def test_the_smallest_size_is_named_and_reached(tmp_path):
    """The weights outweigh all else here; of smaller models exact copies may be the smallest on disk."""
    plan = planned(plain(width=32), tmp_path)
    result = fails(6, "merge", plan, "--method", "auto", "--size", "0.1x", "-o", tmp_path / "b", says="its smallest is")
    named = result.err.split("hint: --size ")[1].split(",")[0]
    succeeds("merge", plan, "--method", "auto", "--size", named, "-o", tmp_path / "b")
    result = fails(6, "merge", plan, "--method", "auto", "--size", "1B", "-o", tmp_path / "c", says="its smallest is")
    num_bytes = int(result.err.split("B on disk")[0].split()[-1])
    fails(
        6,
        "merge",
        plan,
        "--method",
        "auto",
        "--size",
        f"{num_bytes - 1}B",
        "-o",
        tmp_path / "c",
        says="its smallest is",
    )
    succeeds("merge", plan, "--method", "auto", "--size", f"{num_bytes}B", "-o", tmp_path / "c")
    assert on_disk(tmp_path / "c") == num_bytes


def test_without_a_size_predicted_distances_stay_under_the_limit(tmp_path):
    models = plain(width=64)
    plan, sizes = planned(models, tmp_path), []
    for limit in (None, 0.1, 0.5):
        chosen = ["--max-distance", str(limit)] if limit else []
        bundle = tmp_path / str(limit)
        told = succeeds("merge", plan, "--method", "auto", *chosen, "-o", bundle, "--json").json
        assert max(told["auto"]["distance"].values()) <= (limit or 0.35)
        assert max(measured_distance(bundle, models, task) for task in models.tasks) <= (limit or 0.37)
        sizes.append(told["factor"])
    assert sizes[1] > sizes[0] > sizes[2]


@pytest.mark.parametrize("size", ["1x", "1.5x", "2x", "3x"])
def test_measured_distances_are_near_the_predicted_ones(size, tmp_path):
    """Wider rows than the other families have: of 8 elements no mean is typical."""
    models = plain(width=64)
    plan = planned(models, tmp_path)
    told = succeeds("merge", plan, "--method", "auto", "--size", size, "-o", tmp_path / "bundle", "--json").json
    for task in models.tasks:
        measured = measured_distance(tmp_path / "bundle", models, task)
        assert told["tasks"][task]["distance"] == pytest.approx(measured, rel=1e-4)
        assert measured == pytest.approx(told["auto"]["distance"][task], rel=0.2)


# Odd families


@pytest.mark.parametrize(
    "name",
    [
        "one_task", "two_tasks", "duplicates", "zero_task", "all_zero", "small_shapes", "mixed_dtypes", "bf16_of_fp32",
        "fp16", "doubles", "heads", "tied", "resized_vocabulary", "private_only", "confusing_names",
        "running_statistics",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, "smallest"])
def test_odd_families_come_back(name, size, odd_family, odd_plan, tmp_path):
    plan, models = odd_plan(name), odd_family(name).models
    chosen = []
    if size == "smallest":
        chosen = ["--size", f"{search_of(plan).smallest().layout.total_bytes}B"]
    succeeds("merge", plan, "--method", "auto", *chosen, "-o", tmp_path / "bundle")
    assert_sound(tmp_path / "bundle", models)


def test_equal_tasks_are_stored_once_and_are_equal(tmp_path):
    base = encoder()
    models = Models(
        base=base, tasks={"a": tuned(base, 1), "b": tuned(base, 2), "c": tuned(base, 1), "d": tuned(base, 2)}
    )
    plan = planned(models, tmp_path)
    merge(plan, tmp_path / "bundle", method="auto", size="1x", device="cpu")
    assert_sound(tmp_path / "bundle", models)
    opened = open_bundle(tmp_path / "bundle")
    assert all(same_bits(opened.view("a")[name], opened.view("c")[name]) for name in base)
    assert any(".a" in part for part in opened._bundle.parts["weights/a+c.safetensors"])
    assert opened.manifest.stored_bytes <= PLAIN_BYTES


def test_a_zero_task_vector_costs_little_and_is_exact_on_a_dense_base(tmp_path):
    base = encoder(width=32)
    models = Models(
        base=base, tasks={"a": tuned(base, 1), "same": {name: value.clone() for name, value in base.items()}}
    )
    merge(planned(models, tmp_path), tmp_path / "bundle", method="auto:centres=base", size="1.9x", device="cpu")
    assert_sound(tmp_path / "bundle", models)
    view = open_bundle(tmp_path / "bundle").view("same")
    near = [name for name in base if torch.allclose(view[name], base[name], atol=0.05)]
    assert len(near) == len(base)


def test_constant_rows_vectors_and_scalars_come_back_nearly_exact_in_8_bits(tmp_path):
    base = {"a.weight": normal(1, 6, 40), "a.rows": torch.arange(1.0, 7)[:, None].expand(6, 40).contiguous()}
    base |= {"a.bias": normal(2, 40), "a.scale": torch.tensor(2.0), "a.position": normal(3, 1, 17, 8)}
    tasks = {}
    for number in (1, 2, 3):
        tasks[f"t{number}"] = {name: value + 0.05 * number for name, value in base.items()}
    models = Models(base=base, tasks=tasks)
    plan = planned(models, tmp_path)
    merge(plan, tmp_path / "bundle", method="auto:min_bits=8", size="2.5x", device="cpu")
    assert_sound(tmp_path / "bundle", models)
    for task, state in tasks.items():
        view = open_bundle(tmp_path / "bundle").view(task)
        for name, value in state.items():
            assert float((view[name] - value).abs().max()) <= 2.0**-8 * float(value.abs().max())


def test_a_tensor_of_half_the_bytes_is_upgraded_task_by_task(tmp_path):
    base = encoder(width=16)
    base["embeddings.word_embeddings.weight"] = normal(9, sum(v.numel() for v in base.values()) // 16, 16)
    models = Models(base=base, tasks={f"t{n}": tuned(base, n) for n in range(4)})
    plan = planned(models, tmp_path)
    search = search_of(plan)
    for size in ("1x", "1.3x", "1.7x"):
        merge(plan, tmp_path / size, method="auto", size=size, device="cpu")
        manifest = open_bundle(tmp_path / size).manifest
        left = float(size[:-1]) * manifest.one_model_bytes - manifest.stored_bytes
        assert 0 <= left < 0.05 * manifest.one_model_bytes, size
    solved = search.cut(
        parse_size("1.3x").target(num_tasks=4, one_model_bytes=load_plan(plan).one_model_bytes)
    ).solution
    assert any(len(set(choice.bits)) > 1 for choice in solved.choices)


def test_bits_below_one_of_many_tasks_are_told_apart(tmp_path):
    base = {"layers.0.mlp.weight": normal(0, 48, 128)}
    models = Models(base=base, tasks={f"task{number}": tuned(base, number) for number in range(13)})
    plan = planned(models, tmp_path)
    succeeds("merge", plan, "--method", "auto", "--size", "0.45x", "-o", tmp_path / "b")
    assert_sound(tmp_path / "b", models)
    (group,) = open_bundle(tmp_path / "b").manifest.units[0].groups
    assert group.bits is not None and 0 < min(group.bits.values()) < 1
    shown = " ".join(str(group.bits[task]) for task in group.tasks)
    table = succeeds("inspect", tmp_path / "b").out.partition("bits per weight of each task")[2]
    assert set(shown.split()) <= set(table.split())
    succeeds("inspect", tmp_path / "b", "--html", tmp_path / "b.html")
    assert f">{min(group.bits.values())}<" in (tmp_path / "b.html").read_text()


# What can be asked


def test_nothing_depends_on_threads(plan, tmp_path):
    for threads in (1, 3):
        merge(plan, tmp_path / str(threads), method="auto", size="1.2x", device="cpu", threads=threads)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_limits_hold(plan, tmp_path):
    merge(plan, tmp_path / "b", method="auto:min_bits=2,max_bits=4,centres=average", size="1.5x", device="cpu")
    groups = [group for unit in open_bundle(tmp_path / "b").manifest.units for group in unit.groups if group.bits]
    assert groups
    assert {bits for group in groups for bits in group.bits.values()} <= {2, 3, 4}
    methods = open_bundle(tmp_path / "b").manifest.methods
    assert {methods[group.method].args["centre"] for group in groups} <= {"average", "none"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("auto:min_bits=5,max_bits=3", "is more than"),
        ("auto:centres=mean", "no `mean`"),
        ("auto:bits=2", "no argument"),
        ("auto:max_bits=9", "max_bits=9"),
    ],
)
def test_wrong_arguments_are_told(text, says, plan, tmp_path):
    fails(2, "merge", plan, "--method", text, "-o", tmp_path / "b", says=says)


@pytest.mark.parametrize("chosen", [["--merges", "3"], ["--step", "dare"], ["--calibrate", "svc"]])
def test_options_of_an_order_are_refused(chosen, plan, tmp_path):
    fails(2, "merge", plan, "--method", "auto", *chosen, "-o", tmp_path / "b", says="auto")


def test_blocks_may_have_a_method_of_their_own(plan, family, tmp_path):
    blocks = [block.name for block in load_plan(plan).blocks]
    chosen = ["--method-for", f"{blocks[1]}=keep", "--method-for", f"{blocks[2]}=ties"]
    succeeds("merge", plan, "--method", "auto", "--size", "1.5x", *chosen, "-o", tmp_path / "b")
    assert_sound(tmp_path / "b", family.models)
    opened = open_bundle(tmp_path / "b")
    assert opened.manifest.stored_bytes <= 1.5 * opened.manifest.one_model_bytes
    by_name = {unit.name: unit for unit in opened.manifest.units}
    assert {group.kind for group in by_name[blocks[1]].groups} == {"copy"}
    assert [group.kind for group in by_name[blocks[2]].groups] == ["merged"]
    fails(
        2,
        "merge",
        plan,
        "--method",
        "auto",
        "--method-for",
        "nothing=keep",
        "-o",
        tmp_path / "c",
        says="no block matches",
    )


def test_a_cast_is_what_is_stored_and_given_back(plan, family, tmp_path):
    succeeds("merge", plan, "--method", "auto", "--size", "1x", "--dtype", "bf16", "-o", tmp_path / "b")
    assert verify(tmp_path / "b", decode=True).bad == {}
    view = open_bundle(tmp_path / "b").view("task0")
    assert {value.dtype for value in view.values()} == {torch.bfloat16}


def test_a_recipe_may_ask_for_it(family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tasks = "\n".join(f"  {name}: {path}" for name, path in family.sources.items())
    merge_ = "merge: {method: 'auto:max_bits=4', size: 1.2x}"
    recipe.write_text(f"version: 1\nbase: {family.base}\ntasks:\n{tasks}\n{merge_}\n")
    succeeds("merge", recipe, "-o", tmp_path / "b")
    assert_sound(tmp_path / "b", family.models)


# Statistics in the plan


def test_a_plan_without_statistics_says_so_and_gets_them(plan, family, tmp_path):
    bare, full = tmp_path / "bare.json", tmp_path / "full.json"
    succeeds("plan", "-q", *family.arguments, "--statistics", "gram", "-o", bare)
    result = fails(2, "merge", bare, "--method", "auto", "-o", tmp_path / "b")
    assert "flexmerge plan plan.json --statistics all" in result.err
    # Sources are relative to the plan's folder, and so is the other plan's.
    succeeds("plan", "-q", bare, "--statistics", "all", "-o", full)
    fresh = tmp_path / "fresh.json"
    succeeds("plan", "-q", *family.arguments, "-o", fresh)
    assert full.read_bytes() == fresh.read_bytes()
    succeeds("plan", "-q", fresh, "--statistics", "gram", "-o", full, "--force")
    assert full.read_bytes() == bare.read_bytes()


def test_adding_statistics_checks_the_weights(tmp_path):
    folders = write_family(tmp_path, plain())
    succeeds("plan", "-q", *folders.arguments, "--statistics", "gram", "-o", tmp_path / "bare.json")
    place = folders.tasks["task1"] / "model.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    fails(3, "plan", tmp_path / "bare.json", "--statistics", "all", "-o", tmp_path / "f.json", says="changed since")


# What it tells


def test_the_table_tells_where_bytes_go(plan, tmp_path):
    told = succeeds(
        "merge", plan, "--method", "auto", "--size", "1.5x", "--dry-run", "-o", tmp_path / "b", "--json"
    ).json
    chosen = told["auto"]
    assert sum(kind["bytes"] for kind in chosen["kinds"]) == chosen["searched_bytes"] == told["tensor_bytes"]
    assert sum(kind["damage_share"] for kind in chosen["kinds"]) == pytest.approx(1)
    assert chosen["uniform"] and all(row["damage"] >= chosen["damage"] for row in chosen["uniform"])
    assert all(row["factor"] <= chosen["factor"] for row in chosen["uniform"])
    assert chosen["doubled"]["damage"] < chosen["damage"]
    text = succeeds("merge", plan, "--method", "auto", "--size", "1.5x", "--dry-run", "-o", tmp_path / "b").out
    assert "twice the bytes" in text and "mean in 8 bits + 1 bit per task" in text


def test_plan_offers_it(plan, tmp_path):
    ways = succeeds("plan", plan, "-o", tmp_path / "again.json", "--json").json["options"]
    offered = [way for way in ways if way["name"].startswith("auto at ")]
    assert {way["name"] for way in offered} >= {"auto at 1x", "auto at 1.5x", "auto at 2x"}
    for number, way in enumerate(offered):
        bundle = tmp_path / str(number)
        arguments = way["command"].replace("bundle/", str(bundle)).replace(str(tmp_path / "again.json"), str(plan))
        succeeds(*arguments.split()[1:])
        assert on_disk(bundle) == way["disk_bytes"] or way["command"]
