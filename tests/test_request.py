"""A bundle records what was asked of `merge`, in one form whoever asked, and its command makes the same bytes again."""

import hashlib
import json
import shlex

import pytest

from flexmerge_cli import merge, open_bundle
from flexmerge_cli.errors import UsageError

from .program import fails, stored_sizes, succeeds, tree

METHOD = '''
from flexmerge_cli.methods.method import method
from flexmerge_cli.methods.reductions import mean_tasks


@method(paper="own", scope="element")
def halved(deltas, *, factor: float = 0.5):
    """Less of the mean."""
    return factor * mean_tasks(deltas)
'''

ASKED = {
    "exact": [],
    "average": ["--method", "average", "--size", "2.00x"],
    "bytes": ["--method", "average", "--size", "33.000kB"],
    "percent": ["--method", "emr", "--size", "80%", "--fit", "prefix"],
    "merges": ["--method", "task_arithmetic:scale=1.25", "--merges", "3"],
    "smallest": ["--method", "ties:K=0.2", "--step", "dare:p=0.5", "--calibrate", "svc"],
    "auto": ["--method", "auto", "--size", "1x"],
    "auto_limits": ["--method", "auto:max_bits=4, centres=average", "--size", "34.000kB"],
    "auto_distance": ["--method", "auto", "--max-distance", "0.9"],
    "auto_bare": ["--method", "auto"],
    "cluster": ["--method", "average", "--cluster", "channels", "--size", "2x", "--seed", "7"],
    "dtype": ["--method", "average", "--size", "1.2x", "--dtype", "bf16"],
    "cast": ["--dtype", "fp16"],
    "method_for": [
        *("--method", "auto", "--size", "3x"),
        *("--method-for", "encoder.layer.0.*=keep", "--method-for", "pooler*=ties:K=0.30"),
    ],
    "nested": ["--method", "low_bit:bits=4,centre='ties:K=0.3'", "--size", "2.5x"],
    "mergekit": ["--method", "DARE-ties", "--size", "2x"],
    "own_file": ["--method", "./my methods.py#halved:factor=0.25", "--size", "2x"],
}


@pytest.mark.parametrize("name", ASKED)
def test_the_command_in_the_manifest_makes_the_same_bundle(name, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my methods.py").write_text(METHOD)
    arguments = ASKED[name]
    dry = succeeds("merge", plan, *arguments, "-o", "dry", "--dry-run", "--json").json
    told = succeeds("merge", plan, *arguments, "-o", "first", "--json").json
    assert sum(stored_sizes(tmp_path / "first").values()) == dry["total_bytes"] == told["total_bytes"]
    assert dry["files"] == told["files"]
    first = open_bundle("first").manifest
    assert first.request is not None
    assert dry["request"] == told["request"] == first.request.dump()
    program, verb, file, *again = shlex.split(first.request.command)
    assert (program, verb, file) == ("flexmerge", "merge", "plan.json")
    succeeds(verb, plan, *again, "-o", "second")
    assert open_bundle("second").manifest.id == first.id
    assert tree(tmp_path / "second") == tree(tmp_path / "first")
    shown = succeeds("inspect", "first")
    assert first.request.command in shown.out
    assert succeeds("inspect", "first", "--json").json["request"] == first.request.dump()
    succeeds("inspect", "first", "--html", "page.html")
    assert "flexmerge merge plan.json" in (tmp_path / "page.html").read_text()


def test_what_is_recorded_is_all_that_was_asked(plan, tmp_path):
    options = ["--step", "dare:p=0.5", "--size", "2.50x", "--max-distance", "7", "--threads", "1", "--device", "cpu"]
    succeeds("merge", plan, "--method", "ties:scope=tensor,K=0.10", *options, "-o", tmp_path / "b")
    found = json.loads((tmp_path / "b/manifest.json").read_text())["request"]
    assert found.pop("padding").strip(" ") == ""
    assert found == {
        "method": "ties:scope=tensor",
        "steps": ["dare:p=0.5"],
        "size": "2.5x",
        "fit": "tight",
        "max_distance": 7.0,
        "command": "flexmerge merge plan.json --method ties:scope=tensor --step dare:p=0.5 --size 2.5x "
        "--max-distance 7.0 -o bundle/",
    }


def test_the_command_line_a_recipe_and_the_python_api_record_the_same(family, tmp_path):
    recipe, plan = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    tasks = "".join(f"  {name}: {path}\n" for name, path in family.sources.items())
    asked = "{method: 'ties: K=0.20', steps: ['dare:p=0.50'], size: 2.0x, method_for: {'pooler*': keep}, dtype: bf16}"
    recipe.write_text(f"version: 1\nbase: {family.base}\ntasks:\n{tasks}merge: {asked}\n")
    succeeds("merge", recipe, "--plan", plan, "-o", tmp_path / "recipe")
    options = ("--method", "ties:K=0.2", "--step", "dare:p=0.5", "--size", "2x", "--method-for", "pooler*=keep")
    succeeds("merge", plan, *options, "--fit", "tight", "--dtype", "bf16", "-o", tmp_path / "line")
    called = merge(
        *(plan, tmp_path / "called"), method="ties:K=0.2,merge=mean", steps=["dare:p=0.5"], size="2x", dtype="bf16",
        method_for=("pooler*=keep",), threads=1, device="cpu",
    )  # fmt: skip
    ids = {open_bundle(tmp_path / name).manifest.id for name in ("recipe", "line", "called")}
    assert ids == {called.manifest.id}


@pytest.mark.parametrize("file", ["methods.py", "./methods.py", "{folder}/methods.py"])
def test_no_absolute_path_is_recorded(file, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "methods.py").write_text(METHOD)
    succeeds("merge", plan, "--method", f"{file.format(folder=tmp_path)}#halved", "--size", "2x", "-o", "b")
    assert str(tmp_path) not in (tmp_path / "b/manifest.json").read_text()
    manifest = open_bundle("b").manifest
    assert manifest.request.method == f"{file.format(folder='.').removeprefix('./') if '{' in file else file}#halved"
    assert manifest.methods[0].origin[0] == "methods.py"


def edited(bundle, request):
    """The manifest with another request, its id made right."""
    manifest = json.loads((bundle / "manifest.json").read_text()) | {"id": "0" * 64}
    manifest |= {"request": request}
    if request is None:
        del manifest["request"]
    data = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = hashlib.sha256(data).hexdigest()
    (bundle / "manifest.json").write_bytes(data.replace(b"0" * 64, digest.encode(), 1))


def test_a_bundle_that_records_no_request_opens(plan, tmp_path):
    merge(plan, tmp_path / "b", method="average", size="2x", device="cpu")
    edited(tmp_path / "b", None)
    assert open_bundle(tmp_path / "b").manifest.request is None
    assert "made again" not in succeeds("inspect", tmp_path / "b").out
    assert succeeds("inspect", tmp_path / "b", "--json").json["request"] is None
    succeeds("inspect", tmp_path / "b", "--html", tmp_path / "page.html")


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf ~", "flexmerge merge plan.json; rm -rf ~", "flexmerge merge plan.json -o $(id)", 
        "flexmerge merge 'plan",        "flexmerge merge plan.json\n-o b", "",
    ],
)  # fmt: skip
def test_a_strangers_command_is_not_offered(command, plan, tmp_path):
    merge(plan, tmp_path / "b", device="cpu")
    edited(tmp_path / "b", {"command": command})
    fails(3, "inspect", tmp_path / "b", says="command")


def test_odd_requests_are_refused_as_ever(plan, tmp_path):
    with pytest.raises(UsageError, match="is not PATTERN=METHOD"):
        merge(plan, tmp_path / "b", method="average", size="2x", method_for=("pooler",))
    with pytest.raises(UsageError, match="no method"):
        merge(plan, tmp_path / "b", method="avrage", size="2x")


def test_what_was_asked_does_not_change_the_size(plan, tmp_path):
    """So `auto` is exact in every number of bytes that an exact bundle takes."""
    exact = succeeds("merge", plan, "-o", tmp_path / "b", "--dry-run", "--json").json["total_bytes"]
    for method in ("auto", "auto:min_bits=1,max_bits=7,centres=none+base+average"):
        asked = (
            "merge",
            plan,
            "--method",
            method,
            "--size",
            f"{exact}B",
            "--max-distance",
            "0",
            "-o",
            tmp_path / method,
        )
        assert succeeds(*asked, "--json").json["total_bytes"] == exact
        assert all(entry.exact for entry in open_bundle(tmp_path / method).manifest.tasks.values())
