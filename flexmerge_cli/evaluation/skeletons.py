"""Caches models without their weights, since a curve builds the same ones hundreds of times, and building is slow.

A model is cached if its parameters and the weights share memory one to one, which shows the parameter of each weight,
whatever transformers calls it. All other models are built every time.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 64
CONFIGS = ("config.json", "generation_config.json")

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Skeleton:
    model: Any
    """The model. Parameters are on the meta device; buffers without weights are those of the first model."""
    names: Mapping[str, str]
    """Maps names in the model's state to names among the weights."""

    def filled(self, weights: Mapping[str, Any]) -> Any | None:
        """Make a new model on the memory of the weights, if they have its dtype; None if they do not fit."""
        state = self.model.state_dict()
        if weights.keys() != set(self.names.values()):
            return None
        if any(value.shape != weights[self.names[name]].shape for name, value in state.items()):
            return None
        model = copy.deepcopy(self.model)
        given = {name: weights[self.names[name]].to(value.dtype) for name, value in state.items()}
        model.load_state_dict(given, assign=True)
        return model


_kept: dict[Key, Skeleton] = {}


def key_of(folder: Path, *more: object) -> Key:
    """Return what a model is built from, besides its weights: the bytes of its configs."""
    paths = [folder / name for name in CONFIGS]
    return (*(path.read_bytes() if path.is_file() else None for path in paths), *more)


def filled(key: Key, weights: Mapping[str, Any]) -> tuple[Any, Mapping[str, str]] | None:
    """Make a model with these weights, and tell the name in its state -> name among the weights.

    None if there is no skeleton: then build the model and `keep` it.
    """
    kept = _kept.get(key)
    model = kept.filled(weights) if kept is not None else None
    return (model, kept.names) if kept is not None and model is not None else None


def names_of(model: Any, weights: Mapping[str, Any]) -> dict[str, str]:
    """Name in the model's state -> name among the weights that it was built from: those on the same memory."""
    places = {(value.data_ptr(), value.shape, value.dtype): name for name, value in weights.items()}
    found = {
        name: places.get((value.data_ptr(), value.shape, value.dtype)) for name, value in model.state_dict().items()
    }
    return {name: of for name, of in found.items() if of is not None}


def keep(key: Key, model: Any, weights: Mapping[str, Any]) -> None:
    """Keep a skeleton. weights: those that the model was built from, in their dtypes."""
    import torch

    found = names_of(model, weights)
    if len(found) != len(model.state_dict()) or sorted(found.values()) != sorted(weights):
        return
    bare: dict[int, Any] = {}
    for own in model.parameters():
        bare[id(own)] = torch.nn.Parameter(torch.empty_like(own, device="meta"), requires_grad=own.requires_grad)
    while len(_kept) >= MOST:
        _kept.pop(next(iter(_kept)))
    _kept[key] = Skeleton(copy.deepcopy(model, bare), found)
