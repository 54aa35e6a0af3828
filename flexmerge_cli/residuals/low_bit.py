"""Stores rows as one scale and a code of a few bits per element, and decodes them. quantise.py encodes.

    1, 2, 3 bits   levels of a normal distribution, in units of the row's root mean square
    4 … 8 bits     evenly spaced, q = -h … h with h = 2^(b-1) - 1; zero is exact

Used for residuals, coded centres and coded copies alike. Own construction; no single paper.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from flexmerge_cli.later import Tensor
from flexmerge_cli.residuals import scales
from flexmerge_cli.residuals.coder import CodedPart, Matrix, Parts, Rows
from flexmerge_cli.residuals.packing import pack, row_bytes, unpack
from flexmerge_cli.residuals.scales import Scales

# The positive half of the Lloyd–Max levels of N(0, 1), and their mean squared errors.
GAUSS_LEVELS = {
    1: (0.797884560803,),
    2: (0.452780034636, 1.510417608499),
    3: (0.245094178944, 0.756005281206, 1.343909278505, 2.151945704537),
}
GAUSS_LOSSES = {1: 0.363380, 2: 0.117482, 3: 0.034548}
# The thresholds between them. They are symmetric about 0, which is also a threshold.
GAUSS_THRESHOLDS: dict[int, tuple[float, ...]] = {
    1: (),
    2: (0.981598821568,),
    3: (0.500549730075, 1.049957279855, 1.747927491521),
}

# float32 values of one decoded block: it is still in the cache when the scales are applied.
BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class LowBit:
    """`scale` [m], `levels` [2^bits] if empirical, `codes` [m, ⌈n·bits/8⌉]. Decodes to scale · level."""

    bits: int = 2
    """1 to 8."""
    levels: Literal["gauss", "empirical"] = "gauss"
    """For up to 3 bits: the table above, or levels fitted to the whole tensor, which are stored."""
    gain: Literal["none", "norm", "long"] = "none"
    """norm: after coding, scales are set so that every row decodes to its own length. long, for up to 2 bits: to its
    length times scales.lengthening."""
    scales: Scales = "float32"
    """bfloat16 halves the scales at up to 0.4 % error of gain; no float16, which underflows at 1e-5."""
    clip: Literal["none", "search"] = "none"
    """search: at 4 bits, the row's largest values are cut off where that lowers its squared error."""

    @property
    def scope(self) -> Literal["row", "tensor"]:
        return "tensor" if self.has_levels else "row"

    @property
    def has_levels(self) -> bool:
        return self.levels == "empirical" and self.bits <= 3

    def parts(self, shape: Matrix, dtype: str) -> tuple[CodedPart, ...]:
        m, n = shape
        levels = (
            (CodedPart(role="levels", dtype="F32", shape=(1 << self.bits,), by_row=False),) if self.has_levels else ()
        )
        return (
            CodedPart(role="scale", dtype=scales.DTYPES[self.scales], shape=(m,), by_row=True),
            *levels,
            CodedPart(role="codes", dtype="U8", shape=(m, row_bytes(n, self.bits)), by_row=True),
        )

    def workspace(self, shape: Matrix) -> int:
        from flexmerge_cli.residuals.quantise import BLOCK_ELEMENTS as TOGETHER

        m, n = shape
        fitted = 48 * m * n if self.has_levels else 0
        # Blocks of float64; codes, their lanes and bytes; the decoded values.
        return max(fitted, 80 * min(m * n, max(n, TOGETHER)) + 4 * m * n, 4 * BLOCK_ELEMENTS + 6 * m * n)

    def encode(self, matrix: Tensor, dtype: str) -> dict[str, np.ndarray]:
        from flexmerge_cli.residuals.quantise import fit_levels, quantise

        levels = fit_levels(matrix, self.bits) if self.has_levels else self.table()
        parts = self.parts_of(*quantise(matrix, self, levels))
        return {"scale": parts["scale"], "levels": levels, "codes": parts["codes"]} if self.has_levels else parts

    def parts_of(self, codes: Tensor, scale: Tensor) -> dict[str, np.ndarray]:
        return {
            "scale": scales.stored(scale.cpu().numpy(), self.scales),
            "codes": pack(codes.cpu().numpy(), self.bits),
        }

    def words(self) -> np.ndarray:
        return self.table()[:, None]

    @property
    def usual_loss(self) -> float:
        return GAUSS_LOSSES[self.bits]

    def decode(self, parts: Parts, shape: Matrix, dtype: str, rows: Rows | None = None) -> np.ndarray:
        return scaled_levels(self.look_up(parts, shape))

    def look_up(self, parts: Parts, shape: Matrix) -> "LookUp":
        levels = parts["levels"] if self.has_levels else self.table()
        return LookUp(parts["codes"], shape[1], self.bits, levels, scales.read(parts["scale"], self.scales))

    def table(self) -> np.ndarray:
        """Return the value of each code in units of the scale: float32 [2^bits]."""
        if self.bits > 3:
            # The highest code does not occur; in a damaged part it reads as one step more.
            return np.arange(1 << self.bits, dtype=np.float32) - np.float32(half_range(self.bits))
        positive = np.array(GAUSS_LEVELS[self.bits], np.float64)
        return np.concatenate([-positive[::-1], positive]).astype(np.float32)


def half_range(bits: int) -> int:
    """Return h of evenly spaced levels."""
    return (1 << (bits - 1)) - 1


class LookUp(NamedTuple):
    """The inputs of decoding by table[codes] · scale."""

    codes: np.ndarray
    """Packed, uint8 [m, ⌈n·bits/8⌉]."""
    num_columns: int
    bits: int
    table: np.ndarray
    """The value of each code, float32 [2^bits]."""
    scale: np.ndarray
    """The scale of each row, float32 [m, 1], or of all, [1, 1]."""


def scaled_levels(look_up: LookUp) -> np.ndarray:
    """Compute table[codes] · scale, float32 [m, n]: one product per element. Raises ValueError if the bytes are not n
    codes per row."""
    codes, num_columns, bits, levels, scale = look_up
    m = len(codes)
    out = np.empty((m, num_columns), np.float32)
    step = max(1, BLOCK_ELEMENTS // max(1, num_columns))
    for first in range(0, m, step):
        rows = slice(first, min(m, first + step))
        if bits == 8:
            np.add(codes[rows], levels[0], out=out[rows])
            values = out[rows]
        else:
            values = unpack(codes[rows], num_columns, bits, levels)
        np.multiply(values, scale[rows] if len(scale) == m else scale, out=out[rows])
    return out


def weight_code(bits: int) -> LowBit:
    """Return the code of weights, for a coded centre or copy; `auto` measures its statistics with it, too."""
    return LowBit(bits=bits, scales="bfloat16", clip="search")
