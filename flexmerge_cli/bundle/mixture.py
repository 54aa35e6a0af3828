"""Computes layers that are mixtures of low-rank experts, among which a gate chooses for each input, as in SMILE."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.engine.device import as_tensor
from flexmerge_cli.engine.upload import Uploads, arrived
from flexmerge_cli.errors import UsageError
from flexmerge_cli.stored.decoding import Experts


class MixtureLinear(nn.Module):
    """A linear layer W x + b with experts U_k D_k x, some of which are added.

    Expert k of a task vector U Σ Vᵀ has the norm of Vᵀ x as its logit. Of the softmax of these, over all experts, the
    `top` largest are kept and divided by their sum, and are the weights of the experts for this x. The rows of D_k are
    those of Vᵀ times the roots of the singular values, as they are stored. With a `router`, all experts are added, with
    the weights that it computes from what the layer gets that `leads` (bundle/wemoe.py).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, down: Tensor, up: Tensor, top: int) -> None:
        """Take the layer's own parameters, weight [out, in], and the factors of k experts.

        down: [k, r, in]; up: [k, out, r].
        """
        super().__init__()
        self.weight, self.bias, self.top = weight, bias, top
        self.router, self.leads = None, False
        lengths = down.float().norm(dim=2)  # The roots of the singular values: where one is 0, the row is.
        for name, value in (("down", down), ("up", up), ("scale", torch.where(lengths > 0, 1 / lengths, 0.0))):
            self.register_buffer(name, value)

    down: Tensor
    up: Tensor
    scale: Tensor
    router: Any
    leads: bool

    def extra_repr(self) -> str:
        (k, r, inputs), outputs = self.down.shape, len(self.weight)
        return f"{inputs}, {outputs}, bias={self.bias is not None}, experts={k}, rank={r}, top={self.top}"

    def gates(self, inside: Tensor) -> Tensor:
        """Return the weights of the experts, [..., k] float32. inside: the products D_k x, [..., k, r]."""
        each = ((inside.float() * self.scale).norm(dim=-1)).softmax(-1)
        largest, chosen = each.topk(self.top, dim=-1)
        return torch.zeros_like(each).scatter(-1, chosen, largest / largest.sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        k, r, _ = self.down.shape
        inside = nn.functional.linear(x, self.down.flatten(0, 1)).view(*x.shape[:-1], k, r)
        gates = self.gates(inside) if self.router is None else self.router.gates(x if self.leads else None)
        weighted = inside * gates[..., None].to(x.dtype)
        added = nn.functional.linear(weighted.flatten(-2), self.up.transpose(0, 1).flatten(1))
        return nn.functional.linear(x, self.weight, self.bias) + added


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one layer of a bundle, to be read."""

    experts: Experts
    bundle: Bundle
    device: torch.device
    uploads: Uploads
    key: Hashable
    """Equal for the mixtures of tasks that have the same experts."""

    @property
    def centre(self) -> Tensor:
        """The weight to which experts are added. On the CPU it lies on the mapped file."""
        return self._read(self.experts.centre)

    def layer(self, layer: nn.Module) -> MixtureLinear:
        """Return the layer that takes the place of one whose weight is the centre."""
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        left, right = (self._stacked(side, weight) for side in (0, 1))
        if isinstance(layer, nn.Linear):
            return MixtureLinear(weight, bias, right, left, self.experts.top)
        turned = nn.Parameter(weight.T, requires_grad=weight.requires_grad)  # Conv1D computes x W, not W x.
        return MixtureLinear(turned, bias, left.mT, right.mT, self.experts.top)

    @property
    def num_elements(self) -> int:
        """The number of elements of all factors."""
        return sum(part.num_elements for pair in self.experts.factors for part in pair)

    def _stacked(self, side: int, weight: Tensor) -> Tensor:
        """Return all left factors, or all right ones, in the dtype of a weight; models of the bundle share them."""
        key = self.key, side, weight.dtype, weight.device
        found = self.bundle.joined.get(key)
        if found is None:
            with arrived(weight.device):  # Models that load on another stream may find it at once.
                stacked = torch.stack([self._read(pair[side]).to(weight) for pair in self.experts.factors])
            found = self.bundle.joined.setdefault(key, stacked)
        assert isinstance(found, Tensor)
        return found

    def _read(self, part: StoredTensor) -> Tensor:
        bits = np.ascontiguousarray(self.bundle.mapped(part)).view(np.uint8)
        return self.uploads(as_tensor(bits, part.dtype).reshape(part.shape), self.device)


def install(model: nn.Module, names: Mapping[str, str | Iterable[str]], mixtures: Mapping[str, Mixture]) -> None:
    """Put mixtures in the place of a model's layers, whose weights are their centres.

    names: the own name, or names, of the weights of each tensor in the model's state. mixtures: by own name. Raises
    UsageError for a mixture that is the weight of no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    for state, of in names.items() if mixtures else ():
        own = next((name for name in ([of] if isinstance(of, str) else of) if name in mixtures), None)
        if own is None:
            continue
        path, _, parameter = state.rpartition(".")
        layer = model.get_submodule(path)
        # A subclass may compute with its weight elsewhere, as the attention of torch does.
        if parameter != "weight" or type(layer) not in (nn.Linear, Conv1D):
            raise UsageError(
                f"`{own}` is stored as a mixture of experts, but it is a weight of {type(layer).__name__} in "
                f"{type(model).__name__}, and not of a linear layer",
                hint=f"merge it by another method: --method-for '*{own.rpartition('.')[0]}*=average'",
            )
        model.set_submodule(path, mixtures[own].layer(layer))
