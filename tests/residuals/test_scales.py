"""Scales of a byte: what they hold, what becomes 0, and what is refused instead of being stored wrongly."""

import numpy as np
import pytest
import torch

from flexmerge_cli.residuals.scales import VALUES, read, rounded, stored
from flexmerge_cli.residuals.sign_runs import residual_code

LEAST, LARGEST = float(VALUES[1]), float(VALUES[-1])


def decoded(*scales):
    return read(stored(rounded(torch.tensor(scales), "byte").numpy(), "byte"), "byte")[:, 0]


def test_scales_within_the_range_change_by_nine_per_cent_at_most():
    scales = np.geomspace(LEAST, LARGEST, 999, dtype=np.float32)
    assert (abs(np.log2(decoded(*scales) / scales)) <= 1 / 8 + 1e-6).all()


def test_scales_far_below_the_range_become_0():
    assert decoded(0, 1e-30, 0.49 * LEAST, 0.51 * LEAST, LEAST).tolist() == [0, 0, 0, VALUES[1], VALUES[1]]


@pytest.mark.parametrize("bits", [0.1875, 0.5, 1, 2])
@pytest.mark.parametrize("value", [1e5, 1e37])
def test_a_row_above_the_range_is_refused(bits, value):
    matrix = torch.ones(2, 32)
    matrix[1] = value
    with pytest.raises(OverflowError, match="scale above 55,109"):
        residual_code(bits, "byte", 2).encode(matrix, "F32")
    coder = residual_code(bits, "bfloat16", 2)
    found = coder.decode(coder.encode(matrix, "F32"), (2, 32), "F32").reshape(2, 32)
    assert np.isfinite(found).all() and abs(found[1]).max() > 0.5 * value
