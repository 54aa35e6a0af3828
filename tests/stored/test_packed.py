"""Weights in their own bytes: the loops in C give the bits of the plain way, for any rows and every form."""

from itertools import pairwise, product

import numpy as np
import pytest

from flexmerge_cli import native
from flexmerge_cli.checkpoint.dtypes import NUMPY, from_float32, to_float32
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.low_bit import LookUp, LowBit, scaled_levels
from flexmerge_cli.stored.packed import Elements, KeptElements, Masked, Packed

SHAPES = [(1, 1), (3, 7), (5, 8), (4, 33), (2, 1030), (7, 512)]


def codes(m: int, n: int, bits: int, seed: int) -> LookUp:
    random = np.random.default_rng(seed)
    table = LowBit(bits=bits).table() if bits > 1 else np.array([-1, 1], np.float32)
    packed = random.integers(0, 256, (m, -(-n * bits // 8)), dtype=np.uint8)
    scale = random.random((m if seed % 2 else 1, 1), np.float32)
    return LookUp(packed, n, bits, table, scale)


def elements(m: int, n: int, dtype: str, seed: int = 9) -> Elements:
    return Elements(from_float32(np.random.default_rng(seed).standard_normal(m * n).astype(np.float32), dtype), dtype)


def kept(m: int, n: int, dtype: str) -> KeptElements:
    positions = np.flatnonzero(np.random.default_rng(3).random(m * n) < 0.3)
    return KeptElements.at(positions, elements(1, len(positions), dtype), (m, n))


def weights(m: int, n: int, dtype: str) -> list[Packed]:
    common = {"matrix": (m, n), "dtype": dtype}
    mask = masks.pack(np.random.default_rng(4).random(m * n) < 0.5)
    found = [
        Packed(**common, dense=elements(m, n, kind), masked=Masked(elements(m, n, kind, 5), mask, np.float32(1.25)))
        for kind in ("F32", "BF16", "F16")
    ]
    found += [Packed(**common, codes=(codes(m, n, bits, 1), codes(m, n, 9 - bits, 2))) for bits in range(1, 9)]
    found += [Packed(**common, dense=elements(m, n, "BF16"), codes=(codes(m, n, 3, 1),)), Packed(**common)]
    factors = elements(m, 2, dtype), elements(2, n, dtype)
    return [*found, Packed(**common, dense=elements(m, n, "F32"), factors=factors, kept=kept(m, n, dtype))]


def plainly(packed: Packed) -> np.ndarray:
    """The sum of the whole matrices."""
    m, n = packed.matrix
    total = np.zeros(m * n, np.float32) if packed.dense is None else to_float32(packed.dense.bits, packed.dense.dtype)
    if packed.masked is not None:
        taken = masks.unpack(packed.masked.packed, m * n)
        shift = to_float32(packed.masked.unified.bits, packed.masked.unified.dtype)
        total = masks.apply(total, shift, taken, packed.masked.gamma)
    for number, look_up in enumerate(packed.codes):
        values = scaled_levels(look_up).reshape(-1)
        total = values if packed.dense is None and not number else total + values
    if packed.factors is not None:
        left, right = (to_float32(part.bits, part.dtype).astype(np.float64) for part in packed.factors)
        total = total + (left.reshape(m, 2) @ right.reshape(2, n)).astype(np.float32).reshape(-1)
    if packed.kept is not None:
        at = np.repeat(np.arange(m), np.diff(packed.kept.starts)) * n + packed.kept.columns
        sparse = np.zeros(m * n, np.float32)
        sparse[at] = to_float32(packed.kept.values.bits, packed.kept.values.dtype)
        total = total + sparse
    return from_float32(total, packed.dtype)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_rows_have_the_bits_of_the_whole_sum(shape, dtype, is_native, monkeypatch):
    if not is_native:
        monkeypatch.setattr(native, "decoding", None)
    elif native.decoding is None:
        pytest.skip("not built: no compiler")
    for packed in weights(*shape, dtype):
        expected = plainly(packed)
        assert packed.decode().tobytes() == expected.tobytes()
        assert packed.decode().dtype == np.dtype(NUMPY[dtype])
        some = np.array([shape[0] - 1, 0, 0])
        assert packed.rows(some).tobytes() == expected.reshape(shape)[some].tobytes()


@pytest.mark.skipif(native.decoding is None, reason="not built: no compiler")
@pytest.mark.parametrize("vectors", [1, 3, 4, 9])
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_what_is_decoded_for_any_split_of_the_rows(bits: int, vectors: int) -> None:
    assert native.decoding is not None
    for (m, n), kind in product([*SHAPES, (35, 97)], (None, "F32", "BF16")):
        dense = None if kind is None else elements(m, n, kind)
        mask = masks.pack(np.random.default_rng(4).random(m * n) < 0.5)
        packed = Packed(
            matrix=(m, n), dtype="F32", dense=dense, codes=(codes(m, n, bits, 1), codes(m, n, 9 - bits, 2)),
            masked=Masked(elements(m, n, kind, 5), mask, np.float32(1.25)) if kind is not None and bits % 2 else None,
        )  # fmt: skip
        assert packed.loops is not None
        x = np.random.default_rng(6).standard_normal((vectors, n)).astype(np.float32)
        whole, parts = np.full((vectors, m), np.nan, np.float32), np.full((vectors, m), np.nan, np.float32)
        for out, cuts in (whole, (0, m)), (parts, (0, m // 2, m)):
            for first, stop in pairwise(cuts):
                native.decoding.flexmerge_product(
                    native.address(packed.loops), first, stop - first, x.ctypes.data, vectors,
                    out.ctypes.data + 4 * first, m,
                )  # fmt: skip
        assert whole.tobytes() == parts.tobytes()
        decoded = packed.decode().reshape(m, n).astype(np.float64)
        bound = 1e-6 * (1 + abs(x.astype(np.float64)) @ abs(decoded).T)
        assert (abs(whole - x.astype(np.float64) @ decoded.T) <= bound).all()
        x = np.random.default_rng(7).standard_normal((vectors, m)).astype(np.float32)
        whole, parts = np.ones((vectors, n), np.float32), np.ones((vectors, n), np.float32)
        for out, cuts in (whole, (0, n)), (parts, (0, n // 16 * 8, n)):
            for first, stop in pairwise(cuts):
                native.decoding.flexmerge_product_of_rows(
                    native.address(packed.loops), m, first, stop - first, x.ctypes.data, vectors, out.ctypes.data,
                )  # fmt: skip
        assert whole.tobytes() == parts.tobytes()
        bound = 1e-6 * (1 + abs(x.astype(np.float64)) @ abs(decoded))
        assert (abs(whole - 1 - x.astype(np.float64) @ decoded) <= bound).all()


def test_a_coder_of_signs_decodes_to_plus_and_minus_its_scale():
    signs = np.array([[1.0, -2.0, 3.0]], np.float32)
    import torch

    coder = BitDelta()
    parts = coder.encode(torch.from_numpy(signs), "F32")
    packed = Packed(matrix=(1, 3), dtype="F32", codes=(coder.look_up(parts, (1, 3)),))
    assert packed.decode().tolist() == [2.0, -2.0, 2.0]
