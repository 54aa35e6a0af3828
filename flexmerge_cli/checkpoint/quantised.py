"""Recognises checkpoints that are already quantised, by config or tensors, so that they can be refused by name.

Their weights are packed codes, whose averages and differences are meaningless. Uses headers; no I/O.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

# `quantization_config.quant_method` -> the usual name of the scheme.
METHODS = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "fp8", "fbgemm_fp8": "fp8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ",
    "quanto": "quanto", "torchao": "torchao", "higgs": "HIGGS", "vptq": "VPTQ", "spqr": "SpQR", "bitnet": "BitNet",
    "auto-round": "AutoRound",
}  # fmt: skip
PACKED_EXPERTS = re.compile(r"experts\..*_proj_(blocks|scales)\Z")  # gpt-oss
HINT = (
    "give the checkpoint it was quantised from, and quantise what is exported; or dequantise it: in transformers "
    "model.dequantize(), then model.save_pretrained(FOLDER)"
)


def by_config(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation scheme that config.json names, or None."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        return None
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return METHODS.get(str(method), str(method)[:40]) if method is not None else None


def by_names(names: Collection[str]) -> tuple[str, str] | None:
    """Return (scheme, the tensor that shows it), or None if all tensors are ordinary."""
    last: dict[str, str] = {}
    for name in names:
        last.setdefault(name.rpartition(".")[2], name)
    if "qweight" in last and "qzeros" in last:
        # AutoGPTQ stores the group of every input row; AWQ does not.
        return ("GPTQ" if "g_idx" in last else "AWQ"), last["qweight"]
    for name in names:
        if ".quant_state.bitsandbytes__" in name:
            return "bitsandbytes (4 bits)", name
    if "SCB" in last:
        return "bitsandbytes (8 bits)", last["SCB"]
    if "weight_packed" in last:
        return "compressed-tensors", last["weight_packed"]
    if "weight_scale_inv" in last:
        return "fp8", last["weight_scale_inv"]
    if "W_q" in last:
        return "HQQ", last["W_q"]
    packed = [name for name in names if PACKED_EXPERTS.search(name)]
    return ("MXFP4", packed[0]) if packed else None


def is_fp8(dtype: str) -> bool:
    """Return whether this is a quantised dtype, as safetensors or torch spell it."""
    return dtype.startswith(("F8_", "F6_", "F4", "float8_", "torch.float8_", "torch.float4_", "torch.float6_"))
