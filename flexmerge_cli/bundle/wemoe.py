"""Weighs the experts of mixtures by trained routers, as WEMoE does, in place of the gates of SMILE.

The routers of all mixtures are in one file of the bundle, beside its weights, which stay as they are. One router weighs
the experts of all layers of a unit, such as an MLP, by what the layer that runs first gets.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.added import read_arrays
from flexmerge_cli.bundle.mixture import MixtureLinear
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import DataError
from flexmerge_cli.formats.folders import WEMOE_FILE
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.stored.coded import MIXTURE

ROLES = ("w0", "b0", "w1", "b1")
"""The arrays of a router, in the order of its layers."""

CROSS_ATTENTION = frozenset(["EncDecAttention", "cross_attn", "crossattention", "encoder_attn", "multihead_attn"])
KEYS_AND_VALUES = frozenset(["k", "v", "key", "value", "k_proj", "v_proj"])
"""Segments of the names of layers, as family/rules.yaml has them."""

AGAIN = "make it again with `flexmerge tune --method wemoe`"


class ExpertRouter(nn.Module):
    """Weighs experts by a network r, whose outputs are averaged over the positions of each example: g = mean_t r(x_t).

    r(x) is W x + b, or W₁ max(0, W₀ x + b₀) + b₁. Positions that the attention mask of the model leaves out count for
    nothing. Several threads may run the model. The network is computed in float32, whatever dtype the model is cast to.
    """

    def __init__(self, layers: Mapping[str, Tensor]) -> None:
        """Take `w0` [h, d], `b0` [h], `w1` [k, h] and `b1` [k], or `w0` [k, d] and `b0` [k]; float32."""
        super().__init__()
        self.depth = len(layers) // 2
        for name, value in layers.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.masks: dict[int, Any] = {}
        """The attention mask of each thread's inputs, while it runs the model."""
        self.last: dict[int, Tensor] = {}
        """The weights that each thread computed last."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the weights of the experts, [n, 1, …, k] float32. x: what a layer gets, [n, …, d]."""
        found = x.float()
        for place in range(self.depth):
            found = found.relu() if place else found
            weight, bias = (getattr(self, f"{kind}{place}").float() for kind in "wb")
            found = nn.functional.linear(found, weight, bias)
        each = found.reshape(len(x), -1, found.shape[-1])
        mask = self.masks.get(get_ident())
        if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == len(x) and mask.shape[1] >= each.shape[1]:
            counts = mask[:, -each.shape[1] :, None].to(each)
            mean = (each * counts).sum(1) / counts.sum(1).clamp(min=1)
        else:
            mean = each.mean(1)
        return mean.view(len(x), *[1] * (x.ndim - 2), -1)

    def gates(self, x: Tensor | None) -> Tensor:
        """Return the weights for what the first layer of the unit gets; with None, those that it had last.

        Raises DataError with None if this thread has not run that layer.
        """
        if x is not None:
            self.last[get_ident()] = self(x)
        found = self.last.get(get_ident())
        if found is None:
            raise DataError(
                f"{WEMOE_FILE} weighs experts by what a layer gets that does not run first in its unit", hint=AGAIN
            )
        return found


def routed_units(manifest: Manifest, task: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Map each unit whose layers are mixtures in a task's model to the first task of its group, and its tensors.

    Tasks with the same first task have the same experts in that unit.
    """
    return {
        unit.name: (group.tasks[0], unit.tensors)
        for unit in manifest.units
        for group in unit.groups
        if task in group.tasks and group.kind == MIXTURE.word
    }


def layers_of(
    bundle: Bundle, task: str, model: nn.Module, names: Mapping[str, str | Iterable[str]]
) -> dict[str, MixtureLinear]:
    """Map the aligned name of each mixture's weight to its layer. names: as for `mixture.install`."""
    aligned = bundle.manifest.aligned(task)
    found = {}
    for state, of in names.items():
        for own in [of] if isinstance(of, str) else of:
            path, _, last = state.rpartition(".")
            layer = model.get_submodule(path) if last == "weight" and own in aligned else None
            if isinstance(layer, MixtureLinear):
                found[aligned[own]] = layer
    return found


def attach(model: nn.Module, routers: Mapping[str, tuple[ExpertRouter, Mapping[str, MixtureLinear], str]]) -> None:
    """Let routers weigh the experts of a model's layers.

    routers: for each unit its router, its layers by the name of their weight, and the name of that which runs first.
    """
    for router, layers, first in routers.values():
        for name, layer in layers.items():
            layer.router, layer.leads = router, name == first
    of_model, of_decoder = list[ExpertRouter](), list[ExpertRouter]()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = model.get_encoder()  # type: ignore[operator]
        modules, of_encoder = set(encoder.modules()), list[ExpertRouter]()
        for router, layers, first in routers.values():
            if not modules.isdisjoint(layers.values()):
                of_encoder.append(router)
            else:
                (of_model if _reads_encoder(first) else of_decoder).append(router)
        _note_masks(encoder, of_encoder, "attention_mask")  # It may be called alone.
        of_model += of_encoder
    else:
        of_model += [router for router, *_ in routers.values()]
    for module in {model, getattr(model, "base_model", model)}:  # Either may be called.
        _note_masks(module, of_model, "attention_mask")
        _note_masks(module, of_decoder, "decoder_attention_mask")


def _reads_encoder(name: str) -> bool:
    """Return whether a decoder's layer is a key or value of cross-attention, whose inputs are what the encoder made."""
    parts = name.split(".")
    return not CROSS_ATTENTION.isdisjoint(parts) and not KEYS_AND_VALUES.isdisjoint(parts)


def _note_masks(module: nn.Module, routers: list[ExpertRouter], word: str) -> None:
    """Tell routers of the mask that a module is called with under this word, until it returns."""
    module.register_forward_pre_hook(partial(_note_mask, routers, word), with_kwargs=True)
    module.register_forward_hook(partial(_drop_mask, routers), always_call=True)


def _note_mask(
    routers: list[ExpertRouter], word: str, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]
) -> None:
    for router in routers if word in kwargs else ():
        router.masks[get_ident()] = kwargs[word]


def _drop_mask(routers: list[ExpertRouter], *_call: Any) -> None:
    for router in routers:
        router.masks.pop(get_ident(), None)


def route_experts(bundle: Bundle, task: str, model: nn.Module, names: Mapping[str, str | Iterable[str]]) -> None:
    """Attach the routers of the bundle, if it has any, to a task's model, whose mixtures are installed.

    names: as for `mixture.install`. Units without a router, which no model ran while the others were trained, keep
    their gates. Raises IntegrityError if the file of the routers is damaged, DataError if they do not fit the model.
    """
    entry = bundle.manifest.wemoe
    if entry is None or not (units := routed_units(bundle.manifest, task)):
        return
    arrays, layers, routers = read_arrays(bundle, WEMOE_FILE), layers_of(bundle, task, model, names), {}
    roles = ROLES[: 2 * entry.layers]
    for unit, first in entry.first.items():
        if unit not in units:
            continue
        first_task, tensors = units[unit]
        own = {name: layers[name] for name in tensors if name in layers}
        found = {role: arrays.get(f"{unit}@{role}.{first_task}", np.empty(0, np.float32)) for role in roles}
        if first not in own or not _fits(list(found.values()), own[first]):
            raise DataError(f"{bundle.path / WEMOE_FILE} has no sound router for `{unit}` of task `{task}`", hint=AGAIN)
        shared = {}
        for role, array in found.items():
            key = WEMOE_FILE, unit, first_task, role, own[first].weight.device
            held = torch.from_numpy(array.copy()).to(own[first].weight.device)
            shared[role] = bundle.joined.setdefault(key, held)
        routers[unit] = ExpertRouter(shared), own, first
    attach(model, routers)


def _fits(found: list[np.ndarray], layer: MixtureLinear) -> bool:
    """Return whether arrays, weight and bias of each layer of a router, lead from what a layer gets to its experts."""
    width = layer.weight.shape[1]
    for weight, bias in zip(found[::2], found[1::2]):
        if weight.ndim != 2 or weight.shape != (*bias.shape, width) or not np.isfinite(weight).all():
            return False
        width = len(weight)
    return width == len(layer.down) and all(np.isfinite(bias).all() for bias in found[1::2])
