"""Routers of experts, beside WEMoE as its paper gives it: plain loops over examples and positions, in float64."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import flexmerge_cli
from flexmerge_cli import merge, open_bundle, tune, verify
from flexmerge_cli.bundle.mixture import MixtureLinear
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.router import Router, write_routed
from flexmerge_cli.bundle.wemoe import CROSS_ATTENTION, ExpertRouter, attach
from flexmerge_cli.errors import DataError, IntegrityError, UsageError
from flexmerge_cli.evaluation.loading import build_model
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.formats.folders import WEMOE_FILE
from flexmerge_cli.formats.manifest_records import RouterEntry
from flexmerge_cli.record import NO_DIGEST

from ..bundle.bundles import changed, copy, flip, manifest_of, seal, seal_file
from ..program import fails, stored_sizes, succeeds
from .families import TASKS
from .test_measured import examples, model_of

RANK, UNIT = 3, "vit.encoder.layer.0.mlp"
EXPERTS = {"method": "task_arithmetic:form=sum", "method_for": [f"*.mlp=smile:rank={RANK}"]}


def command(family, output, *options, method="wemoe:steps=4,lr=0.05", bundle="experts"):
    words = ["tune", family.plan_path, "--spec", family.spec, "--bundle", family.folder / bundle, "-o", output]
    return [*words, "--method", method, "--device", "cpu", *options]


@pytest.fixture(scope="module")
def mixed(pictures):
    """The family, the bundle with routers, and what `tune` says. Read only."""
    family, output = pictures.family, pictures.family.folder / "mixed"
    merge(family.plan_path, family.folder / "experts", **EXPERTS)
    return family, output, succeeds(*command(family, output), "--json").json


class Mlp(torch.nn.Module):
    """The two layers of an MLP, whose weights are merged anew for each example."""

    def __init__(self, router, base, of_tasks):
        super().__init__()
        self.router, self.base = router, base
        self.experts = [[truncated(own - base[name]) for name, own in one.items()] for one in of_tasks]
        self.biases = [base[name.replace("weight", "bias")] for name in base if name.endswith("weight")]

    def forward(self, x):
        return torch.stack([self.of_example(one) for one in x])

    def of_example(self, x):
        each = [self.router["w1"] @ torch.clamp(self.router["w0"] @ t + self.router["b0"], min=0) for t in x]
        gates = sum(each) / len(each) + self.router["b1"]
        names = [name for name in self.base if name.endswith("weight")]
        w0, w1 = (
            self.base[name] + sum(g * one[place] for g, one in zip(gates, self.experts))
            for place, name in enumerate(names)
        )
        inside = torch.nn.functional.gelu(x @ w0.T + self.biases[0])
        return inside @ w1.T + self.biases[1]


def truncated(delta):
    u, s, vh = torch.linalg.svd(delta)
    return u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]


def reference(family, router, task):
    """The task's model in float64: its own head, 0.3 Σ τ on the base elsewhere, and the MLP as above."""
    states = {one: {k: v.double() for k, v in model_of(family, one).state_dict().items()} for one in TASKS}
    model = model_of(family, task).double()
    base = model.state_dict() | {
        k: v.double() for k, v in type(model).from_pretrained(family.folder / "base").state_dict().items()
    }
    merged = {k: base[k] + 0.3 * sum(states[one][k] - base[k] for one in TASKS) for k in base}
    model.load_state_dict(merged | {k: v for k, v in states[task].items() if k.startswith("classifier")})
    keys = [k for k in base if ".mlp." in k]
    weights = [{k: states[one][k] for k in keys if k.endswith("weight")} for one in TASKS]
    path = keys[0].rpartition(".mlp.")[0] + ".mlp"
    model.set_submodule(path, Mlp(router, {k: base[k] for k in keys}, weights))
    return model


def logits(model, inputs):
    with torch.inference_mode():
        return torch.cat([model(**one).logits for one in inputs])


def test_models_compute_what_the_paper_says(mixed):
    family, output, told = mixed
    arrays = {name: value.double() for name, value in load_file(output / WEMOE_FILE).items()}
    assert {name.partition("@")[0] for name in arrays} == {UNIT}
    router = {role: arrays[f"{UNIT}@{role}.a"] for role in ("w0", "b0", "w1", "b1")}
    assert float(router["w1"].abs().max()) > 0.01, "the routers were trained"
    bundle, without = open_bundle(output), open_bundle(family.folder / "experts")
    for task in TASKS:
        inputs = examples(family, task)
        inside = [{key: value.double() for key, value in one.items()} for one in inputs]
        expected = logits(reference(family, router, task), inside)
        for model in (bundle.model(task), bundle.runtime().model(task), scored_model(output, task)):
            torch.testing.assert_close(logits(model, inputs).double(), expected, atol=2e-5, rtol=1e-4)
        assert (logits(without.model(task), inputs) - expected).abs().max() > 1e-3
        row = told["tasks"][task]
        assert (row["examples"], row["after"] < row["before"]) == (len(inputs), True)
    batch = torch.cat([examples(family, task)[0]["pixel_values"] for task in TASKS])
    for task, found in zip(TASKS, bundle.runtime()({"pixel_values": batch}, list(TASKS))):
        expected = logits(bundle.model(task), examples(family, task)[:1])[0]
        torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=1e-5)


def scored_model(path, task):
    return build_model(bundle_model(Bundle.open(path), task), None, "cpu")


@pytest.mark.parametrize("layers", [1, 2])
def test_routers_start_at_the_merging_coefficient(mixed, tmp_path, layers):
    """What they compute is `init` for any input, so that the weights start as those of task arithmetic."""
    family, _, _ = mixed
    succeeds(*command(family, tmp_path / "b", method=f"wemoe:layers={layers},steps=1,lr=1e-12,init=0.25"))
    layer = open_bundle(tmp_path / "b").model("b").vit.layers[0].mlp.fc1
    assert isinstance(layer, MixtureLinear) and layer.router.depth == layers
    gates = layer.router(torch.randn(5, 7, layer.weight.shape[1]))
    torch.testing.assert_close(gates, torch.full((5, 1, 3), 0.25), atol=1e-6, rtol=0)


def test_padding_does_not_weigh():
    """The weights of an example depended on how far the batch was padded."""
    w0 = torch.arange(8.0).reshape(2, 4)
    router = ExpertRouter({"w0": w0, "b0": torch.ones(2)})
    x, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model = torch.nn.Identity()
    attach(model, {"u": (router, {}, "")})
    model.forward = lambda x, attention_mask=None: router(x)
    padded = model(x, attention_mask=mask)
    for place, kept in enumerate((x[0, :2], x[1, 2:], x[2])):
        torch.testing.assert_close(padded[place, 0], (kept @ w0.T + 1).mean(0))
        torch.testing.assert_close(model(kept[None])[0, 0], padded[place, 0])
    torch.testing.assert_close(model(x[:, -1:], attention_mask=mask.clamp(min=1))[:, 0], x[:, -1] @ w0.T + 1)
    assert router.bfloat16()(x.bfloat16()).dtype == torch.float32, "casting the model broke it"


def test_a_mask_counts_wherever_a_model_is_entered_and_then_no_more():
    """Features for a router of tasks come from the model without its head: they had the mask of another batch."""
    router = ExpertRouter({"w0": torch.ones(2, 4), "b0": torch.ones(2)})
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    model, base = torch.nn.Identity(), torch.nn.Identity()
    base.forward = lambda x, attention_mask=None: router(x)
    model.forward = lambda x, attention_mask=None: base(x)
    model.base_model = base
    attach(model, {"u": (router, {}, "")})
    kept, whole = torch.stack([router(x[:1, :2])[0, 0], router(x[1:, :1])[0, 0]]), router(x)[:, 0]
    for entered in (model, base):
        torch.testing.assert_close(entered(x, attention_mask=mask)[:, 0], kept)
        torch.testing.assert_close(base(x)[:, 0], whole)


def test_encoder_and_decoder_have_masks_of_their_own():
    """The decoder's layers counted the positions of the encoder's mask, and an encoder alone all positions."""
    layers = {name: MixtureLinear.__new__(MixtureLinear) for name in ("encoder", "decoder")}
    routers = {name: ExpertRouter({"w0": torch.ones(2, 4), "b0": torch.ones(2)}) for name in layers}
    encoder, model = torch.nn.Identity(), torch.nn.Identity()
    for name, layer in layers.items():
        torch.nn.Module.__init__(layer)
        (encoder if name == "encoder" else model).add_module("layer", layer)
    encoder.forward = lambda x, attention_mask=None: routers["encoder"](x)
    model.encoder, model.config = encoder, SimpleNamespace(is_encoder_decoder=True)
    model.get_encoder = lambda: encoder
    model.forward = lambda x, attention_mask=None, decoder_attention_mask=None: (
        encoder(x, attention_mask=attention_mask), routers["decoder"](x)
    )  # fmt: skip
    attach(model, {name: (routers[name], {"w": layer}, "w") for name, layer in layers.items()})
    x, first, last = torch.randn(1, 3, 4), torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 1]])
    means = [x[:, 0], x[:, 1:].mean(1), x.mean(1)]
    of_first, of_last, of_all = ((mean @ torch.ones(4, 2) + 1)[:, None] for mean in means)
    for given, expected in (
        ({"attention_mask": first}, (of_first, of_all)),
        ({"attention_mask": first, "decoder_attention_mask": last}, (of_first, of_last)),
        ({"decoder_attention_mask": last}, (of_all, of_last)),
    ):
        for found, weights in zip(model(x, **given), expected):
            torch.testing.assert_close(found, weights)
    torch.testing.assert_close(encoder(x, attention_mask=last), of_last)
    # Keys and values of cross-attention read what the encoder made.
    name = "decoder.layers.0.encoder_attn.k_proj.weight"
    attach(model, {"decoder": (routers["decoder"], {name: layers["decoder"]}, name)})
    torch.testing.assert_close(model(x, attention_mask=first)[1], of_first)


def test_cross_attention_is_called_as_block_rules_call_it():
    rules = Path(flexmerge_cli.__file__).parent / "family/rules.yaml"
    assert set(yaml.safe_load(rules.read_text())["words"]["cross_attention"]) == CROSS_ATTENTION


def test_the_same_request_makes_the_same_bundle_and_every_byte_counts(mixed, tmp_path):
    family, output, _ = mixed
    asked = {"method": "wemoe:steps=4,lr=0.05", "bundle": family.folder / "experts", "device": "cpu"}
    tune(family.plan_path, family.spec, tmp_path / "again", **asked)
    assert (tmp_path / "again/manifest.json").read_bytes() == (output / "manifest.json").read_bytes()
    assert (tmp_path / "again" / WEMOE_FILE).read_bytes() == (output / WEMOE_FILE).read_bytes()
    assert verify(output, decode=True).bad == {}
    summary = succeeds("inspect", output, "--json").json
    assert summary["total_bytes"] == sum(stored_sizes(output).values())
    assert summary["wemoe"] == manifest_of(output)["wemoe"] and set(summary["wemoe"]["data"]) == set(TASKS)
    assert f"weigh the experts of {UNIT}" in succeeds("inspect", output).out
    digests = {bundle_model(Bundle.open(path), "a").digest for path in (output, family.folder / "experts")}
    assert len(digests) == 2, "scores of one are not those of the other"


def test_nothing_else_stands_for_the_models(mixed, tmp_path):
    family, output, _ = mixed
    fails(2, "export", output, "--task", "a", "-o", tmp_path / "out", says=("is a mixture of experts", "open_bundle"))
    fails(2, "update", output, "--plan", family.plan_path, "-o", tmp_path / "new", says="wemoe` fitted to")
    fails(2, *command(family, tmp_path / "b", bundle="mixed", method="surgery:rank=0"), says="rank=0 is not")


def test_damage_is_found_and_what_does_not_fit_is_refused(mixed, tmp_path):
    _, output, _ = mixed
    damaged = copy(output, tmp_path / "damaged")
    flip(damaged / WEMOE_FILE)
    assert list(verify(damaged).bad) == [WEMOE_FILE]
    with pytest.raises(IntegrityError, match=r"wemoe\.safetensors"):
        open_bundle(damaged).model("a")

    def other(role, value):
        found = copy(output, tmp_path / role)
        arrays = load_file(output / WEMOE_FILE) | {f"{UNIT}@{role}.a": value}
        (found / WEMOE_FILE).unlink()
        save_file(arrays, found / WEMOE_FILE)
        seal_file(found, WEMOE_FILE)
        return found

    wrong = {"w1": torch.zeros(2, 8), "b1": torch.full((3,), np.nan), "w0": torch.zeros(8), "b0": torch.zeros(7)}
    for role, value in wrong.items():
        with pytest.raises(Exception, match="no sound router for"):
            open_bundle(other(role, value)).model("a")

    def of_a_bias(fields):
        fields["wemoe"]["first"][UNIT] = fields["wemoe"]["first"][UNIT].replace("weight", "bias")

    with pytest.raises(Exception, match="no sound router for"):
        open_bundle(changed(output, tmp_path / "bias", of_a_bias)).model("a")
    for name, change in {
        "tasks": lambda fields: fields["wemoe"]["data"].pop("a"),
        "units": lambda fields: fields["wemoe"]["first"].update(z="z"),
        "tensors": lambda fields: fields["wemoe"]["first"].update({UNIT: "z"}),
    }.items():
        fails(3, "inspect", changed(output, tmp_path / name, change), says="routers of experts")

    def fewer(fields):
        for key in ("examples", "data"):
            del fields["wemoe"][key]["a"]

    found = Bundle.open(changed(output, tmp_path / "fewer", fewer))
    assert found.manifest.added_files("a") == (WEMOE_FILE,), "scores of other routers stood for its own"


def test_units_without_a_router_keep_their_gates(mixed, tmp_path):
    """A unit that no model ran while routers were trained made every model of the bundle an error."""
    family, _, _ = mixed
    experts = {**EXPERTS, "method_for": [f"*.{part}=smile:rank={RANK}" for part in ("mlp", "attention")]}
    merge(family.plan_path, tmp_path / "experts", **experts)
    asked = {"method": "wemoe:steps=1,layers=1", "bundle": tmp_path / "experts", "device": "cpu"}
    tune(family.plan_path, family.spec, tmp_path / "both", **asked)
    fields = manifest_of(tmp_path / "both")
    (other,) = set(fields["wemoe"]["first"]) - {UNIT}
    found = changed(tmp_path / "both", tmp_path / "one", lambda fields: fields["wemoe"]["first"].pop(other))
    layers = {
        name: layer for name, layer in open_bundle(found).model("a").named_modules() if isinstance(layer, MixtureLinear)
    }
    assert {".mlp." in name for name in layers} == {True, False}
    assert all((layer.router is not None) == (".mlp." in name) for name, layer in layers.items())

    (unit,) = (unit for unit in fields["units"] if unit["name"] == other)
    later = next(name for name in unit["tensors"] if "value" in name and name.endswith("weight"))
    found = changed(
        tmp_path / "both", tmp_path / "later", lambda fields: fields["wemoe"]["first"].update({other: later})
    )
    with pytest.raises(DataError, match="does not run first"):
        logits(open_bundle(found).model("a"), examples(family, "a"))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("wemoe:layers=3", (), "layers=3 is not an integer in [1, 2]"),
        ("wemoe:steps=0", (), "steps=0 is not"),
        ("wemoe:rank=2", (), "no argument `rank`"),
        ("wemoe", ("--examples", "0"), "examples"),
    ],
)
def test_what_means_nothing_is_refused(mixed, tmp_path, method, options, says):
    fails(2, *command(mixed[0], tmp_path / "b", *options, method=method), says=says)
    assert not (tmp_path / "b").exists()


def test_wemoe_needs_experts_of_the_plan(mixed, tmp_path):
    family, _, _ = mixed
    asked = "tune", family.plan_path, "--spec", family.spec, "-o", tmp_path / "b", "--method", "wemoe"
    fails(2, *asked, says="`wemoe` adds to a bundle, and none is given")
    merge(family.plan_path, tmp_path / "merged", method="average")
    merge(family.plan_path, tmp_path / "copies", **EXPERTS | {"method_for": ["*.mlp=smile:rank=8"]})
    for without in ("merged", "copies"):  # The second told of an unsound manifest once it had trained.
        fails(2, *command(family, tmp_path / "b", bundle=tmp_path / without), says=("is a mixture", "smile"))
    corrected = tmp_path / "corrected"
    tune(family.plan_path, family.spec, corrected, bundle=family.folder / "experts", method="surgery:rank=1,steps=1")
    fails(2, *command(family, tmp_path / "b", bundle=corrected), says="has a surgery")
    entry = RouterEntry(
        kind="linear", features="a", tasks=("a", "b"), temperature=1, accuracy=1, examples=dict.fromkeys("ab", 1),
        data=dict.fromkeys("ab", NO_DIGEST),
    )  # fmt: skip
    one = np.ones(2, np.float32)
    router = Router(mean=one, scale=one, layers=((np.ones((2, 2), np.float32), one),), temperature=1)
    write_routed(Bundle.open(family.folder / "experts"), router, entry, tmp_path / "routed")
    fails(2, *command(family, tmp_path / "b", bundle=tmp_path / "routed"), says="has a router")
    fields = manifest_of(other := copy(family.folder / "experts", tmp_path / "other"))
    fields["tasks"]["a"]["fingerprint"] = fields["tasks"]["b"]["fingerprint"]
    seal(other, fields)
    fails(3, *command(family, tmp_path / "b", bundle=other), says="`a` of")


def test_outputs_that_are_not_finite_are_an_error(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr("flexmerge_cli.calibration.mix.entropy", lambda logits: logits.sum() * float("inf"))
    family, _, _ = mixed
    fails(3, *command(family, tmp_path / "b"), says=("task `a`: the outputs", "not finite"))
    with pytest.raises(UsageError, match="--bundle is for surgery or wemoe"):
        tune(family.plan_path, family.spec, tmp_path / "b", bundle=family.folder / "experts", method="adamerging")
