"""Stores less than one bit per element: one of a few patterns for the signs of a run of elements. Own construction.

The patterns of a run of d = 4, 8, 16 or 32 elements are the rows of the d × d Hadamard matrix and their negatives: the
2·d words of a first-order Reed–Muller code (Muller 1954, Reed 1954), any two of which are orthogonal or opposite. A run
takes the one that its elements correlate with most, in log2(2·d) bits. Rows decode longer than they were
(scales.py), and the last run of a row is filled up with zeros. `d = 1` would be one sign an element: low_bit.py.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.residuals import scales
from flexmerge_cli.residuals.bitdelta import LEVELS
from flexmerge_cli.residuals.coder import CodedPart, Coder, Matrix, Parts, Rows
from flexmerge_cli.residuals.low_bit import LookUp, LowBit, scaled_levels
from flexmerge_cli.residuals.packing import pack, row_bytes, unpack
from flexmerge_cli.residuals.scales import Scales

RUNS = {0.1875: 32, 0.3125: 16, 0.5: 8, 0.75: 4}
"""Maps bits per element to the number of elements in a run."""

# The part of the energy of a normal distribution that a pattern at its best scale leaves: 1 - (E max |N|)² / d for d
# independent variables. Elements with heavier tails leave more, but the longer the runs, the less. If single signs
# capture c, a run captures g · (c / 2π⁻¹)^a. Laplace, uniform and Student's t of 3 and 5 degrees of freedom are
# within 0.03 of it.
NORMAL_LOSSES = {4: 0.463643, 8: 0.602450, 16: 0.730326, 32: 0.827851}
TAIL_EXPONENTS = {4: 0.85, 8: 0.65, 16: 0.45, 32: 0.30}

# Elements coded at a time on the CPU: the float64 intermediates then stay in the second-level cache.
BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRuns:
    """`scale` [m], `codes` [m/k, ⌈k·⌈n/run⌉·log2(2·run)/8⌉]. Decodes to ± scale; reads as codes of one bit."""

    run: int
    """Elements of a run: 4, 8, 16 or 32."""
    scales: Scales = "bfloat16"
    rows_per_pack: int = 1
    """k, the number of rows whose codes are packed together, before the next code starts on a byte; divides m and 8."""

    @property
    def scope(self) -> Literal["row"]:
        return "row"

    @property
    def code_bits(self) -> int:
        return self.run.bit_length()

    def of_rows(self, num_rows: int) -> "SignRuns":
        """Return the coder for a number of rows. With scales of a byte, codes of up to 8 rows are packed together."""
        return replace(self, rows_per_pack=math.gcd(num_rows, 8) or 1) if self.scales == "byte" else self

    def parts(self, shape: Matrix, dtype: str) -> tuple[CodedPart, ...]:
        (m, n), k = shape, self.rows_per_pack
        codes = m // k, row_bytes(k * -(-n // self.run), self.code_bits)
        return (
            CodedPart(role="scale", dtype=scales.DTYPES[self.scales], shape=(m,), by_row=True),
            CodedPart(role="codes", dtype="U8", shape=codes, by_row=True),
        )

    def workspace(self, shape: Matrix) -> int:
        m, n = shape
        filled = self._filled(n)
        return 8 * 6 * min(m * filled, max(BLOCK_ELEMENTS, filled)) + 2 * m * n + 40 * m

    def encode(self, matrix: Tensor, dtype: str) -> dict[str, np.ndarray]:
        m, n = matrix.shape
        codes = torch.empty(m, -(-n // self.run), dtype=torch.uint8, device=matrix.device)
        scale = torch.empty(m, dtype=torch.float32, device=matrix.device)
        step = max(1, BLOCK_ELEMENTS // max(1, self._filled(n))) if matrix.device.type == "cpu" else max(1, m)
        for first in range(0, m, step):
            rows = slice(first, first + step)
            codes[rows], scale[rows] = self._coded(matrix[rows].double())
        return self.parts_of(codes, scale)

    def parts_of(self, codes: Tensor, scale: Tensor) -> dict[str, np.ndarray]:
        (m, num_runs), k = codes.shape, self.rows_per_pack
        packed = pack(codes.cpu().numpy().reshape(m // k, k * num_runs), self.code_bits)
        return {"scale": scales.stored(scale.cpu().numpy(), self.scales), "codes": packed}

    def words(self) -> np.ndarray:
        bits = np.unpackbits(patterns(self.run), axis=1, bitorder="little")[:, : self.run]
        return LEVELS[bits]

    @property
    def usual_loss(self) -> float:
        return NORMAL_LOSSES[self.run]

    def decode(self, parts: Parts, shape: Matrix, dtype: str, rows: Rows | None = None) -> np.ndarray:
        return scaled_levels(self.look_up(parts, shape))

    def look_up(self, parts: Parts, shape: Matrix) -> LookUp:
        """Write out the patterns as codes of one bit per element. Raises ValueError if the bytes are not n codes."""
        n, k = shape[1], self.rows_per_pack
        num_runs = -(-n // self.run)
        codes = unpack(parts["codes"], k * num_runs, self.code_bits).reshape(k * len(parts["codes"]), num_runs)
        if self.run == 4:  # two patterns to a byte
            codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
            signs = patterns(4)[codes[:, ::2], 0] | patterns(4)[codes[:, 1::2], 0] << 4
        else:
            signs = patterns(self.run)[codes].reshape(len(codes), codes.shape[1] * self.run // 8)
        signs = np.ascontiguousarray(signs[:, : row_bytes(n, 1)])
        return LookUp(signs, n, 1, LEVELS, scales.read(parts["scale"], self.scales))

    def _filled(self, n: int) -> int:
        """Return the number of elements of a row whose last run is filled up."""
        return n + -n % self.run

    def _coded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode float64 [k, n] into codes, uint8 [k, runs], and scales, float32 [k]."""
        from flexmerge_cli.residuals.quantise import row_sums
        from flexmerge_cli.residuals.scales import lengthening, rounded

        k, n = x.shape
        energy = row_sums(x.square())
        y = torch.nn.functional.pad(x, (0, -n % self.run)).view(k, -1, self.run)
        for half in (1 << step for step in range(self.run.bit_length() - 1)):  # additions alone: the same on any device
            pair = y.view(k, -1, self.run // (2 * half), 2, half)
            y = torch.stack([pair[:, :, :, 0] + pair[:, :, :, 1], pair[:, :, :, 0] - pair[:, :, :, 1]], 3)
        y = y.view(k, -1, self.run)
        best = y.abs().argmax(2, keepdim=True)
        products = y.gather(2, best).squeeze(2)
        ones = torch.full_like(energy, n**0.5)  # This is the length of a row of signs.
        longer = lengthening(row_sums(products.abs()), energy.sqrt(), ones, NORMAL_LOSSES[self.run])
        codes = best.squeeze(2) + self.run * (products < 0)
        return codes.to(torch.uint8), rounded(longer * (energy / max(1, n)).sqrt(), self.scales)

    def loss(self, sign_loss: float) -> float:
        """Predict the part of a residual's energy that is lost at the best scale, in [0, 1], from that of one sign per
        element."""
        caught = max(0.0, 1 - sign_loss) / (2 / np.pi)
        found = 1 - (1 - NORMAL_LOSSES[self.run]) * caught ** TAIL_EXPONENTS[self.run]
        return float(min(1.0, max(sign_loss, found)))


@functools.cache
def patterns(run: int) -> np.ndarray:
    """Return uint8 [2·run, ⌈run/8⌉]: the signs of each code, the first element in the least significant bit; set is
    +."""
    number = np.arange(run, dtype=np.uint8)
    is_odd = np.bitwise_count(number[:, None] & number) & 1
    return np.packbits(np.concatenate([1 - is_odd, is_odd]), axis=1, bitorder="little")


def residual_code(bits: float, scales: Scales, num_rows: int) -> Coder:
    """Return the code of a residual that `auto` stores. With up to 2 bits, rows decode longer than they were.

    bits: of RUNS, or 1 … 8. scales: of up to 2 bits; from 3 bits on, scales are bfloat16.
    """
    if bits < 1:
        return SignRuns(run=RUNS[bits], scales=scales).of_rows(num_rows)
    is_coarse = bits <= 2
    return LowBit(
        bits=int(bits),
        scales=scales if is_coarse else "bfloat16",
        clip="search",
        gain="long" if is_coarse else "none",
    )
