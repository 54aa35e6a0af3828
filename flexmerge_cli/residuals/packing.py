"""Packs and unpacks rows of codes of b bits. Numpy only; the caller knows what a code stands for.

codes   uint8 [m, n], each below 2^b, b = 1 … 8
packed  uint8 [m, ⌈n·b/8⌉]; every row starts on a byte. Code j takes bits j·b … j·b + b - 1 of its row, its least
        significant bit first, and bit t of a row is bit t mod 8 of byte t // 8, counted from the least significant.
        Bits after the last code are 0.
"""

import functools
import math

import numpy as np

# Bytes that are looked up in one go: index and output then stay in the second-level cache. Without blocks, 2 and 4
# bits decode at half the speed. `scaled_levels` gives, in GB/s of float32, at 1 to 8 bits:
# 2.8 2.8 1.6 1.8 1.0 1.1 0.9 2.9.
# Repeat: python -m tests.residuals.benchmark_packing      (numpy 2.4, one of two shared EPYC cores, 2026-11)
BLOCK_BYTES = 1 << 14


def row_bytes(num_codes: int, bits: int) -> int:
    """Return the bytes of one packed row."""
    return -(-num_codes * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [m, n] into uint8 [m, ⌈n·b/8⌉]. Codes of 2^bits and above are the caller's bug, and spill over."""
    m, n = codes.shape
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, axis=1, bitorder="little")
    words_per_row = -(-n // 8)
    lanes = np.zeros((m, words_per_row * 8), np.uint8)
    lanes[:, :n] = codes
    lanes = lanes.reshape(-1, 8)
    packed = np.empty((len(lanes), bits), np.uint8)
    for first in range(0, len(lanes), BLOCK_BYTES):
        words = lanes[first : first + BLOCK_BYTES]
        # Fold neighbours: two codes of b bits in 16 become one of 2b, then in 32 one of 4b, in 64 one of 8b.
        for width in (8, 16, 32):
            wide = words.reshape(-1).view(f"<u{width // 4}")
            low = wide & ((1 << width) - 1)
            wide ^= low
            wide >>= width - bits * width // 8
            wide |= low
        for byte in range(bits):
            packed[first : first + BLOCK_BYTES, byte] = words[:, byte]
    packed = packed.reshape(m, words_per_row * bits)
    return np.ascontiguousarray(packed[:, : row_bytes(n, bits)])


def unpack(packed: np.ndarray, num_codes: int, bits: int, values: np.ndarray | None = None) -> np.ndarray:
    """Map uint8 [m, ⌈n·b/8⌉] to values[codes], [m, n]; num_codes is n.

    values: [2^bits] of any dtype, what each code stands for; None: the code itself, as uint8. May return a view of a
    wider array. Raises ValueError if the bytes are not those of n codes.
    """
    m = len(packed)
    if packed.dtype != np.uint8 or packed.shape != (m, row_bytes(num_codes, bits)):
        raise ValueError(f"{num_codes} codes of {bits} bits a row are not {packed.dtype} {list(packed.shape)}")
    if values is None and bits == 8:
        return packed
    if values is None:
        values = np.arange(1 << bits, dtype=np.uint8)
    word_bytes, digit_bits = layout(bits)
    table = values[codes_of_digit(bits, digit_bits)]
    codes_per_word = word_bytes * 8 // bits
    num_words = -(-num_codes // codes_per_word)
    if packed.shape[1] != num_words * word_bytes:
        packed = np.pad(packed, ((0, 0), (0, num_words * word_bytes - packed.shape[1])))
    words = packed.reshape(-1, word_bytes)
    out = np.empty((m, num_words * codes_per_word), values.dtype)
    out_digits = out.reshape(-1, table.shape[1])
    step = BLOCK_BYTES // word_bytes
    for first in range(0, len(words), step):
        digits = _digits(words[first : first + step], digit_bits)
        at = first * word_bytes * 8 // digit_bits
        np.take(table, digits, axis=0, out=out_digits[at : at + len(digits)], mode="clip")
    return out[:, :num_codes]


def layout(bits: int) -> tuple[int, int]:
    """Return (bytes of a word, bits of a digit). A word is whole codes in whole bytes, a digit is one look-up."""
    digit_bits = {3: 12, 5: 10, 6: 12, 7: 14}.get(bits, 8)
    return math.lcm(digit_bits, 8) // 8, digit_bits


@functools.cache
def codes_of_digit(bits: int, digit_bits: int) -> np.ndarray:
    """Return the codes of every digit: uint8 [2^digit_bits, digit_bits / bits], the least significant code first."""
    digits = np.arange(1 << digit_bits)[:, None]
    return (digits >> np.arange(0, digit_bits, bits) & ((1 << bits) - 1)).astype(np.uint8)


def _digits(words: np.ndarray, digit_bits: int) -> np.ndarray:
    """Split uint8 [W, bytes] into [W · digits] of uint8 or uint16."""
    word_bytes = words.shape[1]
    if word_bytes == 1:
        return words[:, 0]
    word: np.ndarray = np.zeros(len(words), np.uint32 if word_bytes <= 4 else np.uint64)
    for byte in range(word_bytes):
        word |= words[:, byte].astype(word.dtype) << (8 * byte)
    digits = np.empty((len(words), word_bytes * 8 // digit_bits), np.uint16)
    for digit in range(digits.shape[1]):
        digits[:, digit] = word >> (digit * digit_bits) & ((1 << digit_bits) - 1)
    return digits.reshape(-1)
