"""Products with a weight of codes in one Triton kernel: centre and residual are looked up where they are multiplied.

For few rows of x, where reading the weight is what takes the time: it is read as it is stored, once, and nothing of it
is written. Imported only where weights lie on a GPU; torch for CUDA comes with Triton. Each weight is rounded as a
decoded one is, sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexmerge_cli.bundle.packed_on import CodesOn, PackedOn

# Rows of x, rows of the weight, and elements of the sum that one program takes at a time; tl.dot takes 16 at least.
ROWS, TILE_M, TILE_N = 16, 32, 64

STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product(x: Tensor, weight: PackedOn) -> Tensor:
    """Return x · Wᵀ, [k, n] -> float32 [k, m]. The weight has one or two arrays of codes, and nothing else."""
    (k, n), m = x.shape, weight.matrix[0]
    x, found = x.contiguous(), x.new_empty(k, m, dtype=torch.float32)
    first, second = weight.codes[0], weight.codes[-1]
    grid = triton.cdiv(m, TILE_M), triton.cdiv(k, ROWS)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton starts kernels on the current GPU, wherever their tensors lie.
        _product[grid](
            x, found, k, m, n, *_arguments(first), *_arguments(second),
            first.bits, second.bits if len(weight.codes) > 1 else 0, STORED[weight.dtype],
            "ieee" if x.dtype is torch.float32 else "tf32", ROWS, TILE_M, TILE_N,
        )  # fmt: skip
    return found


def _arguments(codes: CodesOn) -> tuple[Tensor, int, Tensor, Tensor, int]:
    return codes.codes, codes.codes.shape[1], codes.table, codes.scale, int(len(codes.scale) > 1)


@triton.jit
def _product(
    x, found, k, m, n, codes_a, width_a, table_a, scale_a, step_a, codes_b, width_b, table_b, scale_b, step_b,
    BITS_A: tl.constexpr, BITS_B: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    of_m = (tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    of_k = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS, TILE_M), tl.float32)
    for first in range(0, n, TILE_N):
        of_n = first + tl.arange(0, TILE_N)
        rows = tl.load(x + of_k[:, None] * n + of_n[None, :], mask=(of_k < k)[:, None] & (of_n < n)[None, :], other=0.0)
        tile = _levels(codes_a, width_a, table_a, scale_a, step_a, of_m, of_n, m, n, BITS_A)
        if BITS_B:
            tile += _levels(codes_b, width_b, table_b, scale_b, step_b, of_m, of_n, m, n, BITS_B)
        # tf32 holds every bfloat16 and float16, so that products are exact with it, too.
        tile = tile.to(STORED).to(x.dtype.element_ty).to(tl.float32)
        total += tl.dot(rows.to(tl.float32), tl.trans(tile), input_precision=PRECISION)
    inside = (of_k < k)[:, None] & (of_m < m)[None, :]
    tl.store(found + of_k[:, None] * m + of_m[None, :], total, mask=inside)


@triton.jit
def _levels(codes, width, table, scale, step, of_m, of_n, m, n, BITS: tl.constexpr):
    """Look up table[codes] · scale, float32 [TILE_M, TILE_N]. Bit j·BITS of a row begins code j
    (residuals/packing.py)."""
    inside = (of_m < m)[:, None] & (of_n < n)[None, :]
    bit = of_n * BITS
    place = codes + of_m[:, None] * width + (bit >> 3)[None, :]
    found = tl.load(place, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may end in the next byte
        behind = inside & ((bit >> 3) + 1 < width)[None, :]
        found |= tl.load(place + 1, mask=behind, other=0).to(tl.int32) << 8
    code = (found >> (bit & 7)[None, :]) & ((1 << BITS) - 1)
    level = tl.load(table + code, mask=inside, other=0.0)
    return level * tl.load(scale + of_m * step, mask=of_m < m, other=0.0)[:, None]
