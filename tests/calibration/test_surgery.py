"""Corrections of a bundle's models, beside the formula of Representation Surgery and a plain Adam in numpy."""

import json
import shutil

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmerge_cli import merge, open_bundle, push, tune, verify
from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.bundle.added import write_added
from flexmerge_cli.bundle.card import is_own_card
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.surgery import CorrectedLinear
from flexmerge_cli.bundle.view import View, load_model
from flexmerge_cli.calibration.surgery import surgery
from flexmerge_cli.engine.product import build_of
from flexmerge_cli.errors import IntegrityError, UsageError
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.formats.folders import ROUTER_FILE, SURGERY_FILE
from flexmerge_cli.merging_sizes import is_there
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.vllm_plugin import task_view

from ..bundle.bundles import changed, copy, flip, seal
from ..program import fails, flexmerge, stored_sizes, succeeds
from .families import TASKS
from .test_measured import examples

RANK = 3


def command(family, output, *options, method=f"surgery:rank={RANK},steps=60,lr=0.01", bundle="merged"):
    words = ["tune", family.plan_path, "--spec", family.spec, "--bundle", family.folder / bundle, "-o", output]
    return [*words, "--method", method, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def fitted(pictures):
    """The family, the corrected bundle, and what `tune` says. Read only."""
    family, output = pictures.family, pictures.family.folder / "corrected"
    merge(family.plan_path, family.folder / "merged", method="average")
    return family, output, succeeds(*command(family, output), "--json").json


def features(model, inputs):
    """What the classifier gets, [n, d]."""
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    with torch.inference_mode():
        for one in inputs:
            model(**one)
    hook.remove()
    return torch.cat(seen)


def test_factors_descend_as_autograd_and_a_plain_adam_say():
    rng = np.random.default_rng(0)
    start, wanted = (torch.from_numpy(rng.normal(size=(5, 4)).astype(np.float32)) for _ in range(2))
    args = {"rank": 2, "lr": 0.05, "batch_size": 5}
    values = [value.double().requires_grad_() for value in surgery(start, wanted, 7, steps=1, **args | {"lr": 1e-30})]
    means = [[0.0, 0.0], [0.0, 0.0]]
    for step in range(1, 7):
        down, up = values
        z = start.double()
        loss = (z - torch.clamp(z @ down.T, min=0) @ up.T - wanted.double()).abs().mean()
        for place, gradient in enumerate(torch.autograd.grad(loss, values)):
            means[place] = [0.9 * means[place][0] + 0.1 * gradient, 0.999 * means[place][1] + 0.001 * gradient**2]
            first, second = means[place][0] / (1 - 0.9**step), means[place][1] / (1 - 0.999**step)
            values[place] = (values[place] - 0.05 * first / (second**0.5 + 1e-8)).detach().requires_grad_()
    for found, expected in zip(surgery(start, wanted, 7, steps=6, **args), values):
        torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=1e-4)


def test_models_classify_corrected_features(fitted):
    family, output, told = fitted
    factors, plain = load_file(output / SURGERY_FILE), open_bundle(family.folder / "merged")
    bundle = open_bundle(output)
    for task in TASKS:
        model, inputs = plain.model(task), examples(family, task)
        z = features(model, inputs)
        down, up = factors[f"{task}@down"], factors[f"{task}@up"]
        assert (down.shape, up.shape) == ((RANK, z.shape[1]), (z.shape[1], RANK))
        expected = model.classifier(z - torch.clamp(z @ down.T, min=0) @ up.T)
        for found in (bundle.model(task), bundle.runtime().model(task), build_model(scored(output, task), None, "cpu")):
            with torch.inference_mode():
                logits = torch.cat([found(**one).logits for one in inputs])
            torch.testing.assert_close(logits, expected.detach(), atol=1e-5, rtol=1e-5)
        row = told["tasks"][task]
        assert 0 < row["after"] < row["before"]
        assert row["layer"] == bundle.manifest.surgery.layers[task] == "classifier.weight"
    assert scored(output, "a").digest != scored(family.folder / "merged", "a").digest


def scored(path, task):
    return bundle_model(Bundle.open(path), task)


def test_the_same_request_makes_the_same_bundle_and_every_byte_counts(fitted, tmp_path):
    family, output, _ = fitted
    asked = {"method": f"surgery:rank={RANK},steps=60,lr=0.01", "bundle": family.folder / "merged", "device": "cpu"}
    tune(family.plan_path, family.spec, tmp_path / "again", **asked)
    assert (tmp_path / "again/manifest.json").read_bytes() == (output / "manifest.json").read_bytes()
    assert (tmp_path / "again" / SURGERY_FILE).read_bytes() == (output / SURGERY_FILE).read_bytes()
    assert verify(output, decode=True).bad == {}
    summary = succeeds("inspect", output, "--json").json
    assert summary["total_bytes"] == sum(stored_sizes(output).values())
    assert summary["surgery"]["rank"] == RANK
    assert "surgery" in succeeds("inspect", output).out
    assert "surgery" in flexmerge("diff", family.folder / "merged", output).out
    request = merge_request(method="average")
    layout = allocate(family.plan, request)
    assert is_there(family.folder / "merged", layout, build_of(layout, torch.device("cpu")))
    assert not is_there(output, layout, build_of(layout, torch.device("cpu"))), "`merge --sizes` makes no corrections"


def test_nothing_else_stands_for_a_corrected_model(fitted, tmp_path):
    family, output, _ = fitted
    for options in (["--task", "a"], ["--all"], ["--as-lora"], ["--task", "a", "--link"]):
        fails(2, "export", output, *options, "-o", tmp_path / "out", says=("is corrected", "open_bundle"))
    with pytest.raises(UsageError, match="is corrected"):
        task_view(str(output / "tasks" / "a"))
    fails(2, "update", output, "--plan", family.plan_path, "-o", tmp_path / "new", says="surgery` fitted")


def test_one_task_of_a_bundle_at_an_address_is_corrected(fitted):
    """Its factors were not fetched, and the model could not be built."""
    _, output, _ = fitted
    push(output, "memory://packed/corrected")
    located = locate("memory://packed/corrected", tasks=["a"])
    assert isinstance(load_model(View(located.open(), "a")).classifier, CorrectedLinear)
    fsspec.filesystem("memory").rm("/packed", recursive=True)


def test_the_card_of_a_corrected_bundle_promises_no_export(fitted):
    """It was the card of the bundle before, with a command that is refused, and scores of other models."""
    family, output, _ = fitted
    before, after = ((bundle / "README.md").read_text() for bundle in (family.folder / "merged", output))
    assert "flexmerge export" in before and "flexmerge export" not in after
    assert "loads without the corrections" in after and is_own_card(output / "README.md")


def test_a_damaged_correction_is_not_linked_into_another_bundle(fitted, tmp_path):
    _, output, _ = fitted
    damaged = copy(output, tmp_path / "damaged")
    flip(damaged / SURGERY_FILE)
    with pytest.raises(IntegrityError, match=r"surgery\.safetensors: sha256 differs"):
        write_added(Bundle.open(damaged), ROUTER_FILE, {}, tmp_path / "routed", key="router", entry={})
    assert not (tmp_path / "routed").exists()


def test_damage_is_found_and_what_does_not_fit_is_refused(fitted, tmp_path):
    _, output, _ = fitted
    damaged = copy(output, tmp_path / "damaged")
    flip(damaged / SURGERY_FILE)
    assert list(verify(damaged).bad) == [SURGERY_FILE]
    with pytest.raises(IntegrityError, match=r"surgery\.safetensors"):
        open_bundle(damaged).model("a")

    def wider(fields):
        fields["surgery"]["rank"] = RANK + 1

    with pytest.raises(Exception, match="no sound correction for"):
        open_bundle(changed(output, tmp_path / "wider", wider)).model("a")

    def of_others(fields):
        fields["surgery"]["layers"]["z"] = "classifier.weight"

    def without(fields):
        del fields["surgery"]

    for name, change in (("others", of_others), ("without", without)):
        fails(3, "inspect", changed(output, tmp_path / name, change), says="surgery")


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("surgery:rank=0", (), "rank=0 is not"),
        ("surgery:steps=0", (), "steps=0 is not"),
        ("surgery:ranks=2", (), "ranks"),
        ("adamerging", (), "--bundle is for surgery"),
        ("surgery", ("--examples", "0"), "examples"),
    ],
)
def test_what_means_nothing_is_refused(fitted, tmp_path, method, options, says):
    fails(2, *command(fitted[0], tmp_path / "b", *options, method=method), says=says)
    assert not (tmp_path / "b").exists()


def test_surgery_needs_a_bundle_of_the_plan(fitted, tmp_path):
    family, _, _ = fitted
    asked = "tune", family.plan_path, "--spec", family.spec, "-o", tmp_path / "b", "--method", "surgery"
    fails(2, *asked, says="`surgery` adds to a bundle, and none is given")
    fails(2, *command(family, family.folder / "corrected"), says="exists")
    other = shutil.copytree(family.folder / "merged", tmp_path / "other", symlinks=True)
    fields = json.loads((other / "manifest.json").read_bytes())
    fields["tasks"]["a"]["fingerprint"] = fields["tasks"]["b"]["fingerprint"]
    seal(other, fields)
    fails(3, *command(family, tmp_path / "b", bundle=other), says="`a` of")
