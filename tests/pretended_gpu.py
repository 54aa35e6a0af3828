"""A GPU made of CPU memory: what lies on the wrong device, or has a dtype that CUDA lacks, fails without a GPU.

torch's `FakeTensorMode` is made for that, but ends where a value decides, and a torch without CUDA cannot index its
tensors. Here every tensor "on the GPU" has its values, in `held`; each operation is checked and then done on the CPU.
So whole commands run, and their bytes can be compared. The device is called as torch calls one that it does not know.
"""

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from flexmerge_cli.engine import device, upload


class _Guard(torch._C._acc.DeviceGuard):
    """A torch without CUDA has none for it, and without one no tensor there can be indexed."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


_GUARD = _Guard()
torch._C._acc.register_python_privateuseone_device_guard(_GUARD)

CPU, GPU = torch.device("cpu"), torch.device("privateuseone:0")

_aten = torch.ops.aten
# What may have tensors of two devices.
_MOVES = {_aten._to_copy.default, _aten.copy_.default, _aten.set_.source_Storage}
# These take indices from the CPU.
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}
_WITHOUT_ARITHMETIC = {"view", "copy_", "_to_copy", "empty", "empty_like", "slice", "as_strided", "detach", "alias",
                       "_reshape_alias", "select", "unsqueeze", "clone", "t", "transpose", "_unsafe_view"}  # fmt: skip


class OnDevice(Tensor):
    """Says that it lies on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return -self.held.data_ptr()  # tells tensors apart; nobody on the CPU can read there

    def record_stream(self, stream: Any) -> None:
        pass

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"on {GPU}: {self.held}"


class Device(TorchDispatchMode):
    """Sees what is made on the device, and what goes there."""

    allocations_left = float("inf")
    """Bytes of new tensors until memory is out."""

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` moves where it can be seen
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    there = [held for held in leaves if isinstance(held, OnDevice)]
    asked = kwargs.get("device")
    wanted = (GPU if there else CPU) if asked is None else GPU if torch.device(asked).type == GPU.type else CPU
    here = [held for held in leaves if isinstance(held, Tensor) and not isinstance(held, OnDevice) and held.dim()]
    name = func._schema.name.partition("::")[2]
    if there:
        _check(func, name, args, there, here)
    if wanted == GPU and not there:
        Device.allocations_left -= 1
        if Device.allocations_left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
    known = {id(held.held): held for held in there}
    args, kwargs = tree_map_only(OnDevice, lambda held: held.held, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": CPU}
    found = func(*args, **kwargs)
    if func is _aten._to_copy.default and found is args[0]:
        found = found.clone()
    if func is _aten.copy_.default and not (there and there[0].held is args[0]):
        return found  # from the device to the CPU
    if wanted != GPU:
        return found

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(placed, found)


def _check(func: Any, name: str, args: Any, there: list[OnDevice], here: list[Tensor]) -> None:
    if here and func not in _MOVES and not (func in _INDEXED and isinstance(args[0], OnDevice)):
        raise RuntimeError(f"{func} of tensors on {GPU} and on {CPU}")
    dtypes = {held.dtype for held in there}
    if name in _PRODUCTS and not all(dtype.is_floating_point for dtype in dtypes):
        raise RuntimeError(f"{func} is not implemented for {dtypes} on {GPU}")
    if dtypes & _UNSIGNED and name not in _WITHOUT_ARITHMETIC:
        raise RuntimeError(f"{func} is not implemented for {dtypes} on {GPU}")
    if name.startswith("linalg") and dtypes & {torch.float16, torch.bfloat16}:
        raise RuntimeError(f"{func} is not implemented for {dtypes} on {GPU}")


@contextmanager
def pretended_gpu() -> Iterator[type[Device]]:
    """`device=GPU.type` works in this thread, and in those that it starts."""
    run = threading.Thread.run

    def run_there(self: threading.Thread) -> None:
        with Device():
            run(self)

    with pytest.MonkeyPatch.context() as patch:
        module = types.SimpleNamespace(_lazy_init=lambda: None, current_device=lambda: 0)
        patch.setitem(sys.modules, "torch.privateuseone", module)  # type: ignore[arg-type]
        patch.setattr(device, "KINDS", (*device.KINDS, GPU.type))
        patch.setattr(upload, "pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
        none = types.SimpleNamespace(record=lambda _: None, synchronize=lambda: None, wait_stream=lambda _: None)
        for name in ("Event", "Stream", "current_stream"):  # tests/engine/test_upload.py has them
            patch.setattr(torch.cuda, name, lambda *_: none)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "set_stream", lambda _: None)
        patch.setattr(threading.Thread, "run", run_there)
        # Views of a subclass's tensors that are made under inference mode cannot be counted, and fail.
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode))
        patch.setattr(Device, "allocations_left", float("inf"))
        with Device():
            yield Device
