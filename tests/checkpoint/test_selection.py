"""Rows picked out of a tensor are read as a tensor of their own, in any ranges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.reader import Reader
from flexmerge_cli.checkpoint.rows import runs_of

from ..families import write_checkpoint

WHOLE = torch.arange(30 * 7, dtype=torch.int32).reshape(30, 7)


@pytest.fixture(scope="module", params=["row-major", "strided"])
def stored(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    if request.param == "strided":
        write_checkpoint(folder, {"before": torch.zeros(3), "x": WHOLE.T.contiguous().T}, layout="bin")
    else:
        write_checkpoint(folder, {"before": torch.zeros(3), "x": WHOLE})
    return open_checkpoint(str(folder)).tensors["x"]


@given(st.permutations(range(30)), st.integers(0, 30), st.integers(0, 210), st.integers(0, 210))
@settings(max_examples=100)
def test_any_range_of_any_rows(stored, order, count, start, stop):
    rows = list(order[:count])
    start, stop = sorted(min(place, count * 7) for place in (start, stop))
    picked = stored.take(runs_of(rows))
    assert picked.shape == (count, 7) and picked.num_bytes == count * 28
    with Reader() as reader:
        reader.will_need(picked, 0, 1 << 20)
        found = reader.read(picked, start, stop, np.empty(30 * 28, np.uint8)).view(np.int32)
    assert found.tolist() == WHOLE[rows].flatten()[start:stop].tolist()


def test_one_run_of_a_row_major_tensor_is_a_range_of_its_file(stored):
    run = stored.take(((4, 9),))
    assert run.is_contiguous == stored.is_contiguous
    assert stored.take(((4, 9), (20, 1))).take(((8, 2), (0, 1))).shape == (3, 7)
    with Reader() as reader:
        again = stored.take(((4, 9), (20, 1))).take(((8, 2), (0, 1)))
        found = reader.read(again, 0, 21, np.empty(84, np.uint8)).view(np.int32).reshape(3, 7)
    assert found.tolist() == WHOLE[[12, 20, 4]].tolist()
