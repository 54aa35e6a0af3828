"""`auto` and what fine-tunes left as it was: stored once, exactly, at every size; exact copies win where they fit."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexmerge_cli import load_plan, make_plan, merge, open_bundle, verify
from flexmerge_cli.allocation.allocation import copies
from flexmerge_cli.allocation.auto_allocation import auto
from flexmerge_cli.allocation.auto_table import Limits
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.report.auto import unlike_predicted
from flexmerge_cli.request.merge import merge_request

from .families import Models, normal, same_bits, write_family
from .program import fails, stored_sizes, succeeds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = {"embed.weight": (40, 16), "block.q.weight": (16, 16), "block.k.weight": (16, 16), "block.norm.bias": (16,)}
MATRIX, TABLE = 4 * 16 * 16, 4 * 40 * 16


def frozen_base(dtype=F32):
    return {name: normal(seed, *shape).to(dtype) for seed, (name, shape) in enumerate(SHAPES.items())}


def tuned_in(base, seed, moved, dtype=F32):
    """What is named is moved, and all is saved in a dtype."""
    return {
        name: (value.float() + (0.05 * normal(100 * seed + i, *value.shape) if name in moved else 0)).to(dtype)
        for i, (name, value) in enumerate(base.items())
    }


def planned(models, folder):
    folders = write_family(folder, models)
    make_plan(folders.base, folders.sources, output=folder / "plan.json", device="cpu")
    return folder / "plan.json"


def pricer_of(plan):
    return Pricer(load_plan(plan)).asked(merge_request(method="auto"))


def unchanged(models):
    """Names of tensors that every task has as the base has them, cast to its own dtype."""
    return [
        name
        for name, value in models.base.items()
        if all(same_bits(state[name], value.float().to(state[name].dtype)) for state in models.tasks.values())
    ]


def assert_exact(bundle, models, names=None):
    view_of = open_bundle(bundle).view
    for task, state in models.tasks.items():
        view = view_of(task)
        assert [name for name in (state if names is None else names) if not same_bits(view[name], state[name])] == []


def stored_bytes_of(bundle, tensor):
    parts = {part: stored for file in open_bundle(bundle)._bundle.parts.values() for part, stored in file.items()}
    return sum(stored.num_bytes for part, stored in parts.items() if part.partition("@")[0] == tensor)


FROZEN = {
    "one_task": lambda base: {"one": tuned_in(base, 1, ["block.q.weight"])},
    "one_task_in_bf16": lambda base: {"half": tuned_in(base, 1, ["block.q.weight"], BF16)},
    "two_in_one_dtype": lambda base: {f"t{n}": tuned_in(base, n, ["block.q.weight"]) for n in (1, 2)},
    "one_of_two_in_bf16": lambda base: {
        "one": tuned_in(base, 1, ["block.q.weight"]),
        "half": tuned_in(base, 2, ["block.q.weight"], BF16),
    },
    "three_dtypes": lambda base: {
        "one": tuned_in(base, 1, ["block.q.weight"]),
        "half": tuned_in(base, 2, ["block.k.weight"], F16),
        "brain": tuned_in(base, 3, ["block.q.weight", "block.norm.bias"], BF16),
    },
    "one_is_the_base": lambda base: {"base": tuned_in(base, 1, []), "one": tuned_in(base, 2, ["block.q.weight"])},
    "nothing_moved": lambda base: {"one": tuned_in(base, 1, []), "half": tuned_in(base, 2, [], BF16)},
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unchanged_tensors_are_stored_once_and_exact_at_every_size(name, dtype, tmp_path):
    base = frozen_base(dtype)
    models = Models(base=base, tasks=FROZEN[name](base))
    plan = planned(models, tmp_path)
    search = auto(pricer_of(plan), Limits())
    smallest = min(found.layout.total_bytes for found in (search.smallest_on_disk(), search.exact()))
    sizes = [f"{smallest}B", f"{smallest + 700}B", f"{len(models.tasks)}x", None]
    for number, size in enumerate(sizes):
        bundle = tmp_path / str(number)
        merge(plan, bundle, method="auto", size=size, device="cpu")
        assert verify(bundle, decode=True).bad == {}
        assert_exact(bundle, models, unchanged(models))
        if number == 0:
            wide = 4 if dtype is F32 else max(state["embed.weight"].element_size() for state in models.tasks.values())
            assert stored_bytes_of(bundle, "embed.weight") <= wide * 40 * 16
        for task, entry in open_bundle(bundle).manifest.tasks.items():
            view, state = open_bundle(bundle).view(task), models.tasks[task]
            is_exact = all(same_bits(view[key], value) for key, value in state.items())
            assert (entry.distance == 0) >= entry.exact
            assert not entry.exact or is_exact
            assert entry.exact or size != f"{len(models.tasks)}x"
    fails(
        6, "merge", plan, "--method", "auto", "--size", f"{smallest - 1}B", "-o", tmp_path / "no", says=f"{smallest}B"
    )


def test_a_task_that_is_the_base_is_exact_where_no_size_is_asked_for(tmp_path):
    base = frozen_base()
    models = Models(base=base, tasks={"base": tuned_in(base, 1, []), "one": tuned_in(base, 2, list(base))})
    merge(planned(models, tmp_path), tmp_path / "b", method="auto", device="cpu")
    entry = open_bundle(tmp_path / "b").manifest.tasks["base"]
    assert (entry.exact, entry.distance) == (True, 0)


TASKS = st.tuples(st.sets(st.sampled_from(sorted(SHAPES))), st.sampled_from([F32, BF16, F16]))
"""What it moves, and the dtype that it is saved in."""


def test_what_was_not_predicted_is_told(tmp_path):
    """A task that is the base and is not exact has no distance; one that is much farther off than it was thought."""
    base = frozen_base()
    models = Models(base=base, tasks={"base": tuned_in(base, 1, []), "one": tuned_in(base, 2, list(base))})
    asked = ("merge", planned(models, tmp_path), "--method", "auto", "-o", tmp_path / "b", "--size")
    told = succeeds(*asked, "0.8x", "--json")
    assert "task `base` equals the base and is not stored exactly" in told.err
    assert any("`base`" in warning for warning in told.json["warnings"])
    assert "equals the base" not in succeeds(*asked, "2x", "--force").err
    (warning,) = unlike_predicted({"a": 0.1, "b": 0.1, "c": 0.0}, {"a": 0.42, "b": 0.38, "c": 0.0})
    assert "task `a`: distance 0.420, where 0.100 was predicted" in warning


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([F32, BF16]), st.lists(TASKS, min_size=1, max_size=3), st.floats(0, 1), st.booleans())
def test_no_choice_is_worse_than_exact(tmp_path_factory, dtype, tasks, place, on_disk):
    base = frozen_base(dtype)
    models = Models(base=base, tasks={f"t{n}": tuned_in(base, n, *task) for n, task in enumerate(tasks)})
    folder = tmp_path_factory.mktemp("family")
    plan = planned(models, folder)
    pricer = pricer_of(plan)
    found, exact = auto(pricer, Limits()), pricer.layout(copies(pricer.plan))
    one = pricer.plan.one_model_bytes

    def weigh(layout):
        return layout.total_bytes if on_disk else layout.tensor_bytes

    least = weigh(found.smallest().layout)
    for limit in (int(least + place * (weigh(exact) - least)), weigh(exact)):
        size = f"{limit}B" if on_disk else f"{min(len(models.tasks), -(-limit * 10**6 // one) / 10**6)}x"
        bundle = folder / f"{limit}"
        merge(plan, bundle, method="auto", size=size, device="cpu", force=True)
        assert_exact(bundle, models, unchanged(models))
        manifest = open_bundle(bundle).manifest
        assert sum(stored_sizes(bundle).values()) <= limit or not on_disk
        distances = [entry.distance for entry in manifest.tasks.values()]
        if limit >= weigh(exact):
            assert distances == [0] * len(distances)
            assert_exact(bundle, models)
        else:
            assert None not in distances or any(map(is_base, models.tasks.values(), [models.base] * 3))


def is_base(state, base):
    return all(same_bits(value, base[name].float().to(value.dtype)) for name, value in state.items())


def write_lora(folder, base):
    """Write a LoRA of `block.q` by hand."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q"],
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": normal(1, 2, 16), "lora_B": normal(2, 16, 2)}
    named = {f"base_model.model.block.q.{key}.weight": value for key, value in factors.items()}
    save_file(named, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("moved", [["block.q.weight"], list(SHAPES)])
def test_beside_kept_adapters_tasks_read_the_base_that_is_there(dtype, moved, tmp_path):
    base = frozen_base()
    models = Models(base=base, tasks={"whole": tuned_in(base, 1, moved, dtype)})
    folders = write_family(tmp_path, models)
    write_lora(folders.root / "tasks" / "lora", folders.base)
    plan = tmp_path / "plan.json"
    succeeds("plan", *folders.arguments, "-o", plan)
    search, one = auto(pricer_of(plan), Limits()), load_plan(plan).one_model_bytes
    smallest = search.smallest().layout.tensor_bytes
    for share in (0, 0.2, 0.7, None):
        size = "2x" if share is None else f"{-(-(smallest + share * MATRIX) * 10**6 // one) / 10**6}x"
        bundle = tmp_path / size
        told = succeeds("merge", plan, "--method", "auto", "--size", size, "-o", bundle, "--json").json
        assert verify(bundle, decode=True).bad == {}
        manifest = open_bundle(bundle).manifest
        assert manifest.stored_bytes == told["tensor_bytes"] == told["auto"]["searched_bytes"] + search.fixed_bytes
        assert share is None or manifest.stored_bytes <= float(size[:-1]) * one
        assert same_bits(open_bundle(bundle).view("lora")["embed.weight"], base["embed.weight"])
        assert_exact(bundle, models, unchanged(models))
        assert stored_bytes_of(bundle, "embed.weight") == TABLE or "embed.weight" in moved
    assert manifest.tasks["whole"].exact
