"""Element, row, tensor, block and model methods against golden/methods-1."""

import pytest
import torch

from .driver import family_of, merge
from .golden import FIRST, first_case, golden_family, values

CASES = list(FIRST["cases"])
EDGES = list(FIRST["edge"])

# The file has two tasks of masked methods.
STORED = ("cars", "svhn")


def assert_near(actual, expected, *, rtol, atol):
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape
    bound = atol + rtol * (expected.abs().max().item() if expected.numel() else 0.0)
    assert (actual - expected).abs().max().item() <= bound


@pytest.mark.usefixtures("ties_by_index")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", CASES)
def test_ties_zeros_and_constant_rows_are_golden(name, edge):
    deltas, expected = FIRST["edge"][edge]["deltas"], FIRST["edge"][edge]["results"][name]
    family = family_of({"w.weight": torch.tensor(deltas).view(3, 2, 4)})
    call, steps = first_case(name)
    merged = merge(family, call, steps=steps)["w.weight"]
    tolerance = FIRST["cases"][name]["tolerance"]
    assert_near(merged.unified.flatten(), torch.tensor(expected["unified"]), **tolerance)
    assert ("reconstructed" in expected) == (call.method.form == "masked")
    for task, row in zip("abc", expected.get("reconstructed", ())):
        assert_near(merged.tasks[task].flatten(), torch.tensor(row), **tolerance)


@pytest.mark.parametrize("group", FIRST["groups"])
@pytest.mark.parametrize("name", CASES)
def test_family_is_golden(name, group):
    family = golden_family()
    call, steps = first_case(name)
    blocks = [family.block_of(tensor) for tensor in FIRST["tensors"]]
    merged = merge(family, call, blocks=blocks, group=FIRST["groups"][group], steps=steps)
    tolerance = FIRST["cases"][name]["tolerance"]
    for tensor in FIRST["tensors"]:
        assert_near(merged[tensor].unified, values(1)[f"{name}/{group}/{tensor}"], **tolerance)
        for task in STORED if call.method.form == "masked" else ():
            assert_near(merged[tensor].tasks[task], values(1)[f"{name}/{group}/{tensor}/{task}"], **tolerance)


def test_every_value_of_the_file_is_compared():
    expected = {
        f"{name}/{group}/{tensor}{task}"
        for name in CASES
        for group in FIRST["groups"]
        for tensor in FIRST["tensors"]
        for task in ("", *(f"/{task}" for task in STORED if first_case(name)[0].method.form == "masked"))
    }
    assert set(values(1)) == expected
