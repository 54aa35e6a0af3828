"""`merge --sizes`: the bundles of single merges, made in one read of the weights."""

import json
import shutil
import signal

import pytest

from flexmerge_cli import merge_sizes
from flexmerge_cli.engine import journal

from .bundle.test_resume import Counted, counted
from .families import plain, write_family
from .program import Child, fails, succeeds, tree

SIZES = ("1.5x", "2x", "3x")
METHODS = ("average", "auto", "ties")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    succeeds("plan", *write_family(root, plain(layers=4, width=16)).arguments, "-o", root / "plan.json", "-q")
    return root


@pytest.fixture(scope="module")
def single(family):
    """Method -> the bundles of single merges, and the most bytes that one of them reads of weights."""
    found = {}
    for method in METHODS:
        words, out = ("merge", family / "plan.json", "--method", method), family / method
        num_read = max(counted(*words, "--size", size, "-o", out / size)[1] for size in SIZES)
        found[method] = {size: tree(out / size) for size in SIZES}, num_read
    return found


@pytest.mark.parametrize("method", METHODS)
def test_each_bundle_is_that_of_a_single_merge_and_all_are_made_in_one_read(method, family, single, tmp_path):
    expected, num_read = single[method]
    words = ("merge", family / "plan.json", "--method", method, "--sizes", ",".join(SIZES), "-o", tmp_path / "b")
    _, count = counted(*words)
    assert {size: tree(tmp_path / "b" / size) for size in SIZES} == expected
    assert count <= num_read
    again, count = counted(*words, "--json")
    assert count == 0 and all(bundle["was_there"] for bundle in again.json["bundles"].values())


def test_distances_are_those_of_single_merges_where_one_size_visits_rows_and_another_elements(family, tmp_path):
    """A cast copy was visited by rows, as the residuals of another size were, and its errors added up by rows."""
    words = ("merge", family / "plan.json", "--method", "low_bit:bits=2", "--dtype", "bf16")
    succeeds(*words, "--sizes", "1.5x,1.9x", "-o", tmp_path / "b")
    for size in ("1.5x", "1.9x"):
        succeeds(*words, "--size", size, "-o", tmp_path / size)
        assert tree(tmp_path / "b" / size) == tree(tmp_path / size)


def test_masks_of_a_larger_size_have_their_factors(tmp_path):
    """`merge --sizes` and `update` stopped with "a part was not written", if a unit kept some of its masked groups."""
    family = write_family(tmp_path, plain(num_tasks=12, layers=1))
    succeeds("plan", *family.arguments, "-o", tmp_path / "plan.json", "-q")
    words = ("merge", tmp_path / "plan.json", "--method", "emr")
    succeeds(*words, "--sizes", "4x,5x", "-o", tmp_path / "sizes")
    succeeds("plan", tmp_path / "plan.json", "--remove", "task0", "-o", tmp_path / "fewer.json")
    for size in ("4x", "5x"):
        succeeds(*words, "--size", size, "-o", tmp_path / size)
        assert tree(tmp_path / "sizes" / size) == tree(tmp_path / size)
        succeeds("update", tmp_path / size, "--plan", tmp_path / "fewer.json", "-o", tmp_path / f"updated-{size}")


def test_a_killed_run_is_gone_on_with(family, single, tmp_path, monkeypatch):
    expected, num_read = single["average"]
    words = ("merge", family / "plan.json", "--method", "average", "--sizes", ",".join(SIZES), "-o", tmp_path / "b")
    monkeypatch.setattr(journal, "JOURNALED_BYTES", 0)
    code, said = Child(*words, "--threads", "1", before=Counted(int(0.8 * num_read)).install).wait()
    assert code == -signal.SIGKILL, said
    assert {path.name for path in (tmp_path / "b").glob(".*.partial")} == {f".{size}.partial" for size in SIZES}
    assert counted(*words)[1] < 0.5 * num_read
    assert {size: tree(tmp_path / "b" / size) for size in SIZES} == expected
    assert [path.name for path in (tmp_path / "b").iterdir() if path.name.startswith(".")] == []


def test_python_and_a_recipe_make_the_same(family, single, tmp_path):
    expected, _ = single["average"]
    opened = merge_sizes(family / "plan.json", tmp_path / "b", method="average", sizes=",".join(SIZES))
    assert {size: tree(tmp_path / "b" / size) for size in opened} == expected
    recipe = family / "recipe.yaml"
    tasks = "".join(f"  task{number}: tasks/task{number}\n" for number in range(4))
    recipe.write_text(f"version: 1\nbase: base\ntasks:\n{tasks}merge: {{method: average, sizes: '1.5x,2x'}}\n")
    succeeds("merge", recipe, "--plan", family / "kept.json", "-o", tmp_path / "r")
    assert {size: tree(tmp_path / "r" / size) for size in ("1.5x", "2x")} == {s: expected[s] for s in ("1.5x", "2x")}
    succeeds("merge", recipe, "--plan", family / "kept.json", "--size", "3x", "-o", tmp_path / "one")
    assert tree(tmp_path / "one") == expected["3x"]
    recipe.write_text(recipe.read_text().replace("method: average", "method: average, size: 2x"))
    fails(2, "merge", recipe, "-o", tmp_path / "x", says="sizes goes with neither")


def test_something_else_in_a_place_is_refused_before_anything_is_written(family, single, tmp_path):
    words = ("merge", family / "plan.json", "--method", "average", "--sizes", "1.5x,2x", "-o", tmp_path / "b")
    shutil.copytree(family / "average" / "3x", tmp_path / "b/2x", symlinks=True)
    fails(2, *words, says="exists")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["2x"]
    succeeds(*words, "--force")
    assert tree(tmp_path / "b/2x") == single["average"][0]["2x"]
    path = next((tmp_path / "b/2x/weights").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    fails(2, *words, says="exists")  # a damaged one is none that may stay


@pytest.mark.parametrize("order", [SIZES, SIZES[::-1]])
def test_a_bundle_that_is_too_far_off_does_not_keep_the_others_from_being_written(order, family, single, tmp_path):
    far = [max(distances(family / "average" / size)) for size in SIZES]
    assert far[0] >= far[1] > far[2]
    words = ("merge", family / "plan.json", "--method", "average", "--sizes", ",".join(order), "-o", tmp_path / "b")
    said = fails(6, *words, "--max-distance", (far[1] + far[2]) / 2, says="is not published").err
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["3x"]
    assert [f"{tmp_path / 'b' / size} is not published" in said for size in SIZES] == [True, True, False]


def distances(bundle):
    return [task["distance"] for task in json.loads((bundle / "manifest.json").read_bytes())["tasks"].values()]


def test_what_is_asked_wrongly_is_refused(family, tmp_path):
    words = ("merge", family / "plan.json", "-o", tmp_path / "b", "--sizes")
    fails(2, *words, "1x,2x", says="method")
    fails(2, *words, "1x,2x", "--method", "average", "--size", "2x", says="--sizes cannot be combined")
    fails(2, *words, "1x,2x", "--method", "average", "--html", tmp_path / "x.html", says="concern one bundle")
    fails(2, *words, "many", "--method", "average", says="is not a size")
    fails(2, *words, "2x,2.5x", "--method", "average", "--cluster", "channels", says="whole number")
    shown = succeeds(*words, "1.5x,2x", "--method", "average", "--dry-run", "--json").json
    assert list(shown["bundles"]) == ["1.5x", "2x"] and shown["written"] is False and not (tmp_path / "b").exists()
