"""Names dtypes as safetensors spells them, with their sizes and the conversions that need no torch.

Knows nothing about files. bfloat16 is handled as uint16 bits, since numpy has no such type.
"""

import numpy as np

# Bytes of one element. float8 and packed types are left out on purpose: they are refused by name (quantised.py).
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip

FLOATING = ("F64", "F32", "F16", "BF16")

# The dtypes that stored tensors can be cast to, by the names that `--dtype` and recipes use.
CASTS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# The names that `torch.save` uses.
FROM_TORCH = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64",
}  # fmt: skip
TO_TORCH = {ours: torch_name for torch_name, ours in FROM_TORCH.items()}

# The numpy types that hold the bits.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip


def promote(dtypes: list[str] | tuple[str, ...]) -> str:
    """Return the narrowest floating dtype that holds all of `dtypes`, like `torch.promote_types` (F16 + BF16 = F32)."""
    widest = max(dtypes, key=ITEM_BYTES.__getitem__)
    return "F32" if {"F16", "BF16"} <= set(dtypes) and ITEM_BYTES[widest] == 2 else widest


def to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Convert the bits of a floating dtype, as `NUMPY[dtype]` holds them, to float32. Exact except for F64, which is
    rounded."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 once, half to even, to the bits of a floating dtype. NaN stays NaN."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(NUMPY[dtype], copy=False)
