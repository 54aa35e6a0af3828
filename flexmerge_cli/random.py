"""Draws random numbers as a pure function of a key and a counter: no state, no global seed, no torch.

The numbers are the same on every machine, for every chunk size and thread count, and whatever else is drawn
(splitmix64). A key is made of a tag, the user's seed and names: `key64("flexmerge/drop/1", seed, task, tensor)`. Not
for secrets.
"""

import functools
import hashlib

import numpy as np

# splitmix64 (Steele, Lea, Flood 2014): the step of its counter and the two multipliers of its finaliser.
STEP, MULTIPLIER_1, MULTIPLIER_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def key64(tag: str, seed: int, *names: str) -> int:
    """Return the key of a stream: the first 8 bytes, little-endian, of SHA-256 of tag, decimal seed and names joined by
    NUL.

    Raises ValueError if seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, not 0 or more")
    text = "\0".join([tag, str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mix64(key: int, index: int) -> int:
    """Return output `index` (from 0) of the splitmix64 generator started at key, in [0, 2^64)."""
    z = (key + (index + 1) * STEP) & MASK
    z = ((z ^ (z >> 30)) * MULTIPLIER_1) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIER_2) & MASK
    return z ^ (z >> 31)


def uniform(key: int, start: int, count: int) -> np.ndarray:
    """Return the numbers start … start + count - 1 of the key's stream: [count] float64, multiples of 2^-53 in [0, 1).

    Number i does not depend on start, so chunks may be drawn in any order.
    """
    return uniform_at(key, np.arange(count, dtype=np.uint64) + np.uint64(start & MASK))


def uniform_at(key: int, indices: np.ndarray) -> np.ndarray:
    """Return the numbers at these places of the key's stream. indices: uint64 of any shape."""
    return (_mixed(key, indices) >> np.uint64(11)) * 2.0**-53


def random_bits(key: int, start: int, count: int) -> np.ndarray:
    """Return bits start … start + count - 1 of the key's stream: [count] bool. Each output has 64, the lowest first."""
    first = start // 64
    words = _mixed(key, np.arange(first, -(-(start + count) // 64), dtype=np.uint64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little").view(bool)
    return bits[start - 64 * first : start - 64 * first + count]


def _mixed(key: int, indices: np.ndarray) -> np.ndarray:
    """Return these outputs of the key's stream, uint64."""
    z = indices + np.uint64(1)  # arrays of uint64 wrap silently, as intended; scalars would warn
    z *= np.uint64(STEP)
    z += np.uint64(key)
    z ^= z >> np.uint64(30)
    z *= np.uint64(MULTIPLIER_1)
    z ^= z >> np.uint64(27)
    z *= np.uint64(MULTIPLIER_2)
    z ^= z >> np.uint64(31)
    return z


def tie_numbers(tensor: str, indices: np.ndarray) -> np.ndarray:
    """Return numbers that order elements of equal magnitude, the smaller first: float64 in [0, 1), of the same shape.

    tensor: its name, or empty if a single one is ranked and its name is unknown. indices: uint64, in C order.
    """
    return uniform_at(tie_key(tensor), indices)


@functools.lru_cache(maxsize=64)
def tie_key(tensor: str) -> int:
    """Return the key of the stream of a tensor's tie numbers."""
    return key64("flexmerge/tie/1", 0, tensor)


class Stream:
    """Scalar draws, each of which takes one output of the key's stream, counted from 0."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._num_drawn = 0

    def uniform(self) -> float:
        """Return a float64 in [0, 1)."""
        return self._draw() * 2.0**-53

    def below(self, n: int) -> int:
        """Return an integer in [0, n). Raises ValueError if n < 1."""
        if n < 1:
            raise ValueError(f"no integer is in [0, {n})")
        return (self._draw() * n) >> 53

    def _draw(self) -> int:
        """Return the next 53 bits."""
        bits = mix64(self._key, self._num_drawn) >> 11
        self._num_drawn += 1
        return bits
