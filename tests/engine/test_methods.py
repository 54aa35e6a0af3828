"""Every method of the registry through the engine: bytes as priced, values as the method makes them, read by anyone."""

import subprocess
import sys

import pytest
import torch

from flexmerge_cli import open_bundle, verify
from flexmerge_cli.methods.registry import parse_call

from ..families import same_bits
from ..program import ROOT
from .merges import DEFAULTS, FAMILIES, TOGETHER, billed, disk_bytes, plan_of, planned, write
from .reference import given_back

SPECTRAL_RESIDUALS = ("low_rank", "tsv_c")
"""Float64 products, rounded once: promised by their parts, not by their bits."""

# The sample reads folder after folder from stdin, where neither this package nor torch can be imported.
ALONE = """
import json, sys
sys.modules["flexmerge_cli"] = sys.modules["torch"] = None
sys.path.insert(0, sys.argv[1])
import read_bundle
for line in sys.stdin:
    folder = line.strip()
    tasks = json.load(open(folder + "/manifest.json"))["tasks"]
    print(sum(read_bundle.check(folder, task) for task in tasks), flush=True)
"""


@pytest.fixture(scope="module")
def sample_reader():
    """Folder -> number of tensors that samples/read_bundle.py decodes and finds sound."""
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(ROOT / "samples")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def read(folder):
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the sample cannot read {folder}"
        return int(answer)

    yield read
    process.stdin.close()
    process.wait(10)


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
    [((method,), dtype) for method in DEFAULTS.values() for dtype in FAMILIES]
    + [(methods, "mixed") for methods in TOGETHER],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_bundle_holds_what_was_priced_and_gives_back_what_the_method_makes(
    methods, dtype, family, sample_reader, tmp_path
):
    """Groups of one to eight tasks. What is not the default of a method is tried on the mixed family alone."""
    folders = family(dtype)
    bill = billed(plan_of(folders), *methods)
    bundle = write(folders, bill, tmp_path / "bundle")
    assert disk_bytes(bundle) == bill.total_bytes
    assert sum(part.num_bytes for file in bill.files for part in file.parts) == bill.tensor_bytes
    checked = verify(bundle, decode=True)
    assert checked.bad == {}
    assert sample_reader(bundle) == checked.num_tensors
    opened, near = open_bundle(bundle), parse_call(methods[0]).method.name in SPECTRAL_RESIDUALS
    for task, state in given_back(folders.models, bill).items():
        view = opened.view(task)
        assert sorted(view) == sorted(state)
        for name, expected in state.items():
            if near and not same_bits(view[name], expected):
                step = torch.finfo(expected.dtype).eps if expected.dtype != torch.float32 else 1e-6
                assert (view[name].dtype, view[name].shape) == (expected.dtype, expected.shape)
                assert torch.allclose(view[name].double(), expected.double(), rtol=step, atol=step)
            else:
                assert same_bits(view[name], expected), (task, name)
