"""A router finds the task of an input: fitted by `route`, in the bundle, used by `eval --router` and `predict`."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flexmerge_cli import open_bundle
from flexmerge_cli.bundle.manifest_file import read_manifest
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.router import Router
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation import router
from flexmerge_cli.evaluation.router import RouterRequest, fit
from flexmerge_cli.formats.folders import ROUTER_FILE

from ..hostile import sealed
from ..program import fails, flexmerge, succeeds
from . import tiny

N = 30
WORDS = {
    "colours": ["red", "green", "blue"], "numbers": ["one", "two", "three", "four"], "words": ["is", "not", "the"],
    "articles": ["a", "of"], "answers": ["yes", "no", "maybe"], "digits": ["0", "1", "2"], "more": ["3", "4", "5"],
    "signs": ["negative", "positive"],
}  # fmt: skip
LABELS = ["no", "yes"]


def sentences(name: str) -> list[str]:
    rng = np.random.default_rng(len(name))
    return [" ".join(rng.choice(WORDS[name], rng.integers(10, 22))) for _ in range(N)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Eight classifiers of texts that share no word and have their labels, their bundle, spec, and a routed bundle."""
    folder = tmp_path_factory.mktemp("router")
    tasks = {}
    for seed, name in enumerate(WORDS, 1):
        path = tiny.tuned_bert(folder, name, seed, LABELS, size=0.15)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
        inputs = transformers.AutoTokenizer.from_pretrained(path)(sentences(name), padding=True, return_tensors="pt")
        with torch.inference_mode():
            answers = model(**inputs).logits.argmax(1).tolist()
        tiny.rows(folder / f"{name}.jsonl", text=sentences(name), label=[LABELS[n] for n in answers])
        tasks[name] = {"kind": "text-classification", "data": f"{name}.jsonl", "checkpoint": str(path)}
    succeeds("plan", "--base", folder / "base", "--tasks", folder / "tasks", "-o", folder / "plan.json")
    succeeds("merge", folder / "plan.json", "--method", "auto", "--size", "2x", "-o", folder / "merged")
    (folder / "eval.yaml").write_text(json.dumps({"version": 1, "tasks": tasks}))
    succeeds("route", folder / "merged", "--spec", folder / "eval.yaml", "-o", folder / "routed")
    return folder


@pytest.fixture(autouse=True)
def small_perceptrons(monkeypatch):
    monkeypatch.setattr(router, "HIDDEN", (16, 8))


@pytest.fixture(autouse=True)
def shared_cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def test_the_router_is_part_of_the_bundle(place):
    before, after = (read_manifest(place / name) for name in ("merged", "routed"))
    assert after.router.tasks == tuple(WORDS) and after.router.features == "colours" and after.router.kind == "linear"
    assert after.router.examples == dict.fromkeys(WORDS, N) and after.router.accuracy > 0.98
    assert set(after.files) - set(before.files) == {ROUTER_FILE} and after.id != before.id
    assert {name: file.sha256 for name, file in before.files.items()}.items() <= {
        name: file.sha256 for name, file in after.files.items()
    }.items()
    succeeds("inspect", place / "routed", "--verify", "--decode")
    differ = flexmerge("diff", place / "merged", place / "routed", "--json")
    assert differ.code == 7 and "router" in differ.json["settings"] and not differ.json["values"]
    assert "linear router on features of colours: tells 8 tasks" in succeeds("inspect", place / "routed").out
    for name in ("merged", "routed"):  # an export has no router
        succeeds("export", place / name, "--task", "words", "-o", place / f"out-{name}", "--force")
    files = [sorted(path.name for path in (place / f"out-{name}").iterdir()) for name in ("merged", "routed")]
    assert files[0] == files[1]
    weights = next((place / "merged" / "weights").iterdir()).name
    assert (place / "merged" / "weights" / weights).samefile(place / "routed" / "weights" / weights)


def test_the_same_request_gives_the_same_bytes_and_a_router_is_replaced(place, tmp_path):
    for name in ("one", "two"):
        succeeds("route", place / "routed", "--spec", place / "eval.yaml", "-o", tmp_path / name, "--kind", "mlp")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    again = succeeds("route", tmp_path / "one", "--spec", place / "eval.yaml", "-o", tmp_path / "again", "--json").json
    assert again["router"]["kind"] == "linear"
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (place / "routed" / "manifest.json").read_bytes()


def test_a_routed_bundle_is_none_that_sizes_asks_for(place, tmp_path):
    words = ("merge", place / "plan.json", "--method", "auto", "--sizes", "2x", "-o", tmp_path, "--json")
    shutil.copytree(place / "merged", tmp_path / "2x", symlinks=True)
    assert succeeds(*words).json["bundles"]["2x"]["was_there"]
    shutil.rmtree(tmp_path / "2x")
    shutil.copytree(place / "routed", tmp_path / "2x", symlinks=True)
    fails(2, *words, says="exists")


def test_routed_scores_are_those_of_predictions_one_by_one(place):
    document = succeeds("eval", place / "routed", "--spec", place / "eval.yaml", "--router", "--json").json
    routed, bundle = document["router"], open_bundle(place / "routed")
    for name in WORDS:
        rows = [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]
        found = bundle.predict([row["text"] for row in rows])
        record = routed["tasks"][name]
        assert record["to"] == {task: sum(one.task == task for one in found) for task in WORDS}
        right = np.mean([one.label == row["label"] for one, row in zip(found, rows)])  # all heads have the same labels
        assert record["routed"] == pytest.approx(right)
        assert record["true"] == document["tasks"][name]["merged"]
    mean = routed["mean"]
    assert mean["routed_right"] > 0.98 and abs(mean["routed"] - mean["true"]) <= 0.02
    assert mean["true"] > 0.9 > mean["random"]
    page = place / "routed.html"
    shown = succeeds("eval", place / "routed", "--spec", place / "eval.yaml", "--router", "--html", page).out
    assert "routed" in shown and "random" in shown and "ms per example" in shown
    drawn = page.read_text()
    assert "When nobody names the task" in drawn and "ms per example" in drawn
    for name in WORDS:
        counts = routed["tasks"][name]["to"].values()
        assert re.search("".join(f"<td style=[^>]*>{count}</td>" for count in counts), drawn)


def test_classes_without_names_are_no_common_labels(place):
    spec = json.loads((place / "eval.yaml").read_text())
    for name in WORDS:
        rows = [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]
        answers = [LABELS.index(row["label"]) for row in rows]
        tiny.rows(place / f"{name}-numbers.jsonl", text=sentences(name), label=answers)
        spec["tasks"][name] |= {"data": f"{name}-numbers.jsonl", "labels": ["LABEL_0", "LABEL_1"]}
    (place / "unnamed.yaml").write_text(json.dumps(spec))
    document = succeeds("eval", place / "routed", "--spec", place / "unnamed.yaml", "--router", "--json").json
    for name, record in document["router"]["tasks"].items():
        assert record["true"] == document["tasks"][name]["merged"] > 0
        assert record["random"] == pytest.approx(record["true"] / len(WORDS))


def test_limits_and_dtypes_of_a_spec_do_not_reach_the_features(place, tmp_path):
    """`predict` knows no task's own `max_length`, and computes in the stored dtype."""
    spec = json.loads((place / "eval.yaml").read_text())
    for name, task in spec["tasks"].items():
        spec["tasks"][name] = task | {"data": str(place / task["data"]), "max_length": 3, "dtype": "bfloat16"}
    (tmp_path / "short.yaml").write_text(json.dumps(spec))
    succeeds("route", place / "merged", "--spec", tmp_path / "short.yaml", "-o", tmp_path / "routed")
    assert (tmp_path / "routed" / ROUTER_FILE).read_bytes() == (place / "routed" / ROUTER_FILE).read_bytes()
    words = ("eval", place / "routed", "--router", "--json", "--spec")
    found = [succeeds(*words, path).json["router"]["tasks"] for path in (place / "eval.yaml", tmp_path / "short.yaml")]
    assert [each["numbers"]["to"] for each in found] == [found[0]["numbers"]["to"]] * 2


def test_a_prediction_is_what_the_tasks_own_model_says(place):
    bundle = open_bundle(place / "routed")
    texts = ["one two three four two one three", "red blue green red blue red", "is not the not is the is"]
    found = bundle.predict(texts)
    assert [one.task for one in found] == ["numbers", "colours", "words"]
    for text, one in zip(texts, found):
        model = bundle.model(one.task)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "tasks" / one.task)
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].numpy()
        np.testing.assert_allclose(one.outputs, logits, atol=1e-5)
        assert one.label == LABELS[int(logits.argmax())] and 0.5 < one.probability <= 1
    assert bundle.predict([]) == []
    assert [one.task for one in bundle.predict([("one two three four two one", "three")])] == ["numbers"]
    with pytest.raises(UsageError, match="neither a text nor an image"):
        bundle.predict([3.5])
    with pytest.raises(UsageError, match="others are texts"):
        bundle.predict(["one", np.zeros((3, 8, 8))])


def test_images_are_routed(tmp_path):
    tasks, rng = {}, np.random.default_rng(0)
    shifts = {"dark": -200, "light": 200}
    images = {name: rng.normal(shift, 10, (N, 3, 8, 8)).astype(np.float32) for name, shift in shifts.items()}
    for seed, name in enumerate(images):
        path = tiny.vit(tmp_path / "tasks" / name)
        model = transformers.ViTForImageClassification.from_pretrained(path)
        if not seed:
            model.vit.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(path)
        np.savez(tmp_path / f"{name}.npz", image=images[name], label=np.zeros(N, np.int64))
        tasks[name] = {"kind": "image-classification", "data": f"{name}.npz"}
    (tmp_path / "eval.yaml").write_text(json.dumps({"version": 1, "tasks": tasks}))
    succeeds("plan", "--base", tmp_path / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "--method", "auto", "--size", "0.75x", "-o", tmp_path / "bundle")
    arguments = ("--spec", tmp_path / "eval.yaml", "--kind", "centroid", "-o", tmp_path / "routed")
    assert succeeds("route", tmp_path / "bundle", *arguments, "--json").json["router"]["accuracy"] > 0.98
    bundle = open_bundle(tmp_path / "routed")
    for weights in ("dense", "packed"):
        found = bundle.predict([images["light"][0], images["dark"][0], images["dark"][1]], weights=weights)
        assert [one.task for one in found] == ["light", "dark", "dark"]
        with torch.inference_mode():
            model = bundle.model("dark")
            pixels = torch.from_numpy((images["dark"][0] / 255 - 0.5) / 0.25)[None]
            np.testing.assert_allclose(found[1].outputs, model(pixel_values=pixels).logits[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "centroid", "mlp"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_kinds_tell_clusters_apart_and_give_probabilities(kind, tasks):
    rng = np.random.default_rng(tasks)
    y = np.repeat(np.arange(tasks), 30)
    x = (3 * np.eye(tasks, 6)[y] + rng.normal(0, 0.3, (len(y), 6))).astype(np.float32)
    made, accuracy = fit(x, y, RouterRequest(kind=kind))
    found = made.probabilities(x)
    assert accuracy > 0.98 and (found.argmax(1) == y).all()
    np.testing.assert_allclose(found.sum(1), 1)
    if kind == "mlp":
        assert [weight.shape for weight, _ in made.layers] == [(16, 6), (8, 16), (tasks, 8)]
    if kind == "centroid":  # the nearest mean of standardised features
        z = (x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64)
        means = np.stack([z[y == task].mean(0) for task in range(tasks)])
        nearest = ((z[:, None] - means) ** 2).sum(2).argmin(1)
        assert (made.outputs(x).argmax(1) == nearest).all()


def test_probabilities_are_calibrated_where_tasks_overlap():
    rng = np.random.default_rng(3)
    y = np.repeat([0, 1], 400)
    x = (np.where(y, 0.7, -0.7)[:, None] + rng.normal(0, 1, (800, 1))).astype(np.float32)
    for kind in ("linear", "centroid", "mlp"):
        made, accuracy = fit(x, y, RouterRequest(kind=kind))
        assert abs(made.probabilities(x).max(1).mean() - accuracy) < 0.05, kind


def test_bad_input_is_refused_by_name(place, tmp_path):
    spec = json.loads((place / "eval.yaml").read_text())
    for name in WORDS:
        (tmp_path / f"{name}.jsonl").write_text((place / f"{name}.jsonl").read_text())

    def refused(code: int, *more: object, says: object, tasks: object = None) -> None:
        (tmp_path / "spec.yaml").write_text(json.dumps(spec | {"tasks": tasks or spec["tasks"]}))
        fails(code, "route", place / "merged", "--spec", tmp_path / "spec.yaml", "-o", tmp_path / "o", *more, says=says)
        assert not (tmp_path / "o").exists()

    one = {name: spec["tasks"][name] for name in list(WORDS)[:1]}
    refused(2, tasks=one, says="at least two tasks")
    refused(2, "--kind", "forest", says=("forest", "linear, centroid, mlp"))
    refused(2, "--features", "other", says=("other", "colours"))
    refused(2, "--examples", 3, says="too few")
    few = spec["tasks"] | {"words": spec["tasks"]["words"] | {"limit": 4}}
    refused(2, tasks=few, says=("words", "at least 5 examples", "here are 4"))
    outside = spec["tasks"] | {"words": {"kind": "causal-lm", "data": "words.jsonl"}}
    refused(2, tasks=outside, says=("causal-lm", "words"))
    same = {name: task | {"data": "words.jsonl"} for name, task in spec["tasks"].items()}
    (tmp_path / "words.jsonl").write_text('{"text": "is", "label": "no"}\n' * 6)
    refused(3, tasks=same, says="nothing tells them apart")
    fails(
        2,
        "eval",
        place / "merged",
        "--spec",
        place / "eval.yaml",
        "--router",
        says=("has no router", "flexmerge route"),
    )
    with pytest.raises(UsageError, match="has no router"):
        open_bundle(place / "merged").predict(["one"])
    some = {"version": 1, "tasks": one}
    (place / "some.yaml").write_text(json.dumps(some))
    fails(2, "eval", place / "routed", "--spec", place / "some.yaml", "--router", says=("numbers", "words", "8 tasks"))
    assert flexmerge("route", place / "merged", "--spec", place / "eval.yaml", "-o", place / "routed").code == 2


def test_features_that_are_not_finite_are_named(place, tmp_path):
    for name in WORDS:
        model = transformers.BertForSequenceClassification.from_pretrained(place / "tasks" / name)
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.weight.fill_(3e38)
            model.bert.encoder.layer[0].output.LayerNorm.weight.fill_(3e38)
        model.save_pretrained(tmp_path / "tasks" / name)
        for path in (place / "tasks" / name).glob("tokenizer*"):
            (tmp_path / "tasks" / name / path.name).write_bytes(path.read_bytes())
    succeeds("plan", "--base", place / "base", "--tasks", tmp_path / "tasks", "-o", tmp_path / "plan.json")
    succeeds("merge", tmp_path / "plan.json", "-o", tmp_path / "bundle")
    fails(
        3,
        "route",
        tmp_path / "bundle",
        "--spec",
        place / "eval.yaml",
        "-o",
        tmp_path / "o",
        says=("colours", "not finite"),
    )


def test_damage_of_the_router_is_found_and_costs_no_other_file(place, tmp_path):
    succeeds("route", place / "merged", "--spec", place / "eval.yaml", "-o", tmp_path / "routed")
    path = tmp_path / "routed" / ROUTER_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = flexmerge("inspect", tmp_path / "routed", "--verify")
    assert found.code == 5 and ROUTER_FILE in found.out + found.err and "sound tasks: answers" in found.out, found
    succeeds("export", tmp_path / "routed", "--task", "words", "-o", tmp_path / "words")
    open_bundle(tmp_path / "routed").model("words")
    fails(5, "eval", tmp_path / "routed", "--spec", place / "eval.yaml", "--router", says=ROUTER_FILE)


@pytest.mark.parametrize("change", ["accuracy", "tasks", "features", "no router", "file", "temperature", "reader"])
def test_a_manifest_whose_router_does_not_fit_is_refused(place, tmp_path, change):
    fields = json.loads((place / "routed" / "manifest.json").read_bytes())
    router = fields["router"]
    match change:
        case "accuracy":
            router["accuracy"] = 2.0
        case "temperature":
            router["temperature"] = 0.0
        case "tasks":
            router["tasks"] = ["colours", *list(WORDS)[:-1]]
        case "features":
            router["features"] = "other"
        case "reader":
            fields["files"][ROUTER_FILE]["tasks"] = ["words"]
            fields["tasks"]["words"]["files"].append(ROUTER_FILE)
        case "no router":
            fields["router"] = None
        case "file":
            fields["files"]["router/more.safetensors"] = fields["files"][ROUTER_FILE]
    (tmp_path / "manifest.json").write_bytes(sealed(fields, "id"))
    fails(3, "inspect", tmp_path, says="not sound")


def test_arrays_that_do_not_fit_are_refused(place):
    bundle = Bundle.open(place / "routed")
    good = Router.of(bundle)
    assert good.mean.shape == (tiny.WIDTH,) and good.layers[0][0].shape == (8, tiny.WIDTH)
    wrong = bundle.manifest.router.model_copy(update={"tasks": tuple(WORDS)[:2]})
    bundle.manifest.__dict__["router"] = wrong
    with pytest.raises(Exception, match="no router of 2 tasks"):
        Router.of(bundle)
