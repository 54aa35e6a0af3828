import numpy as np
import pytest
import torch

from flexmerge_cli import native
from flexmerge_cli.residuals.low_bit import weight_code
from flexmerge_cli.residuals.quantise import squared_errors
from flexmerge_cli.residuals.row_errors import row_errors

BITS = (1, 2, 3, 4, 8)


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request, monkeypatch):
    """Both ways, where there are two."""
    if request.param == "torch":
        monkeypatch.setattr(native, "lib", None)
    elif native.lib is None:
        pytest.skip("not built: no compiler")


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MATRICES = {
    "normal": drawn(50, 768) * 0.02,
    "heavy tails": drawn(40, 300) ** 5,
    "bfloat16, with ties": drawn(64, 64).bfloat16().float(),
    "wider than a block": drawn(2, 150_001),
    "few columns": drawn(40, 3),
    "one column": drawn(40, 1),
    "constant": torch.full((3, 9), 3.0),
    "one huge element": torch.cat([drawn(5, 99), torch.full((5, 1), 1e4)], dim=1),
    "out of range": torch.cat([drawn(3, 9) * 1e-38, torch.zeros(2, 9), drawn(3, 9) * 1e30, drawn(2, 9)]),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_the_fast_way_is_the_plain_way(matrix):
    """Where little is lost, float32 gives it to fewer digits: elements are off by up to 2^-23 of themselves."""
    fast = row_errors(matrix, BITS).sum(1)
    plain = np.array([float(squared_errors(matrix, weight_code(bits)).sum()) for bits in BITS])
    energy = float(matrix.double().square().sum())
    assert (np.abs(fast - plain) <= 1e-6 * plain + 2.0**-22 * np.sqrt(plain * energy)).all()


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_no_row_depends_on_another(matrix):
    whole = row_errors(matrix, BITS)
    for count in (1, 2, 7):
        for first in range(0, len(matrix), 5):
            assert np.array_equal(row_errors(matrix[first : first + count], BITS), whole[:, first : first + count])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_loses_nothing(shape):
    assert not row_errors(torch.zeros(shape), BITS).any()
