"""Methods of other people, from file and package to bundle: samples/own_method, as its README says."""

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch

from flexmerge_cli import open_bundle, verify

from .families import plain, write_family
from .program import ROOT, fails, stored_sizes, succeeds

SAMPLES = ROOT / "samples/own_method"
MEDIAN = SAMPLES / "median.py"
HEAD = "from flexmerge_cli.methods.method import method\n"


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Planned in one block of all tensors, so that a size of one model is one group."""
    folders = write_family(tmp_path_factory.mktemp("four"), plain())
    succeeds("plan", *folders.arguments, "--blocks", "model", "-o", folders.root / "plan.json")
    return folders


def own(folder, body, *, name="own.py"):
    path = folder / name
    path.write_text(HEAD + body)
    return path


def merged(four, target, method, *arguments):
    succeeds("merge", four.root / "plan.json", "--method", method, "--size", "1x", *arguments, "-o", target)
    assert verify(target, decode=True).bad == {}
    return open_bundle(target)


def assert_merged(bundle, four, merge):
    """merge: [k, *shape] task vectors of a tensor -> float64, in task order."""
    base = four.models.base
    for name, value in base.items():
        deltas = torch.stack([state[name] - value for state in four.models.tasks.values()])
        expected = value + merge(name, deltas).float()
        for task in bundle.tasks:
            assert torch.equal(bundle.view(task)[name], expected), name


def test_the_sample_file_merges_and_is_recorded(four, tmp_path):
    bundle = merged(four, tmp_path / "bundle", f"{MEDIAN}#median:scale=1.5")
    assert_merged(bundle, four, lambda _, deltas: 1.5 * deltas.double().sort(0).values[1:3].mean(0))
    (method,) = bundle.manifest.methods
    assert (method.name, method.args) == ("median", {"scale": 1.5})
    assert method.origin == ("median.py", "sha256:" + hashlib.sha256(MEDIAN.read_bytes()).hexdigest())
    assert str(tmp_path) not in (tmp_path / "bundle/manifest.json").read_text()


def test_a_dry_run_prices_it_to_the_byte(four, tmp_path):
    arguments = ("merge", four.root / "plan.json", "--method", f"{MEDIAN}#median", "--size", "2x", "--json")
    dry = succeeds(*arguments, "--dry-run", "-o", tmp_path / "bundle").json
    assert not (tmp_path / "bundle").exists()
    wet = succeeds(*arguments, "-o", tmp_path / "bundle").json
    assert dry["total_bytes"] == wet["total_bytes"]
    assert wet["total_bytes"] == sum(stored_sizes(tmp_path / "bundle").values())


def test_reading_needs_no_method(four, tmp_path):
    shutil.copy(MEDIAN, tmp_path / "mine.py")
    merged(four, tmp_path / "bundle", f"{tmp_path}/mine.py#median")
    (tmp_path / "mine.py").unlink()
    succeeds("inspect", tmp_path / "bundle", "--verify", "--decode")
    succeeds("export", tmp_path / "bundle", "--task", "task1", "-o", tmp_path / "exported")
    command = [sys.executable, str(ROOT / "samples/read_bundle.py"), str(tmp_path / "bundle")]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert told.count("all sound") == 4


@pytest.mark.parametrize(
    ("scope", "body", "merge"),
    [
        ("row", "def own(deltas): return deltas.double().mean(0)", lambda _, d: d.double().mean(0)),
        ("tensor", "def own(deltas, *, scale: float = 2): return scale * deltas[0]", lambda _, d: 2 * d[0].double()),
        # What comes in may be given back: the engine keeps its own memory apart.
        ("tensor", "def own(deltas): return deltas[1]", lambda _, d: d[1].double()),
        ("block", "def own(deltas): return {name: d[1] for name, d in deltas.items()}", lambda _, d: d[1].double()),
        ("element", "def own(deltas, where): return deltas[where.tasks.index('task2')]", lambda _, d: d[2].double()),
    ],
)
def test_every_scope_works(scope, body, merge, four, tmp_path):
    path = own(tmp_path, f"@method(paper='', scope='{scope}')\n{body}\n")
    assert_merged(merged(four, tmp_path / "bundle", f"{path}#own"), four, merge)


def test_what_a_block_method_gives_back_outlives_the_next_group(four, tmp_path):
    """Groups of one block are merged one after the other in the same memory."""
    path = own(
        tmp_path, "@method(paper='', scope='block')\ndef own(deltas): return {n: d[1] for n, d in deltas.items()}"
    )
    succeeds("merge", four.root / "plan.json", "--method", f"{path}#own", "--merges", 2, "-o", tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    (unit,) = bundle.manifest.units
    assert sorted(len(group.tasks) for group in unit.groups) == [2, 2]
    for group in unit.groups:
        for name, value in four.models.base.items():
            expected = value + (four.models.tasks[group.tasks[1]][name] - value)
            assert torch.equal(bundle.view(group.tasks[0])[name], expected), name


def test_a_block_method_sees_the_task_vectors_before_steps_too(four, tmp_path):
    body = (
        "@method(paper='', scope='block')\ndef own(deltas, unstepped): return {n: d[1] for n, d in unstepped.items()}\n"
    )
    bundle = merged(four, tmp_path / "bundle", f"{own(tmp_path, body)}#own", "--step", "dare:p=0.9")
    assert_merged(bundle, four, lambda _, deltas: deltas[1].double())


def test_it_goes_by_block_pattern_and_after_steps(four, tmp_path):
    plan = four.root / "by-component.json"
    succeeds("plan", four.root / "plan.json", "--blocks", "component", "-o", plan)
    arguments = ("merge", plan, "--method", "average", "--method-for", f"*.mlp={MEDIAN}#median", "--step", "trim:K=0.5")
    succeeds(*arguments, "--size", "1x", "-o", tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    assert [method.name for method in bundle.manifest.methods] == ["average", "median"]
    used = {unit.name: {group.method for group in unit.groups} for unit in bundle.manifest.units}
    assert {name for name, methods in used.items() if methods == {1}} == {
        name for name in used if name.endswith(".mlp")
    }


WITNESS = (
    "open(__file__ + '.was-run', 'w').close()\n@method(paper='', scope='element')\ndef own(deltas): return deltas[0]\n"
)


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "FILE#own"},
        {"method": "average", "method_for": {"*": "FILE#own"}},
        {"method": "low_bit:centre='FILE#own'"},
    ],
)
@pytest.mark.parametrize("typed", [(), ("--method", "ties"), ("--method-for", "*.mlp=ties")])
def test_a_recipe_that_names_a_file_is_refused_whatever_else_is_typed(typed, merge, four, tmp_path):
    path = own(tmp_path, WITNESS)
    recipe = {"version": 1, "base": str(four.base), "tasks": four.sources, "merge": merge}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe).replace("FILE", str(path)))
    for command in (
        ("merge", tmp_path / "recipe.yaml", *typed, "-o", tmp_path / "b"),
        ("plan", tmp_path / "recipe.yaml", "-o", tmp_path / "p.json"),
    ):
        fails(2, *command, says="would run a file")
    assert not (tmp_path / "own.py.was-run").exists() and not (tmp_path / "b").exists()


def test_a_file_may_be_typed_by_block_pattern_alone(four, tmp_path):
    recipe = {"version": 1, "base": str(four.base), "tasks": four.sources, "merge": {"method": "average", "size": "1x"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    typed = ("--method-for", f"*.mlp={MEDIAN}#median")
    succeeds("merge", tmp_path / "recipe.yaml", *typed, "-o", tmp_path / "b")
    assert [method.name for method in open_bundle(tmp_path / "b").manifest.methods] == ["average", "median"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "from flexmerge_cli.methods.coded import coded\n@coded(paper='', when='')\ndef own(): ...",
            "could not decode",
        ),
        ("@method(paper='', scope='element')\ndef average(deltas): ...", "name of another method"),
        ("def own(deltas): ...", "is a plain function"),
        ("@method(paper='', scope='element')\ndef one(deltas): ...", ("has no `own`", "its methods: one")),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_read(body, says, four, tmp_path):
    name = "average" if "average" in body else "own"
    path = own(tmp_path, body)
    fails(2, "merge", four.root / "plan.json", "--method", f"{path}#{name}", "-o", tmp_path / "b", says=says)
    assert not (tmp_path / "b").exists()


def test_the_sample_package_merges_once_it_is_installed(four, tmp_path, monkeypatch):
    """Its folder and the entry point that its pyproject.toml declares, as an installer leaves them."""
    project = tomllib.loads((SAMPLES / "package/pyproject.toml").read_text())["project"]
    info = tmp_path / "site/flexmerge_norm_mean-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["flexmerge.methods"]
    lines = [f"{name} = {value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text("[flexmerge.methods]\n" + "".join(lines))
    fails(2, "merge", four.root / "plan.json", "--method", "norm_mean", "-o", tmp_path / "b", says="norm_mean")
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.syspath_prepend(str(SAMPLES / "package"))
    bundle = merged(four, tmp_path / "bundle", "norm_mean:scale=1.2")
    (method,) = bundle.manifest.methods
    assert (method.name, method.args["scale"]) == ("norm_mean", 1.2)
    assert method.origin == (project["name"], project["version"])
    name = "encoder.layer.0.intermediate.dense.weight"
    deltas = torch.stack([state[name] - four.models.base[name] for state in four.models.tasks.values()])
    length = deltas.flatten(1).double().norm(dim=1).mean()
    assert (bundle.view("task0")[name] - four.models.base[name]).norm().item() == pytest.approx(
        1.2 * length.item(), rel=1e-5
    )
    assert "norm_mean" in succeeds("methods", "norm_mean").out
