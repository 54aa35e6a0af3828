"""Coefficients found on unlabelled examples, beside a plain loop with transformers, autograd and torch's Adam."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import calibrate, load_plan, open_bundle, tune
from flexmerge_cli.calibration.joint import JointModels
from flexmerge_cli.calibration.tune import tune_request
from flexmerge_cli.calibration.tuners import TUNERS
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.random import key64, uniform

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


class Plain:
    """The merged models of a family, by code that knows nothing of the program's."""

    def __init__(self, family):
        self.base, self.blocks = load_file(family.folder / "base" / "model.safetensors"), family.plan.blocks
        self.block_of = {name: place for place, block in enumerate(self.blocks) for name in block.tensors}
        self.tuned = {task: {name: family.weights(task)[name] for name in self.block_of} for task in TASKS}
        self.models = {task: model_of(family, task) for task in TASKS}
        self.names = {task: by_value(self.models[task], family.weights(task)) for task in TASKS}
        self.inputs = {task: examples(family, task) for task in TASKS}

    def merged(self, weight):
        """The merged tensors. weight: [tasks, blocks]."""
        return {
            name: self.base[name]
            + sum(weight[k, b] * (self.tuned[t][name] - self.base[name]) for k, t in enumerate(TASKS)) / len(TASKS)
            for name, b in self.block_of.items()
        }

    def entropy(self, merged):
        """The entropy of the answers, summed over tasks."""
        loss = 0
        for task in TASKS:
            own = {name: merged[of] for name, of in self.names[task].items() if of in merged}
            for one in self.inputs[task]:
                logits = torch.func.functional_call(self.models[task], own, kwargs=one).logits
                p = logits.reshape(-1, logits.shape[-1]).softmax(-1)
                loss = loss - (p * p.log()).sum(-1).mean() / len(self.inputs[task])
        return loss

    def by_block(self, weight):
        return {
            block.name: {task: float(weight[k, b]) for k, task in enumerate(TASKS)}
            for b, block in enumerate(self.blocks)
        }


def plain(family, *, granularity="block"):
    """Block -> task -> weight, by torch's Adam."""
    of = Plain(family)
    number = {"block": len(of.blocks), "task": 1}[granularity]
    weight = torch.ones(len(TASKS), number, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        of.entropy(of.merged(weight.expand(-1, len(of.blocks)))).backward()
        optimizer.step()
    return of.by_block(weight.detach().expand(-1, len(of.blocks)))


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


@pytest.mark.parametrize(("granularity", "init"), [("task", 1.0), ("block", 2.4)])
def test_frank_wolfe_moves_the_weights_of_models_towards_models(pictures, tmp_path, granularity, init):
    """In weights, where the program steps in coefficients: θ + γ(s - θ) for the model s of least ⟨gradient, s⟩."""
    family, of = pictures.family, Plain(pictures.family)
    method = f"fw_merging:granularity={granularity},steps=3,rate=0.5,batch_size={NUM_EXAMPLES},init={init}"
    succeeds(*command(family, tmp_path / "c.json", "--method", method))
    start = of.merged(torch.full((len(TASKS), len(of.blocks)), init))
    now, chosen = start, set()
    for step in range(3):
        leaves = {name: value.clone().requires_grad_() for name, value in now.items()}
        of.entropy(leaves).backward()
        vertices = [*of.tuned.values(), start]
        scores = torch.zeros(len(vertices), len(of.blocks), dtype=torch.float64)
        for v, vertex in enumerate(vertices):
            for name, b in of.block_of.items():
                if leaves[name].grad is not None:
                    scores[v, b] += (leaves[name].grad.double() * vertex[name].double()).sum()
        if granularity == "task":
            scores[:] = scores.sum(1, keepdim=True)
        best = scores.argmin(0)
        chosen |= set(best.tolist())
        now = {n: v + 0.5 * 2 / (step + 2) * (vertices[best[of.block_of[n]]][n] - v) for n, v in now.items()}
    assert chosen - {len(TASKS)}, "no step went to a model"
    weights = json.loads((tmp_path / "c.json").read_text())["weights"]
    found = of.merged(torch.tensor([[weights.get(b.name, weights)[task] for b in of.blocks] for task in TASKS]))
    for name, value in now.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_concrete_gates_are_those_of_a_plain_loop(pictures, tmp_path):
    """torch's relaxed Bernoulli with the same uniform numbers, by autograd and Adam."""
    family, of = pictures.family, Plain(pictures.family)
    method = f"concrete:steps={STEPS},lr={LR},batch_size={NUM_EXAMPLES},temperature=0.7,init=2"
    succeeds(*command(family, tmp_path / "c.json", "--method", method))
    sizes = torch.zeros(len(of.blocks), dtype=torch.float64)
    for name, b in of.block_of.items():
        sizes[b] += of.base[name].numel()
    drawn = torch.from_numpy(uniform(key64("flexmerge/concrete/1", 0), 0, STEPS * len(of.blocks)))
    logits = torch.zeros(len(of.blocks), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=LR)

    def weights(mask):
        return (2 * mask / ((sizes * mask).sum() / sizes.sum())).expand(len(TASKS), -1)

    for u in drawn.reshape(STEPS, -1):
        optimizer.zero_grad()
        mask = torch.sigmoid((logits + torch.logit(u)) / 0.7)
        of.entropy({name: value.float() for name, value in of.merged(weights(mask)).items()}).backward()
        optimizer.step()
    expected = of.by_block(weights(torch.sigmoid(logits.detach())))
    found = json.loads((tmp_path / "c.json").read_text())["weights"]
    assert not np.allclose([list(each.values()) for each in expected.values()], 2, atol=LR / 4)
    for block, each in expected.items():
        assert found[block] == pytest.approx(each, abs=2e-3), block


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


@pytest.mark.parametrize("name", [name for name, tuner in TUNERS.items() if not tuner.adds_to_bundle])
def test_the_same_examples_and_seed_give_the_same_bytes(pictures, tmp_path, name):
    options = "--method", f"{name}:steps=3,batch_size=4"
    for file in ("one", "other"):
        succeeds(*command(pictures.family, tmp_path / file, *options))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("method", "code", "says"),
    [
        ("adamerging:steps=0", 2, "steps=0 is not an integer in [1"),
        ("adamerging:speed=1", 2, "no argument `speed`"),
        ("adamerging:lr=1e300", 2, "lr=1e+300 is not a number in (0, 1000]"),
        ("adamerging:init=1e300", 2, "init=1e+300 is not a number in (0, 1000]"),
        ("fw_merging:rate=2", 2, "rate=2 is not a number in (0, 1]"),
        ("concrete:temperature=0", 2, "temperature=0 is not a number in [0.01, 100]"),
        ("concrete:granularity=task", 2, "no argument `granularity`"),
        ("ties", 2, "one of: adamerging, concrete, fw_merging"),
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
        (
            lambda of: [each.update(dict.fromkeys(each, 0.0)) for each in of["weights"].values()],
            2,
            "all weights of the",
        ),
        (lambda of: [each.update(dict.fromkeys(each, 1e308)) for each in of["weights"].values()], 2, "is infinite"),
        (lambda of: next(iter(of["weights"].values())).update(a=float("nan")), 3, "is not a file of coefficients"),
        (lambda of: next(iter(of["weights"].values())).update(a=True), 3, "is not a file of coefficients"),
        (lambda of: next(iter(of["weights"].values())).update(a="1"), 3, "is not a file of coefficients"),
        (lambda of: of.update(weights={"a": True, "b": 1, "c": 1}), 3, "is not a file of coefficients"),
        (lambda of: of["tasks"]["a"].update(weights=of["tasks"]["b"]["weights"]), 3, "task `a`: tuned with weights"),
        (lambda of: of["tasks"].pop("c"), 3, "task `c`: not in the file"),
        (lambda of: of.update(base=of["tasks"]["b"]["weights"]), 3, "the base: tuned with weights"),
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


def test_groups_without_weight_are_refused_before_weights_are_read(pictures, tmp_path):
    """In a centre as in a method, and only where a group has no weight at all."""
    plan, zeros = pictures.family.plan_path, "weighted_average:weights={a: 0, b: 0, c: 0}"
    words = ("merge", plan, "--dry-run", "-o", tmp_path / "never", "--method")
    for method in (zeros, f'low_bit:centre="{zeros}"'):
        fails(2, *words, method, says=("all weights of the group a, b, c are 0", "normalize=false"))
    succeeds(*words, f"{zeros},normalize=count")
    succeeds(*words, "weighted_average:weights={a: 0, b: 0}")
    fails(2, *words, 'low_bit:centre="weighted_average:weights={d: 0}"', says="weights of task `d`")


def test_coefficients_without_a_base_are_read(tuned, tmp_path):
    """Files written before the base was recorded name the tasks alone."""
    family, output = tuned
    fields = json.loads(output.read_text())
    assert fields.pop("base") == family.plan.base.fingerprint
    (tmp_path / "c.json").write_text(json.dumps(fields))
    method = f"weighted_average:weights=@{tmp_path / 'c.json'}"
    succeeds("merge", family.plan_path, "--method", method, "-o", tmp_path / "never", "--dry-run")


def test_force_replaces_coefficients_and_nothing_else(pictures, tmp_path):
    """It replaced none: the file did not begin with its format since the base is in it."""
    words = command(pictures.family, tmp_path / "c.json", "--method", "adamerging:steps=1", "--examples", 1)
    succeeds(*words)
    fails(2, *words, says="exists")
    succeeds(*words, "--force")
    (tmp_path / "c.json").write_text('{"format":"flexmerge.plan/1"}')
    fails(2, *words, "--force", says="is not a file of coefficients")


@pytest.mark.parametrize("command", [calibrate, tune])
@pytest.mark.parametrize("count", [0, -1])
def test_python_refuses_less_than_one_example(pictures, tmp_path, command, count):
    """0 ended in numpy, and with -1 `tune` left out one example."""
    with pytest.raises(UsageError, match=f"{count} examples of each task are too few"):
        command(pictures.family.plan_path, pictures.family.spec, tmp_path / "never", examples=count)


def test_what_is_missing_is_said(pictures, tmp_path):
    plan = pictures.family.plan_path
    nothing = "weighted_average:weights=@nothing.json"
    fails(4, "merge", plan, "--method", nothing, "-o", tmp_path / "b", says="no coefficients at nothing.json")
    fails(2, "tune", plan, "-o", tmp_path / "c.json", says="no --spec")
    fails(2, "tune", plan, "--spec", pictures.family.spec, says=("no output given", "-o coefficients.json"))
    fails(2, "tune", plan, "--spec", pictures.family.spec, "--bundle", "b", says=("no output given", "-o corrected/"))


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
