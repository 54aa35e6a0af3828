"""Stores the scales of rows: float32, bfloat16, or a byte of their logarithm. Numpy only.

A byte c stands for 2^((c - 192) / 4), from 2^-47.75 to 2^15.75, and 0 for 0. Rounding to it changes a row's length by
9 % at most and by 5 % on average, which loses a quarter of a per cent of its energy: far less than codes of two bits
and fewer do. Scales below half of the smallest become 0, and those above the largest are refused.
"""

import math
from typing import Literal

import numpy as np

from flexmerge_cli.checkpoint.dtypes import from_float32, to_float32
from flexmerge_cli.later import Tensor, torch

Scales = Literal["float32", "bfloat16", "byte"]

DTYPES: dict[Scales, str] = {"float32": "F32", "bfloat16": "BF16", "byte": "U8"}

STEPS, ONE = 4, 192

VALUES = np.concatenate([[0.0], np.exp2((np.arange(1, 256) - ONE) / STEPS)]).astype(np.float32)
"""The scale that each byte stands for."""


def lengthening(product: Tensor, length: Tensor, decoded: Tensor, usual_loss: float) -> Tensor:
    """Return the factors, float64 [m], by which rows should decode to more than their own length.

    Let c be the cosine of a row and what it decodes to. At the row's own length, the component along the row is c times
    the row; at 1/c times that length it is the whole row, but the error is also largest. Accuracy is best in between,
    at c^(-2/3). Rows that code worse than rows of a normal distribution are treated like those.

    product, length, decoded: ⟨row, decoded⟩ and both lengths, float64 [m]. usual_loss: 1 - c² of a normal distribution.
    """
    both = length * decoded
    cosine = torch.where(both > 0, product / both, 1.0)
    found: Tensor = cosine.square().clamp(1 - usual_loss, 1) ** (-1 / 3)
    return found


def rounded(scale: Tensor, scales: Scales) -> Tensor:
    """Round scales, which are at least 0, to the float32 values that a reader gets; inf if that cannot be stored."""
    if scales == "byte":
        codes = (scale.double().log2() * STEPS).round().add(ONE)  # 0 gives -inf.
        found = torch.from_numpy(VALUES).to(scale.device)[codes.clamp(1, 255).long()]
        found = torch.where(scale < VALUES[1] / 2, 0.0, found)
        return torch.where(codes > 255, math.inf, found)
    scale = scale.float()
    return scale.to(torch.bfloat16).float() if scales == "bfloat16" else scale


def stored(scale: np.ndarray, scales: Scales) -> np.ndarray:
    """Convert scales from `rounded` into the array that is stored. Raises OverflowError if a byte cannot hold one."""
    if scales != "byte":
        return from_float32(scale, DTYPES[scales])
    if (scale > VALUES[-1]).any():
        raise OverflowError(f"a row needs a scale above {VALUES[-1]:,.0f}, the largest that a byte stands for")
    return np.searchsorted(VALUES, scale).astype(np.uint8)


def read(bits: np.ndarray, scales: Scales) -> np.ndarray:
    """Convert an array from `stored` back into scales, float32 [m, 1]."""
    return (VALUES[bits] if scales == "byte" else to_float32(bits, DTYPES[scales]))[:, None]
