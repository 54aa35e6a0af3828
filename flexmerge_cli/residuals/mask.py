"""Packs and unpacks one bit per element and task, and applies it to the unified delta. Numpy only.

Element e of a tensor, in C order, is bit e mod 8 of byte e // 8, counted from the least significant; the bits after
the last element are 0. A range that starts at a multiple of 8 elements can therefore be packed and read on its own.
The method decides which elements a task takes (methods/emr.py, methods/consensus.py).
"""

import numpy as np

from flexmerge_cli.random import key64, random_bits

# n elements of one tensor, or of a range of it


def packed_bytes(num_elements: int) -> int:
    """Return the bytes of the mask of one tensor and one task."""
    return -(-num_elements // 8)


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack bool [..., n] into uint8 [..., ⌈n/8⌉]. Any leading axes, e.g. of tasks, stay."""
    return np.packbits(mask, axis=-1, bitorder="little")


def unpack(packed: np.ndarray, num_elements: int) -> np.ndarray:
    """Unpack uint8 [..., ⌈n/8⌉] into bool [..., n]; num_elements is n. The inverse of `pack`.

    Raises ValueError like `check`.
    """
    check(packed, num_elements)
    return np.unpackbits(packed, axis=-1, count=num_elements, bitorder="little").view(bool)


def check(packed: np.ndarray, num_elements: int) -> None:
    """Raise ValueError if the bytes are not those of n elements, or a bit after the last element is set."""
    if packed.dtype != np.uint8 or packed.shape[-1] != packed_bytes(num_elements):
        raise ValueError(f"a mask of {num_elements} elements is not {packed.dtype} {list(packed.shape)}")
    if num_elements % 8 and (packed[..., -1] >> (num_elements % 8)).any():
        raise ValueError(f"a mask of {num_elements} elements has bits behind its end")


def apply(
    base: np.ndarray,
    unified: np.ndarray,
    mask: np.ndarray,
    gamma: float | np.floating = 1.0,
    *,
    is_signed: bool = False,
) -> np.ndarray:
    """Compute base + gamma · mask · unified: one float32 product, then one float32 sum. Returns float32 [n].

    base, unified: float32 [n]; mask: bool [n]; gamma: rounded to float32, as it is stored. Elementwise, so any range of
    a tensor gives the same bits. Elements that the task does not take equal the base's, bit for bit; if is_signed,
    gamma · unified is subtracted there.
    """
    shift = np.float32(gamma) * unified.astype(np.float32, copy=False)
    return np.where(mask, base + shift, base - shift if is_signed else base).astype(np.float32, copy=False)


def drawn(seed: int, task: str, tensor: str, start: int, count: int) -> np.ndarray:
    """Draw a task's mask of elements start … start + count - 1 of a tensor: bool [count]."""
    return random_bits(key64("flexmerge/superposed/1", seed, task, tensor), start, count)
