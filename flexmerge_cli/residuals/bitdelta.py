"""Encodes and decodes BitDelta: the sign of every element, and one scale. Liu et al. 2024, without training on data.

The authors use only children with `proj` in their name and pack 32 signs along the input; here every matrix is coded,
by rows.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flexmerge_cli.later import Tensor
from flexmerge_cli.residuals.coder import CodedPart, Matrix, Parts, Rows
from flexmerge_cli.residuals.low_bit import LookUp, scaled_levels
from flexmerge_cli.residuals.packing import pack, row_bytes

LEVELS = np.array([-1.0, 1.0], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitDelta:
    """`scale` float32 [1] or [m], `codes` of one bit: set where the residual is 0 or more. Decodes to ± scale."""

    scale: Literal["tensor", "row"] = "tensor"
    """What the magnitude is averaged over; the average is the scale of least squared error."""
    gain: Literal["none", "norm"] = "none"
    """norm: the root mean square of each row instead, which keeps its length; scales are then per row."""

    @property
    def scope(self) -> Literal["row", "tensor"]:
        return "row" if self.scale == "row" or self.gain == "norm" else "tensor"

    def parts(self, shape: Matrix, dtype: str) -> tuple[CodedPart, ...]:
        m, n = shape
        by_row = self.scope == "row"
        return (
            CodedPart(role="scale", dtype="F32", shape=(m if by_row else 1,), by_row=by_row),
            CodedPart(role="codes", dtype="U8", shape=(m, row_bytes(n, 1)), by_row=True),
        )

    def workspace(self, shape: Matrix) -> int:
        return 24 * shape[0] * shape[1]

    def encode(self, matrix: Tensor, dtype: str) -> dict[str, np.ndarray]:
        from flexmerge_cli.residuals.quantise import row_sums

        rows = matrix.double() if self.scope == "row" else matrix.double().reshape(1, -1)
        size = max(1, rows.shape[1])
        scale = (row_sums(rows.square()) / size).sqrt() if self.gain == "norm" else row_sums(rows.abs()) / size
        return {"scale": scale.float().cpu().numpy(), "codes": pack((matrix >= 0).cpu().numpy(), 1)}

    def decode(self, parts: Parts, shape: Matrix, dtype: str, rows: Rows | None = None) -> np.ndarray:
        return scaled_levels(self.look_up(parts, shape))

    def look_up(self, parts: Parts, shape: Matrix) -> LookUp:
        return LookUp(parts["codes"], shape[1], 1, LEVELS, parts["scale"][:, None])
