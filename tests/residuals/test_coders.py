"""What holds for every coder: bytes as billed, chunks of rows, and matrices without rows, columns or content."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmerge_cli.checkpoint.dtypes import NUMPY
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.coder import MatrixView
from flexmerge_cli.residuals.low_bit import LowBit, weight_code
from flexmerge_cli.residuals.low_rank import LowRank
from flexmerge_cli.residuals.sign_runs import RUNS, residual_code
from flexmerge_cli.residuals.sparse import Sparse

CODERS = [
    BitDelta(),
    BitDelta(scale="row"),
    BitDelta(gain="norm"),
    *(LowBit(bits=bits) for bits in range(1, 9)),
    LowBit(bits=2, levels="empirical"),
    LowBit(bits=3, levels="empirical", gain="norm", scales="bfloat16"),
    *(weight_code(bits) for bits in (2, 3, 4, 8)),
    *(residual_code(bits, "bfloat16", 1) for bits in (*RUNS, 1, 2, 3, 4, 8)),
    *(residual_code(bits, "byte", 1) for bits in (*RUNS, 1, 2)),
    LowRank(),
    LowRank(rank=1000),
    LowRank(shared_by=3),
    *(Sparse(density=density, rescale=rescale) for density in (0.05, 1.0) for rescale in ("none", "l1", "l2")),
    Sparse(density=0.3, select="row"),
]
SIDES = st.sampled_from([0, 1, 2, 99])
KINDS = st.sampled_from(["normal", "zero", "constant", "zero rows", "one huge", "tiny"])
DTYPES = st.sampled_from(["F32", "BF16", "F16"])


@st.composite
def matrices(draw):
    m, n = draw(SIDES), draw(SIDES)
    matrix = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal((m, n)).astype(np.float32)
    kind = draw(KINDS)
    if kind in ("zero", "constant"):
        matrix[:] = 0 if kind == "zero" else -0.25
    if kind == "zero rows":
        matrix[::2] = 0
    if kind == "one huge" and matrix.size:
        matrix.flat[draw(st.integers(0, matrix.size - 1))] = 1e4
    return matrix * np.float32(1e-6) if kind == "tiny" else matrix


def decode(coder, parts, shape, dtype, first, stop):
    by_row = {part.role for part in coder.parts(shape, dtype) if part.by_row}
    chunk = {role: part[first:stop] if role in by_row else part for role, part in parts.items()}
    return coder.decode(chunk, shape, dtype, (first, stop))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CODERS), matrices(), DTYPES)
def test_parts_are_as_billed_and_decode_to_finite_numbers(coder, matrix, dtype):
    billed = coder.parts(matrix.shape, dtype)
    parts = coder.encode(torch.from_numpy(matrix), dtype)
    assert [(part.role, part.shape, np.dtype(NUMPY[part.dtype]), part.num_bytes) for part in billed] == [
        (role, part.shape, part.dtype, part.nbytes) for role, part in parts.items()
    ]
    decoded = coder.decode(parts, matrix.shape, dtype)
    assert decoded.dtype == np.float32
    assert decoded.shape == matrix.shape
    assert np.isfinite(decoded).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CODERS), matrices(), DTYPES, st.data())
def test_rows_decode_alone_as_they_do_together(coder, matrix, dtype, data):
    stop = data.draw(st.integers(0, len(matrix)))
    first = data.draw(st.integers(0, stop))
    parts = coder.encode(torch.from_numpy(matrix), dtype)
    whole = coder.decode(parts, matrix.shape, dtype)
    rows = decode(coder, parts, matrix.shape, dtype, first, stop)
    if isinstance(coder, LowRank):  # whose products the processor adds up as it likes, in float64
        assert rows == pytest.approx(whole[first:stop], rel=1e-6, abs=1e-12)
    else:
        assert rows.tobytes() == whole[first:stop].tobytes()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([coder for coder in CODERS if coder.scope == "row"]), matrices(), st.data())
def test_coders_of_scope_row_encode_chunks_of_rows(coder, matrix, data):
    cut = data.draw(st.integers(0, len(matrix)))
    whole = coder.encode(torch.from_numpy(matrix), "F32")
    chunks = [coder.encode(torch.from_numpy(rows), "F32") for rows in (matrix[:cut], matrix[cut:])]
    assert all(part.by_row for part in coder.parts(matrix.shape, "F32"))
    for role, part in whole.items():
        assert (np.concatenate([chunk[role] for chunk in chunks]) == part).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CODERS), matrices())
def test_zero_decodes_to_zero(coder, matrix):
    zero = np.zeros_like(matrix)
    assert not coder.decode(coder.encode(torch.from_numpy(zero), "F32"), zero.shape, "F32").any()


@pytest.mark.parametrize(
    ("view", "shape", "matrix", "is_vector"),
    [
        (MatrixView.FIRST_AXIS, (), (1, 1), True),
        (MatrixView.FIRST_AXIS, (7,), (1, 7), True),
        (MatrixView.FIRST_AXIS, (1, 1, 64), (1, 64), False),
        (MatrixView.FIRST_AXIS, (16, 3, 4, 4), (16, 48), False),
        (MatrixView.FIRST_AXIS, (0, 3, 4), (0, 12), False),
        (MatrixView.FIRST_AXIS, (3, 0, 4), (3, 0), False),
        (MatrixView.SQUEEZED, (), (1, 1), True),
        (MatrixView.SQUEEZED, (1, 1, 64), (1, 64), True),
        (MatrixView.SQUEEZED, (1, 17, 64), (17, 64), False),
        (MatrixView.SQUEEZED, (64, 1), (64, 1), False),
        (MatrixView.SQUEEZED, (1, 0, 5), (0, 5), False),
        (MatrixView.LAST_AXIS, (16, 3, 4, 4), (192, 4), False),
        (MatrixView.LAST_AXIS, (7,), (1, 7), True),
    ],
)
def test_views(view, shape, matrix, is_vector):
    assert view.matrix(shape) == matrix
    assert view.is_vector(shape) == is_vector


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("coder", [coder for coder in CODERS if not isinstance(coder, LowRank)], ids=repr)
def test_a_cuda_device_gives_the_bytes_of_the_cpu(coder):
    matrix = torch.randn(200, 301, generator=torch.Generator().manual_seed(0))
    parts, on_device = coder.encode(matrix, "BF16"), coder.encode(matrix.cuda(), "BF16")
    for role, part in parts.items():
        assert part.tobytes() == on_device[role].tobytes()
