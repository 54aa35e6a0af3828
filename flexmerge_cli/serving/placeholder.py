"""Tensors without memory, of which a model is built before a weight is read. Knows neither bundles nor transformers.

A loader detaches, casts and assigns them like any other tensor, so it decides the names, ties and dtypes of the model.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Smaller weights are decoded once: calling their products tile by tile would cost more than it saves.
LEAST_ELEMENTS = 1 << 12

_aten = torch.ops.aten
_KEEPING = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


@dataclass(frozen=True, slots=True)
class Part:
    """An array that lies in memory once, whatever is made of it."""

    key: Hashable
    name: str
    """Empty where a tensor has one part, itself; else its role, and where it is one task's alone, that."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """What a placeholder stands for."""

    key: Hashable
    """Equal for tensors of equal bits, which are then placed once."""
    name: str
    tensors: Mapping[str, Tensor]
    """Gives it, by its name."""
    parts: tuple[Part, ...] = ()
    """What it is made of where it can stay packed."""

    @property
    def tensor(self) -> Tensor:
        return self.tensors[self.name]


class Placeholder(Tensor):
    """Has the shape of a value, and the dtype that the model will have it in."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value, shape: tuple[int, ...], dtype: torch.dtype) -> "Placeholder":
        made: Placeholder = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Whatever else a loader does, such as joining the weights of experts, it does to the weights themselves."""
        kwargs = dict(kwargs or {})
        source = args[0]
        if isinstance(source, Placeholder) and (func in _KEEPING or func is _aten._to_copy.default):
            return cls(source.value, tuple(source.shape), kwargs.get("dtype") or source.dtype)
        args, kwargs = tree_map_only(Placeholder, lambda held: held.value.tensor.to(held.dtype), (args, kwargs))
        return func(*args, **kwargs)


def placeholders(model: nn.Module) -> dict[tuple[Hashable, torch.dtype], Placeholder]:
    """The values that a model needs, by what they are and the dtype in which it needs them."""
    return {(held.value.key, held.dtype): held for _, _, held in _tensors(model) if isinstance(held, Placeholder)}


def made_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that the model made for itself, such as the frequencies of rotary embeddings."""
    made = {id(held): held for _, _, held in _tensors(model) if not isinstance(held, Placeholder)}
    return sum(held.nbytes for held in made.values())


def packable(model: nn.Module) -> set[tuple[Hashable, torch.dtype]]:
    """The values that can stay packed: weights of layers that compute with them tile by tile."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    return {
        (held.value.key, held.dtype)
        for module, name, held in _tensors(model)
        if isinstance(held, Placeholder) and held.value.parts and name == "weight" and isinstance(module, kinds)
        if held.numel() >= LEAST_ELEMENTS
    }


def fill(model: nn.Module, place: Callable[[Placeholder], Tensor], device: torch.device) -> None:
    """Put the values where their placeholders are, as frozen parameters and as buffers; what is tied stays one."""
    parameters: dict[tuple[Hashable, torch.dtype], nn.Parameter] = {}
    for module, name, held in list(_tensors(model)):
        if not isinstance(held, Placeholder):
            placed = held.detach().to(device)
            parameter = nn.Parameter(placed, requires_grad=False) if isinstance(held, nn.Parameter) else placed
        elif isinstance(held, nn.Parameter):
            key = held.value.key, held.dtype
            if key not in parameters:
                parameters[key] = nn.Parameter(place(held), requires_grad=False)
            parameter = parameters[key]
        else:
            parameter = place(held)
        setattr(module, name, parameter)


def _tensors(model: nn.Module) -> "list[tuple[nn.Module, str, Tensor]]":
    """Parameters and buffers, as often as a module has them."""
    return [
        (module, name, held)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, held in own.items()
        if held is not None
    ]
