"""Decides which methods can merge a pool of LoRA adapters by the ΔW of its modules (see pooled.py). Needs no torch."""

from flexmerge_cli.errors import UsageError
from flexmerge_cli.methods.call import Call


def merges_products(call: Call) -> bool:
    """Return whether a method can merge the ΔW of one module, without other tensors, into one value."""
    return call.method.gives_one_model and call.statistics is None and call.scope != "block"


def check_pooled(call: Call, *, steps: int = 0, calibrate: bool = False) -> None:
    """Raise UsageError for a method, step or calibration that cannot merge a pool."""
    if not merges_products(call) or steps or calibrate:
        raise UsageError(
            f"`{call.method.name}` cannot merge a pool of LoRA adapters: a pool merges one ΔW per module",
            hint="use average, task_arithmetic or magmax, without --step and --calibrate, or plan --adapters merge",
        )
