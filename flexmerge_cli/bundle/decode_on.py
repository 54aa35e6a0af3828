"""Decodes a coded tensor on the device that uses it: the packed bytes go there, and values are looked up there.

The same bits as on the CPU. What no table decodes (low rank, sparse) is decoded on the CPU, rows by rows, and moved.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.engine.device import as_tensor, torch_dtype
from flexmerge_cli.engine.upload import Uploads
from flexmerge_cli.residuals.look_up import scaled_levels_on
from flexmerge_cli.stored.decoding import Packable, Read, RouteParts
from flexmerge_cli.stored.packed import Packed

# Elements decoded at a time on a device.
BLOCK_ELEMENTS = 1 << 24


def decode_on(parts: RouteParts, read: Read, stored: Packable, device: torch.device, uploads: Uploads) -> Tensor:
    """Decode on the device, in the task's own dtype, one axis. stored: of a form that decodes on devices.

    parts: those on the task's route. read: gives the elements of one.
    """

    def place(values: Tensor) -> Tensor:
        return uploads(values, device)

    packed = stored.packed(parts, read)
    assert isinstance(packed, Packed)
    m, n = packed.matrix
    out = torch.empty(m, n, dtype=torch_dtype(packed.dtype), device=device)
    step = max(1, BLOCK_ELEMENTS // max(1, n))
    for first in range(0, m, step):
        rows = slice(first, min(m, first + step))
        out[rows] = _values(packed, rows, place).to(out.dtype)
    return out.reshape(-1)


def _values(packed: Packed, rows: slice, place: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the values, float32 [rows, n], on the device to which `place` moves tensors."""
    addends = []
    m, n = packed.matrix
    if packed.dense is not None:
        raw = np.ascontiguousarray(packed.dense.bits[rows.start * n : rows.stop * n]).view(np.uint8)
        addends.append(place(as_tensor(raw, packed.dense.dtype)).to(torch.float32).reshape(-1, n))
    for look_up in packed.codes:
        scale = look_up.scale[rows] if len(look_up.scale) == m else look_up.scale
        part = look_up._replace(codes=look_up.codes[rows], scale=scale)
        addends.append(scaled_levels_on(part, lambda array: place(torch.from_numpy(array))))
    if packed.factors is not None or packed.kept is not None:
        rest = replace(packed, dtype="F32", dense=None, codes=()).rows(np.arange(rows.start, rows.stop))
        addends.append(place(torch.from_numpy(rest)))
    total = addends[0]
    for addend in addends[1:]:
        total = total + addend
    return total
