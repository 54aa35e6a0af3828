"""Methods that read a calibration, beside dense normal equations in float64; and what does not fit together."""

import hashlib
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flexmerge_cli import calibrate, merge, open_bundle
from flexmerge_cli.formats.calibration import Moments
from flexmerge_cli.methods.method import Where
from flexmerge_cli.methods.registry import parse_call

from ..program import fails, succeeds, tree
from .families import TASKS

CASES = {"linear": (5, 7), "conv1d": (7, 5), "conv2d": (5, 2, 2, 2)}
NUM_INPUTS = {"linear": 7, "conv1d": 7, "conv2d": 8}


def packed(gram):
    return gram[np.tril_indices(len(gram))].astype(np.float32)


class Source:
    """Stands for a calibration of one tensor."""

    def __init__(self, measured):
        self.found = measured

    def scope(self, reads, tensor):
        return "tensor"

    def measured(self, reads, where, count):
        return self.found


def called(text, deltas, measured, shape, start=0):
    from dataclasses import replace

    call = replace(parse_call(text), source=Source(measured))
    where = Where(tasks=TASKS, tensor="t", start=start, shape=shape)
    return call(torch.from_numpy(deltas), where).double().numpy()


def drawn(layout, *, rows, seed=0, constant=0):
    """Task vectors [3, *shape], inputs of each task, and their moments; `constant` features are equal in every row."""
    rng, n = np.random.default_rng(seed), NUM_INPUTS[layout]
    deltas = rng.normal(size=(3, *CASES[layout])).astype(np.float32)
    inputs = [rng.normal(size=(rows, n)) + rng.normal(size=n) for _ in TASKS]
    for x in inputs:
        x[:, :constant] = 1.5
    grams = [x.T @ x / len(x) for x in inputs]
    return deltas, inputs, grams, Moments(layout=layout, arrays=[packed(gram) for gram in grams])


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("alpha", [0.9, 1.0, 0.0])
def test_regmean_solves_the_normal_equations(layout, alpha):
    deltas, _, grams, measured = drawn(layout, rows=50)
    found = called(f"regmean:alpha={alpha}", deltas, measured, CASES[layout])
    scaled = [np.where(np.eye(len(g)) > 0, g, alpha * g) for g in grams]
    flat = [d.reshape(d.shape[0], -1).astype(np.float64) for d in deltas]
    flat = [d.T if layout == "conv1d" else d for d in flat]
    expected = sum(d @ g for d, g in zip(flat, scaled)) @ np.linalg.inv(sum(scaled))
    expected = (expected.T if layout == "conv1d" else expected).reshape(CASES[layout])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("layout", CASES)
def test_regmean_without_scaling_is_least_squares_of_the_outputs(layout):
    deltas, inputs, _, measured = drawn(layout, rows=40, seed=1)
    found = called("regmean:alpha=1", deltas, measured, CASES[layout])
    flat = [d.reshape(d.shape[0], -1).T.astype(np.float64) for d in deltas]
    flat = [d.T if layout == "conv1d" else d for d in flat]
    expected = np.linalg.lstsq(np.concatenate(inputs), np.concatenate([x @ d for x, d in zip(inputs, flat)]))[0]
    expected = expected if layout == "conv1d" else expected.T
    np.testing.assert_allclose(found, expected.reshape(CASES[layout]), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_of_one_example_the_mean_stays_where_no_input_reaches(rows, alpha):
    """Fewer rows than features, and constant features: the sum of the moments is singular."""
    deltas, inputs, _, measured = drawn("linear", rows=rows, constant=7 if rows == 2 else 0)
    found = called(f"regmean:alpha={alpha}", deltas, measured, CASES["linear"])
    assert np.isfinite(found).all()
    if alpha == 1:
        away = np.linalg.svd(np.concatenate(inputs))[2][3 if rows == 1 else 1 :]  # directions that no input has
        np.testing.assert_allclose((found - deltas.astype(np.float64).mean(0)) @ away.T, 0, atol=1e-4)


def test_features_that_are_always_zero_keep_the_mean():
    deltas, _, grams, _ = drawn("linear", rows=40)
    for gram in grams:
        gram[2], gram[:, 2] = 0, 0
    measured = Moments(layout="linear", arrays=[packed(gram) for gram in grams])
    found = called("regmean", deltas, measured, CASES["linear"])
    np.testing.assert_allclose(found[:, 2], deltas.astype(np.float64).mean(0)[:, 2], atol=1e-6)


def test_equal_tasks_are_given_back():
    deltas, _, _, measured = drawn("linear", rows=3)
    same = np.repeat(deltas[:1], 3, axis=0)
    np.testing.assert_allclose(called("regmean", same, measured, CASES["linear"]), same[0], rtol=1e-6)


def test_rows_of_a_table_are_weighted_by_how_often_they_were_looked_up():
    rng = np.random.default_rng(0)
    deltas, counts = (
        rng.normal(size=(3, 4, 6)).astype(np.float32),
        np.array([[0.5, 0, 0.5, 0], [1, 0, 0, 0], [0, 0, 1, 0]]),
    )
    measured = Moments(layout="embedding", arrays=list(counts.astype(np.float32)))
    flat = deltas.reshape(3, -1)[:, 3:20]  # a range that begins and ends within a row
    found = called("regmean", np.ascontiguousarray(flat), measured, (4, 6), start=3)
    weight = np.where(counts.sum(0) > 0, counts, 1)
    expected = (weight[:, :, None] * deltas).sum(0) / weight.sum(0)[:, None]
    np.testing.assert_allclose(found, expected.ravel()[3:20], rtol=1e-6)


def test_mapped_counts_bring_no_warning():
    """torch warned on the terminal that the arrays of a calibration, which are mapped, cannot be written to."""
    counts = np.ones(4, np.float32)
    counts.flags.writeable = False
    measured, deltas = Moments(layout="embedding", arrays=[counts] * 3), np.ones((3, 8), np.float32)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            called("regmean", deltas, measured, (4, 2))
    finally:
        torch.set_warn_always(False)


def test_fisher_weighs_each_element():
    rng = np.random.default_rng(0)
    deltas, fisher = rng.normal(size=(3, 9)).astype(np.float32), rng.random((3, 9)).astype(np.float32)
    fisher[2], means = 0, [0.5, 0.25, 0.0]
    found = called("fisher:floor=0.1", deltas, (fisher, means), (9,))
    weights = np.stack([fisher[0] / 0.5 + 0.1, fisher[1] / 0.25 + 0.1, np.full(9, 0.1)])
    np.testing.assert_allclose(found, (weights * deltas).sum(0) / weights.sum(0), rtol=1e-5)
    assert np.allclose(called("fisher:floor=0", deltas, (np.zeros_like(fisher), [0, 0, 0]), (9,)), deltas.mean(0))


@pytest.mark.parametrize("method", ["regmean:alpha=1", "fisher"])
def test_a_bundle_is_dense_and_has_the_outputs_nearest_to_those_of_the_tasks(done, tmp_path, method):
    family, folder = done.family, tmp_path / "bundle"
    arguments = ["merge", family.plan_path, "--method", method, "--size", "1.3x", "--force", "--device", "cpu"]
    succeeds(*arguments, "--calibration", done.output, "-o", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    calibration = family.read(done.output)
    assert manifest["calibration"] == calibration.digest
    assert manifest["request"]["command"].endswith("--calibration calibration/ -o bundle/")
    bundle = open_bundle(folder)
    assert {kind for unit in manifest["units"] for group in unit["groups"] for kind in [group["kind"]]} <= {
        "copy",
        "merged",
    }
    bundle.model("a")
    # The same numbers for any number of threads.
    succeeds(*arguments, "--calibration", done.output, "--threads", 3, "-o", tmp_path / "other")
    assert tree(folder) == tree(tmp_path / "other")
    if method == "fisher":
        return
    for name, entry in calibration.index.tasks["a"].inputs.items():
        groups = [g for u in manifest["units"] if name in u["tensors"] for g in u["groups"] if g["kind"] == "merged"]
        if entry.layout == "embedding" or not groups:
            continue
        names = groups[0]["tasks"]
        moments = calibration.measured("inputs", Where(tasks=tuple(names), tensor=name, start=0, shape=()), 0)
        weights = {task: family.weights(task)[name].double().numpy() for task in names}
        value = bundle.view(names[0])[name].double().numpy()
        turned = entry.layout == "conv1d"

        def loss(candidate, weights=weights, moments=moments, turned=turned):
            apart = [candidate - own for own in weights.values()]
            apart = [(d.T if turned else d).reshape(d.shape[1 if turned else 0], -1) for d in apart]
            return sum(float(np.sum((d @ moments[k].astype(np.float64)) * d)) for k, d in enumerate(apart))

        assert loss(value) <= loss(sum(weights.values()) / len(weights)) * (1 + 1e-6)


def test_python_gives_the_same_bytes(pictures, tmp_path):
    family = pictures.family
    calibrate(family.plan_path, family.spec, tmp_path / "calibration", device="cpu")
    assert tree(tmp_path / "calibration") == tree(pictures.output)
    merge(family.plan_path, tmp_path / "a", method="low_bit:centre=regmean", calibration=tmp_path / "calibration")
    options = ["--method", "low_bit:centre=regmean", "--calibration", pictures.output, "-o", tmp_path / "b"]
    succeeds("merge", family.plan_path, *options)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_recipe_takes_a_calibration_beside_it(pictures, tmp_path):
    family = pictures.family
    recipe = {
        "version": 1,
        "base": str(family.folder / "base"),
        "tasks": {task: str(family.folder / "tasks" / task) for task in TASKS},
        "merge": {"method": "regmean", "size": "1.3x", "calibration": "calibration"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(pictures.output, tmp_path / "calibration")
    succeeds("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "bundle")


def test_a_curve_gives_the_calibration_to_those_that_read_it(pictures, tmp_path):
    family = pictures.family
    spec = yaml.safe_load(family.spec.read_text())
    for task in TASKS:
        shown = np.load(family.folder / f"{task}.npz")["images"]
        np.savez(tmp_path / f"{task}.npz", images=shown, label=np.arange(len(shown)) % 3)
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(spec))
    words = ["curve", family.plan_path, "--spec", tmp_path / "eval.yaml", "--sizes", "1.3x", "--calibration"]
    points = succeeds(*words, pictures.output, "--method", "average", "--method", "regmean", "--json").json["points"]
    assert [("--calibration" in point["command"]) for point in points] == [False, True]
    fails(2, *words, pictures.output, "--method", "average", says="--calibration has no effect")
    fails(2, *words[:-1], "--method", "regmean", says="no --calibration is given")


def test_what_is_asked_wrongly_is_refused(pictures, tmp_path):
    family, out = pictures.family, ["-o", tmp_path / "never"]
    words = ["merge", family.plan_path, *out, "--method"]
    fails(2, *words, "regmean", says="no --calibration is given")
    fails(2, *words, "average", "--calibration", pictures.output, says="no effect")
    fails(2, *words, "regmean:alpha=2", "--calibration", pictures.output, says="alpha=2 is not a number in [0, 1]")
    fails(4, *words, "regmean", "--calibration", tmp_path, says="no calibration at")
    fails(2, *family.command(tmp_path / "never", "--statistics", "inputs,hessian"), says="`hessian` is not known")
    fails(2, *family.command(family.folder / "tasks"), says="contains the input")
    fails(2, *family.command(pictures.output), says="exists")
    assert not (tmp_path / "never").exists()


def spec_with(family, folder, **changes):
    spec = yaml.safe_load(family.spec.read_text())
    for fields in spec["tasks"].values():
        fields["data"] = str(family.folder / fields["data"])
    for key, value in changes.items():
        spec["tasks"][key] = value(spec["tasks"][key])
        if spec["tasks"][key] is None:
            del spec["tasks"][key]
    (folder / "calib.yaml").write_text(yaml.safe_dump(spec))
    return ["calibrate", family.plan_path, "--spec", folder / "calib.yaml", "-o", folder / "never", "--device", "cpu"]


def test_data_that_do_not_fit_are_refused(pictures, tmp_path):
    family = pictures.family
    np.savez(tmp_path / "wrong.npz", pictures=np.zeros((2, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "nan.npz", images=np.full((2, 3, 8, 8), np.nan, np.float32))
    refused = fails(2, *spec_with(family, tmp_path, b=lambda old: old | {"data": "wrong.npz"}))
    assert "tasks.b" in refused.err and "pictures" in refused.err
    fails(2, *spec_with(family, tmp_path, b=lambda old: old | {"data": "none.npz"}), says="no examples")
    fails(2, *spec_with(family, tmp_path, b=lambda _old: None), says="no examples of b")
    said = fails(3, *spec_with(family, tmp_path, b=lambda old: old | {"data": "nan.npz"}))
    assert "task `b`" in said.err and "are not finite" in said.err
    assert not (tmp_path / "never").exists()


def test_kinds_that_run_models_of_their_own_are_refused(pictures, tmp_path):
    task = {"kind": "python:tests.evaluation.jobs:half"}
    refused = fails(2, *spec_with(pictures.family, tmp_path, a=lambda _old: task))
    assert "tasks.a" in refused.err


def test_one_example_is_enough(pictures, tmp_path):
    output = tmp_path / "calibration"
    succeeds(*pictures.family.command(output, "--examples", 1))
    assert json.loads((output / "calibration.json").read_text())["tasks"]["a"]["n"] == 1
    for method in ("regmean", "regmean:alpha=1", "fisher:floor=0"):
        words = ["merge", pictures.family.plan_path, "--method", method, "--force", "-o", tmp_path / "bundle"]
        succeeds(*words, "--calibration", output)


def test_a_calibration_of_other_weights_is_refused(pictures, tmp_path):
    """A plan of other sources, sources that have changed, and a plan with one task more."""
    family = pictures.family
    shutil.copytree(family.folder, tmp_path / "family")
    moved = tmp_path / "family/tasks/b/model.safetensors"
    save_file({name: 2 * value for name, value in load_file(moved).items()}, moved, metadata={"format": "pt"})
    words = ["calibrate", tmp_path / "family/plan.json", "--spec", tmp_path / "family/calib.yaml", "--force", "-o"]
    fails(3, *words, tmp_path / "family/calibration", says="task `b` has changed since the plan")
    succeeds("plan", "--base", family.folder / "base", "--tasks", tmp_path / "family/tasks", "-o", tmp_path / "p.json")
    merged = ["merge", tmp_path / "p.json", "--method", "regmean", "-o", tmp_path / "never", "--calibration"]
    fails(3, *merged, pictures.output, says=("is no calibration of this plan", "task `b`: calibrated with weights"))
    shutil.copytree(family.folder / "tasks/a", tmp_path / "family/tasks/d")
    succeeds("plan", "--base", family.folder / "base", "--tasks", tmp_path / "family/tasks", "-o", tmp_path / "q.json")
    merged[1] = tmp_path / "q.json"
    fails(3, *merged, pictures.output, says="task `d`: not in the calibration")


def test_a_calibration_belongs_to_weights_and_not_to_a_plan(pictures, tmp_path):
    family = pictures.family
    succeeds("plan", family.plan_path, "--linkage", "average", "-o", family.folder / "other.json")
    words = ["merge", family.folder / "other.json", "--method", "regmean", "-o", tmp_path / "bundle"]
    succeeds(*words, "--calibration", pictures.output)


def test_a_damaged_calibration_is_refused(pictures, tmp_path):
    folder = tmp_path / "calibration"
    words = [
        "merge",
        pictures.family.plan_path,
        "--method",
        "regmean",
        "-o",
        tmp_path / "never",
        "--calibration",
        folder,
    ]

    def again():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pictures.output, folder)
        return folder / "tasks/a.safetensors", folder / "calibration.json"

    file, _ = again()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    fails(5, *words, says="sha256")
    again()[0].write_bytes(bytes(data[:-4]))
    fails(5, *words, says="bytes; the calibration has")
    again()[0].unlink()
    fails(5, *words, says="missing")
    for old, new in (('"n":6', '"n":-6'), ("calibration/1", "calibration/9"), ("tasks/a.", "../a.")):
        index = again()[1]
        index.write_text(index.read_text().replace(old, new))
        fails(3, *words, says="calibration.json")


def test_force_replaces_a_calibration_and_nothing_else(pictures, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    fails(2, *pictures.family.command(tmp_path / "mine", "--force"), says="not what flexmerge wrote")
    shutil.copytree(pictures.output, tmp_path / "calibration")
    succeeds(*pictures.family.command(tmp_path / "calibration", "--force", "--statistics", "inputs"))
    assert json.loads((tmp_path / "calibration/calibration.json").read_text())["settings"]["statistics"] == ["inputs"]
    words = ["merge", pictures.family.plan_path, "--method", "fisher", "-o", tmp_path / "never"]
    fails(2, *words, "--calibration", tmp_path / "calibration", says="without the statistic `fisher`")


def test_auto_weighs_errors_by_the_fisher_information(pictures, tmp_path):
    family, output = pictures.family, pictures.output
    words = ["merge", family.plan_path, "--method", "auto", "--size", "1.1x"]
    succeeds(*words, "-o", tmp_path / "plain")
    succeeds(*words, "--calibration", output, "-o", tmp_path / "weighed")
    plain, weighed = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "weighed"))
    assert "calibration" not in plain and weighed["calibration"] == family.read(output).digest
    assert plain["units"] != weighed["units"]
    assert max(plain["stored_bytes"], weighed["stored_bytes"]) <= 1.1 * plain["one_model_bytes"]
    assert weighed["request"]["command"] == (
        "flexmerge merge plan.json --method auto --size 1.1x --calibration calibration/ -o bundle/"
    )
    update = ["update", tmp_path / "weighed", "--plan", family.plan_path, "-o", tmp_path / "never"]
    fails(2, *update, says="was merged with a calibration")
    outputs_alone = with_index(pictures, tmp_path / "outputs", statistics=["outputs"], fisher={}, inputs={})
    refused = fails(2, *words, "-o", tmp_path / "never", "--calibration", outputs_alone)
    assert "without the statistic `fisher`" in refused.err


def with_index(pictures, folder, *, statistics, **of_tasks):
    """A copy of the calibration whose index has other statistics."""
    shutil.copytree(pictures.output, folder)
    index = json.loads((folder / "calibration.json").read_text())
    index["settings"]["statistics"] = statistics
    for entry in index["tasks"].values():
        entry |= of_tasks
    (folder / "calibration.json").write_text(json.dumps(index))
    return folder


def test_auto_rounds_residuals_so_that_outputs_change_less(pictures, tmp_path):
    """With the inputs of the layers a bundle stores the same arrays as without, but other codes in them."""
    family = pictures.family
    moments = family.read(pictures.output)
    words = ["merge", family.plan_path, "--method", "auto:scales=bfloat16", "--size", "0.3x"]
    fisher_alone = with_index(pictures, tmp_path / "fisher", statistics=["fisher"], inputs={})
    succeeds(*words, "--calibration", fisher_alone, "-o", tmp_path / "plain")
    succeeds(*words, "--calibration", pictures.output, "-o", tmp_path / "fed")
    succeeds(*words, "--calibration", pictures.output, "--threads", 3, "-o", tmp_path / "other")
    assert tree(tmp_path / "fed") == tree(tmp_path / "other")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("plain", "fed")]
    assert manifests[0]["stored_bytes"] == manifests[1]["stored_bytes"]
    groups = [[(g["tasks"], g.get("bits")) for u in manifest["units"] for g in u["groups"]] for manifest in manifests]
    assert groups[0] == groups[1]
    plain, fed = (open_bundle(tmp_path / name) for name in ("plain", "fed"))
    found = []
    for task in TASKS:
        own = family.weights(task)
        for name, entry in moments.index.tasks[task].inputs.items():
            given = moments.measured("inputs", Where(tasks=(task,), tensor=name, start=0, shape=()), 0)
            metric = given[0].astype(np.float64)
            errors = [
                (bundle.view(task)[name].double() - own[name].double()).numpy().reshape(len(own[name]), -1)
                for bundle in (plain, fed)
            ]
            found.append([float(((error @ metric) * error).sum()) for error in errors])
            assert entry.layout in ("linear", "conv2d")
    losses = np.array(found)
    assert (losses[:, 1] < losses[:, 0]).mean() > 0.8 and losses[:, 1].sum() < 0.8 * losses[:, 0].sum()


@pytest.mark.parametrize("done", ["texts"], indirect=True)
def test_layers_whose_inputs_are_rows_are_coded_without_feedback(done, tmp_path):
    fisher_alone = with_index(done, tmp_path / "fisher", statistics=["fisher"], inputs={})
    for name, calibration in (("plain", fisher_alone), ("fed", done.output)):
        words = ["--method", "auto", "--size", "0.3x", "--calibration", calibration, "-o", tmp_path / name]
        succeeds("merge", done.family.plan_path, *words)
    weights = [sorted(folder.rglob("*.safetensors")) for folder in (tmp_path / "plain", tmp_path / "fed")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


def test_a_distance_that_is_asked_for_is_kept_without_feedback(pictures, tmp_path):
    """Feedback makes distances half as large again: with --max-distance and no size, `auto` ended with exit 6."""
    calibrations = {
        "both": pictures.output,
        "fisher": with_index(pictures, tmp_path / "without", statistics=["fisher"], inputs={}),
        "inputs": with_index(pictures, tmp_path / "inputs-alone", statistics=["inputs"], fisher={}),
    }
    words = ["merge", pictures.family.plan_path, "--method", "auto", "--max-distance", "0.5", "--calibration"]
    for name in ("both", "fisher"):
        succeeds(*words, calibrations[name], "-o", tmp_path / name)
    weights = [sorted((tmp_path / name).rglob("*.safetensors")) for name in ("both", "fisher")]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    says = "was made without the statistic `fisher`"
    fails(2, *words, calibrations["inputs"], "-o", tmp_path / "never", says=says)


def test_auto_refuses_inputs_that_are_not_finite(pictures, tmp_path):
    folder = tmp_path / "calibration"
    shutil.copytree(pictures.output, folder)
    file, index = folder / "tasks/b.safetensors", folder / "calibration.json"
    arrays = load_file(file)
    arrays[next(name for name in arrays if name.endswith("query.weight@inputs"))][-1] = float("nan")
    save_file(arrays, file)
    of_file = json.loads(index.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    of_file["tasks"]["b"] |= {"sha256": digest, "bytes": file.stat().st_size}
    index.write_text(json.dumps(of_file))
    words = ["merge", pictures.family.plan_path, "--method", "auto", "--size", "0.3x", "-o", tmp_path / "never"]
    said = fails(3, *words, "--calibration", folder, says="second moments of its inputs are not finite").err
    assert "weight` of task `b` cannot be coded" in said and "flexmerge calibrate" in said
