"""Tasks whose experts are stacked over a base that has them one by one, and the other way round."""

import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import load_plan
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.family.experts import in_form_of

from ..families import LAYOUTS, Models, assert_same_state, normal, write_checkpoint, write_family
from ..program import succeeds

EXPERTS, WIDTH, INNER = 3, 4, 5
NAMES = {"qwen": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def apart(seed, names=NAMES["qwen"]):
    """One tensor an expert, two layers."""
    state = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for number, name in enumerate(names):
                shape = (WIDTH, INNER) if number == 2 else (INNER, WIDTH)
                own = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                state[own] = normal(1000 * seed + 100 * layer + 10 * expert + number, *shape)
        state[f"model.layers.{layer}.mlp.gate.weight"] = normal(seed + 7, EXPERTS, WIDTH)
    return state


def stacked(state, names=NAMES["qwen"]):
    """Stack experts as transformers 5 has them in memory."""
    found = {name: value for name, value in state.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        own = [[state[f"{prefix}.{expert}.{name}.weight"] for name in names] for expert in range(EXPERTS)]
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in own])
        found[f"{prefix}.down_proj"] = torch.stack([down for *_, down in own])
    return found


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("is_stacked", [True, False], ids=["stacked tasks", "stacked base"])
def test_experts_merge_whatever_form_the_base_has_and_tasks_come_back_in_their_own(is_stacked, kind, tmp_path):
    names = NAMES[kind]
    base, tasks = apart(0, names), {name: apart(seed, names) for seed, name in enumerate("ab", 1)}
    tasks = {task: {name: base[name] + 0.05 * value for name, value in state.items()} for task, state in tasks.items()}
    if is_stacked:
        models = Models(base=base, tasks={name: stacked(state, names) for name, state in tasks.items()})
    else:
        models = Models(base=stacked(base, names), tasks=tasks)
    folders = write_family(tmp_path, models)
    succeeds("plan", *folders.arguments, "-o", tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert {tensor.class_ for tensor in plan.tensors} == {"mergeable"}
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "exact")
    succeeds("merge", tmp_path / "plan.json", "--method", "average", "--size", "1x", "-o", tmp_path / "average")
    mean = {name: (tasks["a"][name] + tasks["b"][name]) / 2 for name in base}
    for task, state in models.tasks.items():
        for bundle in ("exact", "average"):
            succeeds("export", tmp_path / bundle, "--task", task, "-o", tmp_path / f"{bundle}-{task}")
        assert_same_state(load_file(tmp_path / f"exact-{task}/model.safetensors"), state)
        found = load_file(tmp_path / f"average-{task}/model.safetensors")
        expected = stacked(mean, names) if is_stacked else mean
        assert set(found) == set(expected)
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_range_of_a_stack_is_that_of_its_experts(layout, tmp_path):
    import numpy as np

    from flexmerge_cli.checkpoint.reader import Reader

    state = apart(0)
    for name, model in (("base", state), ("task", stacked(state))):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, model, layout=layout)
    base, task = (open_checkpoint(str(tmp_path / name)) for name in ("base", "task"))
    seen = in_form_of([task], base)
    assert set(seen.tensors) == set(task.tensors)
    whole = seen.tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert set(whole.paths) <= set(base.weight_bytes)
    expected = stacked(state)[whole.name].flatten().numpy()
    with Reader() as reader:
        for start, stop in ((0, 120), (0, 1), (19, 21), (39, 120), (60, 60)):
            buffer = np.empty((stop - start) * 4, np.uint8)
            reader.will_need(whole, start, stop)
            assert np.array_equal(reader.read(whole, start, stop, buffer).view(np.float32), expected[start:stop])
        rows = whole.take(((2, 1), (0, 1)))
        found = reader.read(rows, 0, 80, np.empty(320, np.uint8)).view(np.float32)
        assert np.array_equal(found, np.concatenate([expected[80:], expected[:40]]))
    back = in_form_of([base], task)
    assert set(back.tensors) == set(base.tensors)


def test_a_base_whose_experts_are_incomplete_or_tasks_of_both_forms_are_left_as_they_are(tmp_path):
    state = apart(0)
    missing = {name: value for name, value in state.items() if "layers.0.mlp.experts.1." not in name}
    made = {"base": missing, "apart": state, "stacked": stacked(state)}
    for name, model in made.items():
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, model)
    found = {name: open_checkpoint(str(tmp_path / name)) for name in made}
    seen = in_form_of([found["stacked"]], found["base"])
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in seen.tensors
    assert "model.layers.1.mlp.experts.gate_up_proj" in seen.tensors
    assert in_form_of([found["stacked"], found["apart"]], found["apart"]) is found["apart"]
    assert in_form_of([], found["apart"]) is found["apart"]
