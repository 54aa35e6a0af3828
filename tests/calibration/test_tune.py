"""Coefficients found on unlabelled examples, beside a plain loop with transformers, autograd and torch's Adam."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import load_plan, open_bundle
from flexmerge_cli.calibration.joint import JointModels
from flexmerge_cli.calibration.tune import tune_request
from flexmerge_cli.errors import DataError

from ..program import fails, succeeds
from .families import NUM_EXAMPLES, TASKS
from .test_measured import by_value, examples, model_of

STEPS, LR = 4, 0.1


def command(family, output, *options):
    words = ["tune", family.plan_path, "--spec", family.spec, "-o", output, "--device", "cpu"]
    return [*words, "--method", f"adamerging:steps={STEPS},lr={LR},batch_size={NUM_EXAMPLES}", *options]


@pytest.fixture(scope="module")
def tuned(done):
    """The family, and its coefficients: block -> task -> weight."""
    output = done.family.folder / "coefficients.json"
    succeeds(*command(done.family, output))
    return done.family, output


def plain(family, *, granularity="block"):
    """Block -> task -> weight, by a loop that knows nothing of the program's."""
    base, plan = load_file(family.folder / "base" / "model.safetensors"), family.plan
    block_of = {name: block.name for block in plan.blocks for name in block.tensors}
    blocks = [block.name for block in plan.blocks]
    vectors = {task: {name: family.weights(task)[name] - base[name] for name in block_of} for task in TASKS}
    models = {task: model_of(family, task) for task in TASKS}
    names = {task: by_value(models[task], family.weights(task)) for task in TASKS}
    inputs = {task: examples(family, task) for task in TASKS}
    number = {"block": len(blocks), "task": 1}[granularity]
    weight = torch.ones(len(TASKS), number, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=LR)
    for _ in range(STEPS):
        loss = 0
        for task in TASKS:
            merged = {}
            for name, own in names[task].items():
                if own in block_of:
                    place = blocks.index(block_of[own]) if granularity == "block" else 0
                    merged[name] = base[own] + sum(weight[k, place] * vectors[t][own] for k, t in enumerate(TASKS)) / 3
            for one in inputs[task]:
                logits = torch.func.functional_call(models[task], merged, kwargs=one).logits
                p = logits.reshape(-1, logits.shape[-1]).softmax(-1)
                loss = loss - (p * p.log()).sum(-1).mean() / len(inputs[task])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        block: {task: float(weight.detach()[k, p % number]) for k, task in enumerate(TASKS)}
        for p, block in enumerate(blocks)
    }


def test_weights_of_blocks_are_those_of_a_plain_loop(tuned):
    family, output = tuned
    found, expected = json.loads(output.read_text())["weights"], plain(family)
    assert found.keys() == expected.keys() and len(found) > 3
    assert not np.allclose([list(of.values()) for of in expected.values()], 1, atol=LR)
    for block, of in expected.items():
        assert found[block] == pytest.approx(of, abs=2e-3), block


def test_weights_of_tasks_are_those_of_a_plain_loop(pictures, tmp_path):
    method = f"adamerging:granularity=task,steps={STEPS},lr={LR},batch_size={NUM_EXAMPLES}"
    succeeds(*command(pictures.family, tmp_path / "c.json", "--method", method))
    expected = next(iter(plain(pictures.family, granularity="task").values()))
    assert json.loads((tmp_path / "c.json").read_text())["weights"] == pytest.approx(expected, abs=2e-3)


def test_a_merge_takes_them_without_data_and_records_them(tuned, tmp_path):
    family, output = tuned
    method = f"weighted_average:weights=@{output},normalize=count"
    succeeds("merge", family.plan_path, "--method", method, "--size", "1x", "-o", tmp_path / "bundle")
    weights = json.loads(output.read_text())["weights"]
    base = load_file(family.folder / "base" / "model.safetensors")
    merged = open_bundle(tmp_path / "bundle").view("a")
    for block in family.plan.blocks:
        for name in block.tensors:
            each = [weights[block.name][task] * (family.weights(task)[name] - base[name]) for task in TASKS]
            torch.testing.assert_close(merged[name], base[name] + sum(each) / 3, rtol=1e-5, atol=1e-6)
    again = succeeds("inspect", tmp_path / "bundle", "--json").json
    assert str(output) not in json.dumps(again) and "normalize=count" in json.dumps(again)


def test_the_same_examples_and_seed_give_the_same_bytes(pictures, tmp_path):
    options = "--method", "adamerging:steps=3,batch_size=4"
    for name in ("one", "other"):
        succeeds(*command(pictures.family, tmp_path / name, *options))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("method", "code", "says"),
    [
        ("adamerging:steps=0", 2, "steps=0 is not an integer in [1"),
        ("adamerging:speed=1", 2, "no argument `speed`"),
        ("adamerging:lr=1e300", 2, "lr=1e+300 is not a number in (0, 1000]"),
        ("adamerging:init=1e300", 2, "init=1e+300 is not a number in (0, 1000]"),
        ("ties", 2, "no method `ties`"),
    ],
)
def test_a_wrong_method_is_refused(pictures, tmp_path, method, code, says):
    fails(code, *command(pictures.family, tmp_path / "c.json", "--method", method), says=says)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda of: of["weights"].pop(next(iter(of["weights"]))), 2, "no weights of block"),
        (lambda of: next(iter(of["weights"].values())).update(d=1.0), 2, "weights of task `d`"),
        (lambda of: of["weights"].update(other={}), 2, "weights of block `other`"),
        (lambda of: next(iter(of["weights"].values())).update(a=-1.0), 2, "the weight of `a` is -1.0"),
        (lambda of: of.pop("weights"), 3, "is not a file of coefficients"),
        (lambda of: of.update(format="flexmerge.plan/1"), 3, "is not a file of coefficients"),
        (lambda of: of.update(weights={f"task{n}": 1 for n in range(80_000)}), 2, "the command that a bundle records"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(tuned, tmp_path, change, code, says):
    family, output = tuned
    fields = json.loads(output.read_text())
    change(fields)
    (tmp_path / "c.json").write_text(json.dumps(fields))
    method = f"weighted_average:weights=@{tmp_path / 'c.json'}"
    fails(code, "merge", family.plan_path, "--method", method, "-o", tmp_path / "never", "--dry-run", says=says)


def test_what_is_missing_is_said(pictures, tmp_path):
    plan = pictures.family.plan_path
    nothing = "weighted_average:weights=@nothing.json"
    fails(4, "merge", plan, "--method", nothing, "-o", tmp_path / "b", says="no coefficients at nothing.json")
    fails(2, "tune", plan, "-o", tmp_path / "c.json", says="no --spec")
    fails(2, "tune", plan, "--spec", pictures.family.spec, says="no output file")


def test_data_that_are_not_finite_are_refused(pictures, tmp_path):
    for task in TASKS:
        np.savez(tmp_path / f"{task}.npz", images=np.full((2, 3, 8, 8), np.nan, np.float32))
    spec = tmp_path / "calib.yaml"
    spec.write_text(pictures.family.spec.read_text())
    failed = fails(3, *command(pictures.family, tmp_path / "c.json", "--spec", spec), says="task `a`")
    assert "the outputs of the merged model are not finite" in failed.err and not (tmp_path / "c.json").exists()


def test_gradients_that_are_not_finite_are_refused(pictures):
    """A loss may be finite where its gradient is not, such as √x at 0."""
    request = tune_request(pictures.family.plan_path, pictures.family.spec, examples=1, device="cpu").examples
    models = JointModels.of(request)
    models.merge(np.ones((len(TASKS), len(models.plan.blocks))))
    with pytest.raises(DataError, match="the gradients of the merged model are not finite"):
        models.gradient(lambda logits: (logits - logits.detach()).sum().abs().sqrt(), 0, 1)
    found, total = models.gradient(lambda logits: logits.detach().sum(), 0, 1)  # as where nothing in use merges
    assert not found.any() and np.isfinite(total)


@pytest.mark.parametrize(("private", "code"), [("*", 2), ("*encoder*", 0)])
def test_only_what_merges_is_weighed(pictures, tmp_path, private, code):
    family = pictures.family
    sources = [word for task in TASKS for word in ("--task", f"{task}={family.folder / 'tasks' / task}")]
    words = ("plan", "-q", "--base", family.folder / "base", *sources, "--private", private)
    succeeds(*words, "-o", tmp_path / "plan.json")
    words = ("tune", tmp_path / "plan.json", "--spec", family.spec, "--examples", 1, "--device", "cpu")
    words += ("--method", "adamerging:steps=1", "-o", tmp_path / "c.json")
    if code:
        fails(code, *words, says="has no block that merges")
    else:
        succeeds(*words)
        blocks = {block.name for block in load_plan(tmp_path / "plan.json").blocks}
        assert set(json.loads((tmp_path / "c.json").read_text())["weights"]) == blocks
