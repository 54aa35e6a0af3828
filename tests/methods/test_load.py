"""Methods of other people: files, packages, and the samples that show how."""

import hashlib
import tomllib
from pathlib import Path

import pytest
import torch

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.load import method_from_file, packaged_methods
from flexmerge_cli.methods.method import Origin
from flexmerge_cli.methods.registry import all_methods, parse_call

from .driver import family_of, merge

SAMPLES = Path(__file__).parents[2] / "samples/own_method"
MEDIAN = SAMPLES / "median.py"
HEAD = "from flexmerge_cli.methods.method import method\n"


def write(folder, text):
    path = folder / "own.py"
    path.write_text(HEAD + text)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The sample's package, as if it were installed."""
    project = tomllib.loads((SAMPLES / "package/pyproject.toml").read_text())["project"]
    info = tmp_path / "flexmerge_norm_mean-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["flexmerge.methods"]
    (info / "entry_points.txt").write_text(
        "[flexmerge.methods]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(SAMPLES / "package"))
    return info


def test_method_of_a_file_runs_and_tells_its_digest():
    call = parse_call(f"{MEDIAN}#median:scale=2", run_files=True)
    assert call.method.name == "median"
    assert call.method.origin == Origin("median.py", "sha256:" + hashlib.sha256(MEDIAN.read_bytes()).hexdigest())
    assert call.args == {"scale": 2.0}
    merged = merge(family_of({"w": [[1.0, 0.0], [4.0, 0.5], [2.0, 9.0]]}), call)["w"].unified
    assert merged.tolist() == [4.0, 1.0]


def test_method_of_a_package_runs_and_tells_its_version(package):
    call = parse_call("norm_mean")
    assert call.method.origin == Origin("flexmerge-norm-mean", "0.1.0")
    assert set(packaged_methods()) >= {"norm_mean"}
    merged = merge(family_of({"w": [[3.0, 0.0], [0.0, 4.0]]}), call)["w"].unified
    assert merged.norm().item() == pytest.approx(3.5)
    zero = merge(family_of({"w": torch.tensor([[1.0], [-1.0]])}), call)["w"].unified
    assert zero.tolist() == [0.0]


def test_a_file_is_not_run_unless_a_person_asked(tmp_path):
    path = write(tmp_path, "raise SystemExit('was run')")
    with pytest.raises(UsageError, match="would run a file"):
        parse_call(f"{path}#anything")


def test_a_package_cannot_take_the_name_of_one_of_ours(package):
    (package / "entry_points.txt").write_text("[flexmerge.methods]\naverage = flexmerge_norm_mean:norm_mean\n")
    assert parse_call("average").method is all_methods()["average"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@method(paper='', scope='element')\ndef average(deltas): ...", "name of another method"),
        ("def own(deltas): ...", "is a plain function"),
        ("own = 3", "is not a method"),
        ("", "has no `own`"),
        ("1 / 0", "ZeroDivisionError"),
        ("def own(:", "SyntaxError"),
        ("@method(paper='', scope='element')\ndef own(deltas, *, a): ...", "has no default"),
        ("@method(paper='', scope='element')\ndef own(deltas, *, a: list = []): ...", "has type"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, text, message):
    path = write(tmp_path, text)
    name = "average" if "average" in text else "own"
    with pytest.raises(UsageError, match=message):
        parse_call(f"{path}#{name}", run_files=True)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UsageError, match="no file at"):
        method_from_file(tmp_path / "missing.py", "own")


def test_a_package_that_fails_is_told(package):
    (package / "entry_points.txt").write_text("[flexmerge.methods]\nbad = flexmerge_norm_mean:missing\n")
    with pytest.raises(UsageError, match="flexmerge-norm-mean"):
        parse_call("bad")


def test_annotations_may_be_strings(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\n" + HEAD + "from flexmerge_cli.methods.method import Positive\n"
        "@method(paper='', scope='element')\ndef own(deltas, *, scale: Positive = 1.0): return scale * deltas[0]\n"
    )
    assert parse_call(f"{path}#own:scale=3", run_files=True).args == {"scale": 3.0}


def test_readme_shows_the_sample_as_it_is():
    shown = (SAMPLES / "README.md").read_text()
    for line in MEDIAN.read_text().splitlines():
        if line.startswith(("@method", "def median")):
            assert line in shown
