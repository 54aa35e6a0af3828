"""Chooses where the arithmetic runs, and views raw bytes as tensors. Every operation is single-threaded: the pool has
the threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from flexmerge_cli import native
from flexmerge_cli.checkpoint.dtypes import FROM_TORCH, TO_TORCH
from flexmerge_cli.errors import UsageError
from flexmerge_cli.later import Tensor, torch

KINDS: tuple[str, ...] = ("cpu", "cuda")


def choose_device(wanted: str = "auto", *, computes: bool = True) -> "torch.device":
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:n`, with its number, as `cuda` is another device in a thread
    that has chosen none. Raises UsageError for a device that does not exist here.

    computes: False if nothing is computed on it here, as when parts are joined that were made elsewhere.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"no device `{wanted}`", hint="--device auto, cpu, cuda or cuda:0") from None
    if device.type not in KINDS:
        raise UsageError(f"device `{wanted}` is not supported", hint="--device auto, cpu, cuda or cuda:0")
    if (
        computes
        and device.type == "cuda"
        and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count())
    ):
        raise UsageError(f"no device `{wanted}`: torch sees {torch.cuda.device_count()}", hint="--device cpu")
    return torch.empty(0, device=device).device if computes else device


def arithmetic(device: str) -> str:
    """Say what the last bits of sums depend on: kind of device, version of torch, whether the loops in C are there."""
    loops = "with" if native.lib is not None else "without"
    return f"torch {torch.__version__} on {choose_device(device, computes=False).type}, {loops} loops in C"


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch operations on one thread each, with exact float32 products, inside the block."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def torch_dtype(dtype: str) -> "torch.dtype":
    """Return torch's dtype for a name as safetensors spells it."""
    found: torch.dtype = getattr(torch, TO_TORCH[dtype])
    return found


def name_of(dtype: "torch.dtype") -> str:
    """Return the name of torch's dtype as safetensors spells it."""
    return FROM_TORCH[str(dtype).removeprefix("torch.")]


def as_tensor(raw: np.ndarray, dtype: str) -> Tensor:
    """View bytes (uint8, contiguous) as a CPU tensor of one axis, without a copy."""
    if raw.size == 0:  # numpy gives an empty range no stride that torch would view
        return torch.empty(0, dtype=torch_dtype(dtype))
    return torch.from_numpy(raw).view(torch_dtype(dtype))


def to_bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes (uint8, one axis) on the CPU."""
    return tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy()
