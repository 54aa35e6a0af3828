"""A plan or manifest takes memory by its size alone, whatever it holds."""

import gc
import json
import tracemalloc

import pytest

from flexmerge_cli.bundle.manifest_file import MAX_MANIFEST_BYTES, read_manifest
from flexmerge_cli.errors import DataError, FlexmergeError
from flexmerge_cli.formats.plan_file import read_plan
from flexmerge_cli.json_file import FREE_BYTES, MEMORY_RATIO, memory_bound

from .families import plain, write_family
from .hostile import sealed
from .program import ROOT, succeeds

MANIFEST = ROOT / "tests/golden/bundle-1/manifest.json"
ZERO = "0" * 32
GROUP = {"tasks": [], "kind": "copy", "method": None, "distance": {}}
TENSOR = {"class": "private", "dtype": "F32", "name": "", "shape": [], "digests": {"digit": ZERO}}
TASK = {"source": "", "fingerprint": ZERO, "exact": True, "distance": None, "names": {}, "files": []}
FILE = {"bytes": 0, "sha256": ZERO * 2, "tasks": []}
METHOD = {"name": "", "args": {}, "steps": [], "calibrate": None}
COUNT = 1500


def keys(value):
    return {f"{number:x}": value for number in range(COUNT)}


def numbered(record):
    return [record | {"name": f"t{number}"} for number in range(COUNT)]


def groups(**fields):
    return {"units": [{"name": "", "tensors": [], "groups": [GROUP | fields]}]}


# What has many values for its bytes, in each record that a manifest or plan may repeat.
MANIFESTS = {
    "groups": {"units": [{"name": "", "tensors": [], "groups": [GROUP] * COUNT}]},
    "units": {"units": [{"name": "", "tensors": [], "groups": []}] * COUNT},
    "tensors": {"tensors": numbered(TENSOR)},
    "files": {"files": {f"weights/{key}": FILE for key in keys(0)}},
    "names of tensors": {"units": [{"name": "", "tensors": list(keys(0)), "groups": []}]},
    "a shape": {"tensors": [TENSOR | {"shape": [1] * COUNT}]},
    "large numbers": {"tensors": [TENSOR | {"shape": [300 + number for number in range(COUNT)]}]},
    "names": {"tasks": {"a": TASK | {"names": keys("")}}},
    "runs": {"vocabularies": [{"tensors": ["a"], "base": {"rows": 1, "common": [[0, 1]] * COUNT}, "tasks": {}}]},
    "methods": {"methods": [METHOD] * COUNT},
    "arguments": {"methods": [METHOD | {"args": keys(0)}]},
    "lists": {"methods": [METHOD | {"args": keys([])}]},
    "distances": groups(distance=keys(1.5)),
    "bits": groups(bits=keys(2)),
    "splits": {"splits": [{"tensor": "", "dim": 0, "parts": 4096}] * COUNT},
    "tasks": {"tasks": keys(TASK)},
    "wide text": {"generator": "\U0001f600" * COUNT * 4},
}  # fmt: skip
ROWS = {"common": [], "leading": "", "rows": 0}
SIDE = {"bytes": 0, "digest": ZERO}
PLANS = {
    "tensors": lambda f: {"tensors": numbered(f["tensors"][0])},
    "Gram matrix": lambda f: {"tensors": [f["tensors"][0] | {"gram": [[0.5] * COUNT]}]},
    "rows of it": lambda f: {"tensors": [f["tensors"][0] | {"gram": [[]] * COUNT}]},
    "shapes": lambda f: {"tensors": [f["tensors"][0] | {"shapes": [[1]] * COUNT}]},
    "digests": lambda f: {"tensors": [f["tensors"][0] | {"digests": [None] * COUNT}]},
    "merges": lambda f: {"order": [{"block": "", "left": [], "right": [], "similarity": 0}] * COUNT},
    "blocks": lambda f: {"blocks": [{"name": "", "tensors": [], "elements": 0}] * COUNT},
    "rows": lambda f: {"vocabularies": [{"tensors": [], "base": ROWS, "tasks": [ROWS] * COUNT}]},
    "side files": lambda f: {"tasks": [f["tasks"][0] | {"files": keys(SIDE)}]},
    "tasks": lambda f: {"tasks": numbered(f["tasks"][0] | {"files": {}})},
}


def peak(read, path):
    """Most bytes that reading takes, of a file that is read or refused."""
    gc.collect()
    tracemalloc.start()
    try:
        read(path)
    except FlexmergeError:
        pass
    finally:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Those of a manifest and of a plan."""
    root = tmp_path_factory.mktemp("plan")
    family = write_family(root, plain(num_tasks=2, layers=1))
    succeeds("plan", *family.arguments, "--statistics", "gram", "-o", root / "plan.json", "-q")
    return json.loads(MANIFEST.read_bytes()), json.loads((root / "plan.json").read_bytes())


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_takes_no_more_memory_than_its_bound(name, fields, tmp_path):
    data = sealed(fields[0] | MANIFESTS[name], "id")
    (tmp_path / "manifest.json").write_bytes(data)
    assert peak(read_manifest, tmp_path) < memory_bound(data, data.decode()) + (1 << 18)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_takes_no_more_memory_than_its_bound(name, fields, tmp_path):
    data = sealed(fields[1] | PLANS[name](fields[1]), "sha256")
    (tmp_path / "plan.json").write_bytes(data)
    assert peak(read_plan, tmp_path / "plan.json") < memory_bound(data, data.decode()) + (1 << 18)


def test_what_would_take_much_memory_is_refused_before_anything_is_made_of_it(fields, tmp_path, monkeypatch):
    """A manifest of 128 MiB could take 35 times that."""
    monkeypatch.setattr("flexmerge_cli.json_file.FREE_BYTES", 0)
    data = sealed(fields[0] | MANIFESTS["units"], "id")
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match="would take up to"):
        read_manifest(tmp_path)
    assert peak(read_manifest, tmp_path) < 4 * len(data)
    monkeypatch.setattr("flexmerge_cli.json_file.FREE_BYTES", FREE_BYTES)
    read_manifest(tmp_path)


def test_manifests_of_many_tasks_take_a_part_of_what_is_allowed():
    """As many digests for each tensor as there are tasks is what makes a manifest large."""
    digests = {f"task{number}": ZERO for number in range(8)}
    tensors = [TENSOR | {"name": f"model.layers.{number}.mlp.weight", "digests": digests} for number in range(1000)]
    data = json.dumps(tensors, separators=(",", ":"))
    bound = memory_bound(data.encode(), data) / len(data)
    assert (bound - MEMORY_RATIO) * MAX_MANIFEST_BYTES < FREE_BYTES
