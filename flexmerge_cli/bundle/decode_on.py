"""A coded tensor decoded where it is used: packed bytes go to the device, and values are looked up there.

The same bits as on the CPU. What no table decodes (low rank, sparse) is decoded on the CPU, rows by rows, and moved.
"""

import math

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.engine.device import as_tensor, torch_dtype
from flexmerge_cli.residuals.bitdelta import BitDelta
from flexmerge_cli.residuals.look_up import scaled_levels_on
from flexmerge_cli.residuals.low_bit import LowBit
from flexmerge_cli.stored.coded import CodedTensor, Dense, Rows


def decode_on(bundle: Bundle, stored: CodedTensor, device: torch.device) -> Tensor:
    """In the task's own dtype and shape, on the device."""
    of = stored.of
    out = torch.empty(math.prod(of.shape), dtype=torch_dtype(of.dtype), device=device)
    for at, addends in stored.blocks(bundle.parts_of(of.task), bundle.bits):
        first, *rest = [_values(addend, device) for addend in addends]
        out[at] = (first + rest[0] if rest else first).to(out.dtype)
    return out.reshape(of.shape)


def _values(addend: Rows | Dense, device: torch.device) -> Tensor:
    """float32, one axis."""
    if isinstance(addend, Dense):
        raw = np.ascontiguousarray(addend.bits).view(np.uint8)
        return as_tensor(raw, addend.dtype).to(device).to(torch.float32)
    if isinstance(addend.coder, (LowBit, BitDelta)):
        return scaled_levels_on(addend.coder.look_up(addend.chunk(), addend.matrix), device).flatten()
    return torch.from_numpy(addend.values()).to(device)
