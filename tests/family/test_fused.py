"""Tasks that have in one tensor what the base has apart, or with other axes, and the other way round."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import load_plan
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.family import fused, spelling

from ..families import Models, assert_same_state, normal, write_checkpoint, write_family
from ..program import succeeds

ROWS = [(kind, whole, parts) for kind, forms in spelling.forms().items() for whole, parts in forms.get("rows", ())]
TURNED = [(kind, old, new) for kind, forms in spelling.forms().items() for old, new in forms.get("turned", ())]
UNEVEN = (6, 2, 4, 2)


def named(word: str, end: str = ".weight") -> str:
    """The name of a tensor in a layer, with this word in it."""
    return f"layers.0.{word.removeprefix('.')}{end}"


def opened(folder, kind, state):
    write_checkpoint(folder, state)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return open_checkpoint(str(folder))


def read(checkpoint):
    found = {}
    with Reader() as reader:
        for name, tensor in checkpoint.tensors.items():
            bits = reader.read(tensor, 0, tensor.num_elements, np.empty(tensor.num_bytes, np.uint8))
            found[name] = torch.from_numpy(bits.view(np.float32).reshape(tensor.shape))
    return found


@pytest.mark.parametrize("kind, whole, parts", ROWS)
def test_what_transformers_joins_or_cuts_is_seen_in_the_form_of_the_tasks(kind, whole, parts, tmp_path):
    end = "" if whole.endswith(("weight", "bias")) else ".weight"
    apart = {named(part, end): normal(number, rows, 3) for number, (part, rows) in enumerate(zip(parts, UNEVEN))}
    one = {named(whole, end): torch.cat(list(apart.values()))}
    more = {"layers.0.other.weight": normal(9, 2, 2)}
    found = {name: opened(tmp_path / name, kind, state | more) for name, state in {"apart": apart, "one": one}.items()}
    for base, task in (("apart", "one"), ("one", "apart")):
        assert_same_state(read(fused.in_form_of([found[task]], found[base])), read(found[task]))
        assert fused.in_form_of([found[base]], found[base]) is found[base]
    both = list(found.values())
    assert fused.in_form_of(both, found["one"]) is found["one"]
    (said,) = fused.mixed(found)
    assert whole in said and all(part in said for part in parts) and "save all tasks" in said
    assert fused.mixed({"a": found["one"]}) == []


def test_a_tower_may_have_fused_what_another_has_apart(tmp_path):
    """Such tasks over a base that has all apart, or all fused, were stored unmerged."""
    words = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    text, vision = ({f"{tower}.layers.0.{word}": normal(seed + n, 4, 6) for n, word in enumerate(words)}
                    for tower, seed in (("text", 0), ("vision", 10)))  # fmt: skip
    one = {tower: {f"{tower}.layers.0.qkv_proj.weight": torch.cat(list(state.values()))}
           for tower, state in (("text", text), ("vision", vision))}  # fmt: skip
    states = {"apart": text | vision, "task": text | one["vision"], "fused": one["text"] | one["vision"]}
    found = {name: opened(tmp_path / name, "unlimited_ocr", state) for name, state in states.items()}
    for base in found.values():
        assert_same_state(read(fused.in_form_of([found["task"]] * 2, base)), states["task"])


@pytest.mark.parametrize("kind, old, new", TURNED)
def test_axes_that_transformers_swaps_are_as_the_tasks_have_them(kind, old, new, tmp_path):
    value = normal(1, 4, 3, 5) if "experts" in old else normal(1, 3, 5)
    base, task = {named(old, ""): value}, {named(new, ""): value.transpose(-1, -2).contiguous()}
    found = {name: opened(tmp_path / name, kind, state) for name, state in {"base": base, "task": task}.items()}
    seen = fused.in_form_of([found["task"]], found["base"])
    assert_same_state(read(seen), task)
    assert fused.in_form_of([found["base"]], found["base"]) is found["base"]


def test_parts_that_do_not_fit_or_are_not_there_are_left(tmp_path):
    kind, whole, parts = "nomic_bert", "attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    one = opened(tmp_path / "one", kind, {named(whole): normal(1, 6, 3)})
    states = {
        "wider": {named(part): normal(2, 2, 4) for part in parts},
        "longer": {named(part): normal(2, 3, 3) for part in parts},
        "two": {named(part): normal(2, 3, 3) for part in parts[:2]},
        "layers": {named(part).replace("0", n): normal(2, int(n), 3) for part in parts for n in "12"},
    }
    for name, state in states.items():
        task = opened(tmp_path / name, kind, state)
        assert fused.in_form_of([task], one) is one
        assert name == "layers" or fused.in_form_of([one], task) is task
    other = opened(tmp_path / "other", "bert", {named(part): normal(2, 2, 3) for part in parts})
    plain = opened(tmp_path / "plain", "bert", {named(whole): normal(1, 6, 3)})
    assert fused.in_form_of([other], plain) is plain, "of another type of model"


@pytest.mark.parametrize("is_whole", [True, False], ids=["one tensor in tasks", "one tensor in the base"])
def test_they_merge_and_tasks_come_back_as_they_were(is_whole, tmp_path):
    parts = [named(f"self_attn.{letter}_proj") for letter in "qkv"]

    def joined(state):
        rest = {name: value for name, value in state.items() if name not in parts}
        return rest | {named("attn.Wqkv"): torch.cat([state[name] for name in parts])}

    base = {name: normal(number, 4, 6) for number, name in enumerate([*parts, "layers.0.mlp.weight"])}
    tasks = {task: {name: value + 0.05 * normal(seed, 4, 6) for name, value in base.items()}
             for seed, task in enumerate("ab", 10)}  # fmt: skip
    config = {"model_type": "nomic_bert", "tie_word_embeddings": False}
    models = Models(
        base=base if is_whole else joined(base),
        tasks={task: joined(state) if is_whole else state for task, state in tasks.items()},
        configs=dict.fromkeys(tasks, config),
    )
    folders = write_family(tmp_path, models)
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    assert {tensor.class_ for tensor in load_plan(tmp_path / "plan.json").tensors} == {"mergeable"}
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "exact")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--size", "1x", "-o", tmp_path / "average")
    mean = {name: (tasks["a"][name] + tasks["b"][name]) / 2 for name in base}
    for task, state in models.tasks.items():
        for bundle in ("exact", "average"):
            succeeds("export", tmp_path / bundle, "--task", task, "-o", tmp_path / f"{bundle}-{task}")
        assert_same_state(load_file(tmp_path / f"exact-{task}/model.safetensors"), state)
        found, expected = load_file(tmp_path / f"average-{task}/model.safetensors"), joined(mean) if is_whole else mean
        assert set(found) == set(expected)
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_tasks_of_both_forms_are_named_with_what_to_do(tmp_path):
    parts = {named(f"self_attn.{letter}_proj"): normal(number, 4, 6) for number, letter in enumerate("qkv")}
    config = {"model_type": "nomic_bert", "tie_word_embeddings": False}
    rest = {f"layers.0.mlp.{number}.weight": normal(number, 4, 6) for number in range(8)}
    models = Models(
        base=parts | rest,
        tasks={"a": {named("attn.Wqkv"): torch.cat(list(parts.values()))} | rest, "b": parts | rest},
        configs={"a": config, "b": config},
    )
    folders = write_family(tmp_path, models)
    said = succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json").err
    assert "task `a` has `attn.Wqkv` in one tensor" in said and "save all tasks" in said
