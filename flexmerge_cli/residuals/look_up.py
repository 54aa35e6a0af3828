"""Decodes by table look-up on any device of torch; low_bit.py does it in numpy, and gives the same bits."""

from collections.abc import Callable

import numpy as np

from flexmerge_cli.later import Tensor, torch
from flexmerge_cli.residuals.low_bit import LookUp
from flexmerge_cli.residuals.packing import codes_of_digit, layout


def scaled_levels_on(look_up: LookUp, place: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Compute table[codes] · scale, float32 [m, n], on the device to which `place` moves arrays, the packed bytes."""
    packed, scale = place(look_up.codes), place(look_up.scale)
    return unpack_on(packed, look_up.num_columns, look_up.bits, look_up.table) * scale


def unpack_on(packed: Tensor, num_codes: int, bits: int, values: np.ndarray) -> Tensor:
    """Map uint8 [m, ⌈n·b/8⌉] to values[codes], [m, n] on the same device; num_codes is n. values: float32 [2^bits]."""
    word_bytes, digit_bits = layout(bits)
    table = torch.from_numpy(values[codes_of_digit(bits, digit_bits)]).to(packed.device)
    m, padding = len(packed), -packed.shape[1] % word_bytes
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    words_per_row = packed.shape[1] // word_bytes
    digits = packed.int()
    if word_bytes > 1:
        places = torch.arange(0, 8 * word_bytes, 8, device=packed.device)
        words = (packed.view(m, words_per_row, word_bytes).long() << places).sum(2, keepdim=True)
        places = torch.arange(0, 8 * word_bytes, digit_bits, device=packed.device)
        digits = (words >> places & ((1 << digit_bits) - 1)).int()
    return table.index_select(0, digits.flatten()).view(m, words_per_row * word_bytes * 8 // bits)[:, :num_codes]
