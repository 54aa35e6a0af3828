"""Tensors without memory, from which a model is built before a weight is read. Knows no bundles and no transformers.

A loader detaches, casts, joins and assigns them like any other tensor, so it decides the names, ties, forms and dtypes
of the model. What it joins, such as the experts of a mixture, stands for that operation.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_JOINING = (_aten.stack.default, _aten.cat.default)
_KEEPING = (_aten.detach.default, _aten.alias.default, _aten.clone.default)


@dataclass(frozen=True, slots=True)
class SharedArray:
    """An array that lies in memory once, whatever uses it."""

    key: Hashable
    name: str
    """Empty where a tensor has one part, itself; else its role, and where it is one task's alone, that."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """The value in whose place a placeholder stands while the model is built."""

    key: Hashable
    """Equal for tensors of equal bits, which are then placed once."""
    name: str
    tensors: Mapping[str, Tensor]
    """Gives it, by its name."""
    parts: tuple[SharedArray, ...] = ()
    """What it is made of where it can stay packed."""
    made: "Made | None" = None
    """How it is made of others; `name` is then that of the first."""

    @property
    def tensor(self) -> Tensor:
        return self.taken(self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that it is made of, or its own."""
        return (self.name,) if self.made is None else tuple(n for held in self.made.of for n in held.value.names)

    def taken(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Take the value from tensors by their names."""
        return tensors[self.name] if self.made is None else self.made.taken(tensors)


@dataclass(frozen=True, slots=True)
class Made:
    """An operation of a loader, which is carried out once its operands are read."""

    function: Any
    args: Any
    kwargs: dict[str, Any]

    @property
    def of(self) -> list[Any]:
        """The placeholders among the operands."""
        return [held for held in tree_leaves((self.args, self.kwargs)) if isinstance(held, Placeholder)]

    @property
    def key(self) -> Hashable:
        leaves = tree_leaves((self.args, self.kwargs))
        return str(self.function), *((x.value.key, x.dtype) if isinstance(x, Placeholder) else x for x in leaves)

    def taken(self, tensors: Mapping[str, Tensor]) -> Tensor:
        def read(held: Placeholder) -> Tensor:
            return held.value.taken(tensors).to(held.dtype)

        args, kwargs = tree_map_only(Placeholder, read, (self.args, self.kwargs))
        result: Tensor = self.function(*args, **kwargs)
        return result


class Placeholder(Tensor):
    """A tensor with the shape of a value, and the dtype in which the model will have it."""

    value: Value

    @staticmethod
    def __new__(cls, value: Value, shape: tuple[int, ...], dtype: torch.dtype) -> "Placeholder":
        made: Placeholder = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        made.value = value
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Record joins. Anything else that a loader does, it does to the weights themselves."""
        kwargs = dict(kwargs or {})
        source = args[0]
        stays = kwargs.get("device") in (None, torch.device("cpu"))
        if isinstance(source, Placeholder) and (func in _KEEPING or (func is _aten._to_copy.default and stays)):
            return cls(source.value, tuple(source.shape), kwargs.get("dtype") or source.dtype)
        if func in _JOINING and all(isinstance(held, Placeholder) for held in source):
            made, first = Made(func, args, kwargs), source[0].value
            form = func(*tree_map_only(Placeholder, _without_memory, args), **kwargs)
            return cls(Value(made.key, first.name, first.tensors, made=made), tuple(form.shape), form.dtype)
        args, kwargs = tree_map_only(Placeholder, lambda held: held.value.tensor.to(held.dtype), (args, kwargs))
        return func(*args, **kwargs)


def _without_memory(held: Placeholder) -> Tensor:
    return torch.empty(held.shape, dtype=held.dtype, device="meta")


def placeholders(model: nn.Module) -> dict[tuple[Hashable, torch.dtype], Placeholder]:
    """Return the values that a model needs, by their identity and the dtype in which it needs them."""
    return {(held.value.key, held.dtype): held for _, _, held in _tensors(model) if isinstance(held, Placeholder)}


def named_placeholders(model: nn.Module) -> dict[str, Placeholder]:
    """Return the placeholders of a model, by their names in its state."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: held for name, held in named if isinstance(held, Placeholder)}


def made_bytes(model: nn.Module) -> int:
    """Count the bytes of the tensors that the model made for itself, such as the frequencies of rotary embeddings."""
    made = {id(held): held for _, _, held in _tensors(model) if not isinstance(held, Placeholder)}
    return sum(held.nbytes for held in made.values())


def packable(model: nn.Module) -> set[tuple[Hashable, torch.dtype]]:
    """Return the values that can stay packed: weights of layers that compute with them tile by tile."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)
    return {
        (held.value.key, held.dtype)
        for module, name, held in _tensors(model)
        if isinstance(held, Placeholder) and held.value.parts and name == "weight" and isinstance(module, kinds)
    }


def fill(model: nn.Module, place: Callable[[Placeholder], Tensor], device: torch.device | None = None) -> None:
    """Replace placeholders by their values, as buffers and parameters; tied ones stay one.

    A parameter is frozen unless `place` gives an nn.Parameter. device: where the model's own tensors go, frozen too;
    None leaves them as they are.
    """
    parameters: dict[tuple[Hashable, torch.dtype], nn.Parameter] = {}
    placed: Tensor
    for module, name, held in list(_tensors(model)):
        if not isinstance(held, Placeholder):
            if device is None:
                continue
            own = held.detach().to(device)
            placed = nn.Parameter(own, requires_grad=False) if isinstance(held, nn.Parameter) else own
        elif isinstance(held, nn.Parameter):
            key = held.value.key, held.dtype
            if key not in parameters:
                parameters[key] = _as_parameter(place(held))
            placed = parameters[key]
        else:
            placed = place(held)
            placed = placed.data if isinstance(placed, nn.Parameter) else placed
        setattr(module, name, placed)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _tensors(model: nn.Module) -> "list[tuple[nn.Module, str, Tensor]]":
    """Yield parameters and buffers, as often as a module has them."""
    return [
        (module, name, held)
        for module in model.modules()
        for own in (module._parameters, module._buffers)
        for name, held in own.items()
        if held is not None
    ]
