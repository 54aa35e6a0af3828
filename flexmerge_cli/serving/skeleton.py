"""Builds the transformers model of a task before its weights are read: every tensor of the bundle is a placeholder."""

from typing import Any

import torch
from torch import nn

from flexmerge_cli.bundle.placeholder import Placeholder, SharedArray, Value
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.resident import packed_pieces
from flexmerge_cli.bundle.view import View, task_model
from flexmerge_cli.engine.device import torch_dtype
from flexmerge_cli.errors import UsageError


def skeleton(bundle: Bundle, task: str, *, device: str, dtype: torch.dtype | None) -> Any:
    """Build the model from the task's config. dtype: None for that of the task. Raises like `OpenBundle.model`."""
    view = View(bundle, task, device=device)
    weights = {}
    for own, (stored, shape) in bundle.tensors_of(task).items():
        aligned = view.aligned[own]
        value = Value(bundle.identity(task, aligned), own, view, _parts(bundle, task, aligned, shape))
        weights[own] = Placeholder(value, shape, torch_dtype(stored))
    model = task_model(bundle, task, weights, **({} if dtype is None else {"dtype": dtype}))
    for module in model.modules():
        module._apply = _Refusal(module)
    return model


def _parts(bundle: Bundle, task: str, aligned: str, shape: tuple[int, ...]) -> tuple[SharedArray, ...]:
    pieces = packed_pieces(bundle, task, aligned, shape)
    return tuple(SharedArray((part.path, part.offset), role, num_bytes) for role, (part, num_bytes) in pieces.items())


class _Refusal:
    """Stands in for `_apply`, through which `to`, `half`, `cuda` and the like go, of a module with shared weights."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, change: Any, recurse: bool = True) -> nn.Module:
        forms = {(held.device, held.dtype) for held in (*self._module.parameters(), *self._module.buffers())}
        for device, dtype in forms:
            found = change(torch.empty(0, device=device, dtype=dtype))
            if (found.device, found.dtype) != (device, dtype):
                raise UsageError(
                    f"the weights of this model are shared with other tasks of a runtime, and stay {dtype} on {device}",
                    hint="pass device= or dtype= to bundle.runtime(), or take bundle.model(task), which is not shared",
                )
        return self._module
