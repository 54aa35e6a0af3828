"""Every method of the registry through the engine: bytes as priced, values as the method makes them, read by anyone."""

import json
import subprocess
import sys

import pytest
import torch

from flexmerge_cli import open_bundle
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.methods.registry import all_methods, parse_call

from ..families import same_bits
from ..program import ROOT, succeeds
from .merges import DEFAULTS, EDGES, FAMILIES, TOGETHER, billed, disk_bytes, plan_of, planned, write
from .reference import given_back

ONE_DTYPE = tuple(name for name in FAMILIES if name != "mixed")
"""Methods see float32 whatever is stored, so each is tried on one of these in turn, and on all dtypes at once."""
SPECTRAL_RESIDUALS = ("low_rank", "tsv_c")
"""Float64 products, rounded once: promised by their parts, not by their bits."""

# Both read folder after folder from stdin: the sample where neither this package nor torch can be imported, and
# `inspect --verify --decode` where torch cannot.
SAMPLE = """
import json, sys
sys.modules["flexmerge_cli"] = sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1] + "/samples")
import read_bundle
for line in sys.stdin:
    folder = line.strip()
    tasks = json.load(open(folder + "/manifest.json"))["tasks"]
    print(sum(read_bundle.check(folder, task) for task in tasks), flush=True)
"""
VERIFY = """
import sys
from pathlib import Path
sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
from flexmerge_cli.bundle.verify import verify
for line in sys.stdin:
    found = verify(Path(line.strip()), decode=True)
    assert found.bad == {}, found.bad
    print(found.num_tensors, flush=True)
"""


def in_a_process(code):
    """Folder -> the number of tensors that were decoded there and found sound."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def read(folder):
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"{folder} cannot be read"
        return int(answer)

    yield read
    process.stdin.close()
    process.wait(10)


@pytest.fixture(scope="module")
def sample_reader():
    yield from in_a_process(SAMPLE)


@pytest.fixture(scope="module")
def verified():
    yield from in_a_process(VERIFY)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Name of FAMILIES -> that family, planned."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = planned(tmp_path_factory.mktemp(name), FAMILIES[name]())
        return made[name]

    return get


@pytest.mark.parametrize(
    ("methods", "dtype"),
    [((method,), "mixed") for method in DEFAULTS.values()]
    + [((method,), ONE_DTYPE[number % 3]) for number, method in enumerate(DEFAULTS.values())]
    + [(methods, "mixed") for methods in TOGETHER],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_bundle_holds_what_was_priced_and_gives_back_what_the_method_makes(
    methods, dtype, family, sample_reader, verified, tmp_path
):
    """Groups of one to eight tasks. What is not the default of a method is tried on the mixed family alone."""
    folders = family(dtype)
    layout = billed(plan_of(folders), *methods)
    bundle = write(folders, layout, tmp_path / "bundle")
    assert disk_bytes(bundle) == layout.total_bytes
    stored = [part.num_bytes for file in Bundle.open(bundle).parts.values() for part in file.values()]
    assert sum(stored) == layout.tensor_bytes
    assert sample_reader(bundle) == verified(bundle) > 0
    opened, near = open_bundle(bundle), parse_call(methods[0]).method.name in SPECTRAL_RESIDUALS
    for task, state in given_back(folders.models, layout).items():
        view = opened.view(task)
        assert sorted(view) == sorted(state)
        for name, expected in state.items():
            if near and not same_bits(view[name], expected):
                step = torch.finfo(expected.dtype).eps if expected.dtype != torch.float32 else 1e-6
                assert (view[name].dtype, view[name].shape) == (expected.dtype, expected.shape)
                assert torch.allclose(view[name].double(), expected.double(), rtol=step, atol=step)
            else:
                assert same_bits(view[name], expected), (task, name)


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = planned(tmp_path_factory.mktemp(name), EDGES[name]())
        return made[name]

    return get


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("method", [DEFAULTS[name] for name, method in all_methods().items() if not method.reads])
def test_no_family_is_too_odd_for_a_method(method, name, edge, tmp_path):
    """Merge as a user does all that the method can: priced by a dry run, finite, and sound when read back."""
    folders = edge(name)
    arguments = ("merge", folders.root / "plan.json", "--method", method, "-o", tmp_path / "bundle", "--json")
    priced = succeeds(*arguments, "--dry-run").json
    told = succeeds(*arguments).json
    assert priced["total_bytes"] == told["total_bytes"] == disk_bytes(tmp_path / "bundle")
    assert json.loads(succeeds("inspect", tmp_path / "bundle", "--verify", "--decode", "--json").out)
    bundle = open_bundle(tmp_path / "bundle")
    for task, state in folders.models.tasks.items():
        view = bundle.view(task)
        assert {key: value.shape for key, value in view.items()} == {key: value.shape for key, value in state.items()}
        assert all(bool(torch.isfinite(value).all()) for value in view.values())
        distance = bundle.manifest.tasks[task].distance
        moved = any(not torch.equal(state[key], value) for key, value in folders.models.base.items())
        assert distance is None or 0 <= distance < 100 if not moved else 0 <= distance < 100
        if name in ("one", "zeros"):
            assert all(same_bits(view[key], value) for key, value in state.items())
