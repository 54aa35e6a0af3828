"""RegMean++: inputs measured through what is merged so far, beside a plain loop with transformers and numpy."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import OrderSettings, calibrate, load_plan, make_plan, merge, open_bundle
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.calibration.request import calibration_request
from flexmerge_cli.calibration.through import measured_through
from flexmerge_cli.formats.calibration import read_calibration, unpacked
from flexmerge_cli.request.merge import merge_request

from ..program import fails, succeeds, tree
from .families import TASKS
from .test_measured import by_value, examples, model_of, observed

ALPHA = 0.9


def through(family, output, *options):
    return family.command(output, "--through", "regmean", "--size", "1x", *options)


@pytest.fixture(scope="module")
def made(done):
    output = done.family.folder / "through"
    succeeds(*through(done.family, output))
    return done.family, output


def plain(family):
    """The merged weights by name, in float64: dense normal equations, block after block, by hooks of torch."""
    base = load_file(family.folder / "base" / "model.safetensors")
    models = {task: model_of(family, task) for task in TASKS}
    names = {task: by_value(models[task], family.weights(task)) for task in TASKS}
    block_of = {name: block.name for block in family.plan.blocks for name in block.tensors}
    inputs = {task: examples(family, task) for task in TASKS}
    order = []
    with torch.no_grad():
        hooks = [
            module.register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
            for name, module in models["a"].named_modules()
        ]
        models["a"](**inputs["a"][0])
        for hook in hooks:
            hook.remove()
    merged, tuned = {}, {task: family.weights(task) for task in TASKS}
    parameters = {task: dict(models[task].named_parameters()) for task in TASKS}
    places = {own: order.index(name.rpartition(".")[0]) for name, own in names["a"].items()}
    blocks = sorted(
        family.plan.blocks, key=lambda block: min((places.get(name, 10**6) for name in block.tensors), default=0)
    )
    for block in blocks:
        grams = {task: {} for task in TASKS}
        for task in TASKS:
            for module, (rows, _) in observed(models[task], inputs[task]).items():
                name = names[task].get(f"{module}.weight")
                if name in block_of and block_of[name] == block.name:
                    grams[task][name] = module, (rows.T @ rows / len(rows)).numpy()
        for name in block.tensors:
            values = [tuned[task][name].double().numpy() for task in TASKS]
            found = sum(values) / len(TASKS)
            if name in grams["a"]:
                found = merge_layer(values, [grams[task][name][1] for task in TASKS], models["a"], grams["a"][name][0])
            merged[name] = found
            for task in TASKS:
                own = next(of for of, file_name in names[task].items() if file_name == name)
                parameters[task][own].data = torch.from_numpy(found).float()
    assert merged.keys() <= base.keys()
    return merged


def merge_layer(values, grams, model, module):
    layer = model.get_submodule(module)
    if isinstance(layer, torch.nn.Embedding):
        counts = np.stack([np.diag(gram) for gram in grams])
        weight = np.where(counts.sum(0) > 0, counts, 1)
        return sum(w[:, None] * v for w, v in zip(weight, values)) / weight.sum(0)[:, None]
    turned = type(layer).__name__ == "Conv1D"
    grams = [np.where(np.eye(len(gram)) > 0, gram, ALPHA * gram) for gram in grams]
    flat = [(v.T if turned else v).reshape(v.shape[1 if turned else 0], -1) for v in values]
    found = np.linalg.solve(sum(grams), sum(g @ v.T for g, v in zip(grams, flat))).T
    return (found.T if turned else found).reshape(values[0].shape)


def test_a_merge_has_the_values_of_a_plain_loop(made, tmp_path):
    family, output = made
    words = ["merge", family.plan_path, "--method", "regmean", "--size", "1x", "--calibration"]
    succeeds(*words, output, "-o", tmp_path / "bundle")
    succeeds(*words, family.folder / "calibration", "-o", tmp_path / "plain")
    expected, found = plain(family), open_bundle(tmp_path / "bundle").view("a")
    other = open_bundle(tmp_path / "plain").view("a")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), torch.from_numpy(value), rtol=1e-3, atol=2e-4)
    differ = [name for name in expected if not torch.allclose(found[name], other[name], atol=1e-3)]
    assert differ, "the inputs of later layers are those of the fine-tuned models"
    settings = json.loads((output / "calibration.json").read_text())["settings"]
    assert settings["through"]["request"] == "--method regmean --size 1x" and settings["statistics"] == ["inputs"]


def test_at_larger_sizes_each_task_runs_through_its_own_groups(pictures, tmp_path):
    """Python writes the same bytes, for any method that reads inputs; and a calibration belongs to its groups."""
    family, output = pictures.family, tmp_path / "through"
    words = ["--through", "low_bit:centre=regmean", "--size", "1.6x"]
    expected = succeeds(*family.command(output, *words, "--json", "--dry-run")).json
    done = succeeds(*family.command(output, *words, "--json")).json
    assert done["tasks"]["a"]["runs"] == expected["tasks"]["a"]["runs"] > 1
    assert done["total_bytes"] <= expected["total_bytes"]
    method = {"through": "low_bit:centre=regmean", "size": "1.6x", "device": "cpu"}
    calibrate(family.plan_path, family.spec, tmp_path / "python", **method)
    assert tree(tmp_path / "python") == tree(output)
    merged = ["merge", family.plan_path, "--calibration", output, "-o", tmp_path / "never", "--dry-run", "--method"]
    succeeds(*merged, "low_bit:centre=regmean", "--size", "1.6x")
    for other in (("low_bit:centre=regmean", "--size", "2.2x"), ("regmean", "--size", "1.6x")):
        said = f"through a merge by `--method low_bit:centre=regmean --size 1.6x`, and `--method {' '.join(other)}` has"
        fails(2, *merged, *other, says=said)


def test_blocks_with_parts_of_one_layer_merge_together(pictures, tmp_path):
    """All heads but the last were not merged when what comes behind them was measured."""
    family, plan, rules = pictures.family, tmp_path / "plan.json", tmp_path / "heads.yaml"
    rules.write_text("split: [{match: attention.attention.query|key|value, parts: 2}]")
    sources = {task: family.folder / "tasks" / task for task in TASKS}
    assert make_plan(family.folder / "base", sources, output=plan, order=OrderSettings(blocks=str(rules))).splits
    calibrate(plan, family.spec, tmp_path / "through", through="regmean", size="1x", device="cpu")
    merge(plan, tmp_path / "bundle", method="regmean", size="1x", calibration=tmp_path / "through", device="cpu")
    calibration, behind = (
        read_calibration(tmp_path / "through", load_plan(plan)),
        "vit.encoder.layer.0.intermediate.dense",
    )
    for number, task in enumerate(TASKS):
        seen = observed(open_bundle(tmp_path / "bundle").model(task), examples(family, task))
        (rows,) = (x for name, (x, _) in seen.items() if name.endswith(("intermediate.dense", "mlp.fc1")))
        found = unpacked(calibration.array(number, "inputs", f"{behind}.weight"))
        np.testing.assert_allclose(found, (rows.T @ rows / len(rows)).numpy(), rtol=1e-3, atol=1e-4)


def test_a_size_in_bytes_counts_what_the_manifest_says_of_the_calibration(pictures):
    """A byte less than some groups take gave these groups, and `merge` chose other ones for the same size."""
    family, asked = pictures.family, {"method": "regmean", "calibration": "calibration/"}
    pricer = Pricer(family.plan, calibration=family.read(pictures.output))
    least = allocate(family.plan, merge_request(size="1.6x", **asked), pricer).total_bytes - 1
    found = allocate(family.plan, merge_request(size=f"{least}B", **asked), pricer).allocation
    through = calibration_request(family.plan_path, family.spec, through="regmean", size=f"{least}B").through
    assert through.allocation.digest() == found.digest()


def test_what_is_asked_wrongly_is_refused(pictures, tmp_path):
    family, output = pictures.family, tmp_path / "never"
    fails(2, *family.command(output, "--size", "1x"), says="--size has no effect without --through")
    fails(2, *family.command(output, "--through", "average"), says="--through average: it reads no inputs")
    fails(2, *family.command(output, "--through", "auto", "--size", "1x"), says="`auto` merges no block by the inputs")
    fails(2, *family.command(output, "--through", "fisher", "--size", "1x"), says="it reads no inputs")
    fails(2, *through(family, output, "--statistics", "fisher"), says="--through measures inputs alone")
    fails(6, *family.command(output, "--through", "regmean", "--size", "0.5x"), says="does not reach 0.5x")
    assert not output.exists()


def test_merges_run_where_the_models_do(pictures, tmp_path, monkeypatch):
    """They ran on `--device`, and the models on the device of the spec where that was left out."""
    spec = tmp_path / "calib.yaml"
    told = pictures.family.spec.read_text().replace("data: ", f"data: {pictures.family.folder}/")
    spec.write_text(f"{told}device: cuda:7\n")
    seen = []
    monkeypatch.setattr("flexmerge_cli.evaluation.scoring.Scorer.run", lambda *_: pytest.fail("nothing runs here"))
    monkeypatch.setattr("flexmerge_cli.calibration.through.choose_device", lambda name: seen.append(name) or 1 / 0)
    for device in (None, "cpu"):
        request = calibration_request(
            pictures.family.plan_path, spec, through="regmean", size="1x", statistics="inputs", device=device
        )
        with pytest.raises(ZeroDivisionError):
            measured_through(request, request.through, tmp_path, lambda *_: None)
    assert seen == ["cuda:7", "cpu"]
