"""Corrects what the last layer of a task's model gets, as Representation Surgery does: ẑ = z - U max(0, D z).

The factors of every task are in one file of the bundle, beside its weights, which stay as they are.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from flexmerge_cli.bundle.added import read_arrays
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import DataError
from flexmerge_cli.formats.folders import SURGERY_FILE


class CorrectedLinear(nn.Linear):
    """A linear layer whose inputs are corrected by low-rank factors D, `down` [r, in], and U, `up` [in, r]."""

    down: Tensor
    up: Tensor

    def __init__(self, layer: nn.Linear, down: Tensor, up: Tensor) -> None:
        """Take the layer's own parameters."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("down", down.to(layer.weight))
        self.register_buffer("up", up.to(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(corrected(x, self.down, self.up))


def corrected(z: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ẑ, [..., d]. down: [r, d]; up: [d, r]."""
    return z - (z @ down.T).relu() @ up.T


def correct(bundle: Bundle, task: str, model: nn.Module, names: Mapping[str, str | Iterable[str]]) -> None:
    """Put the correction of a task into its model, if the bundle has one. names: as for `mixture.install`.

    Raises IntegrityError if the file of the corrections is damaged, DataError if they do not fit the model.
    """
    entry = bundle.manifest.surgery
    if entry is None or task not in entry.layers:
        return
    own, arrays = entry.layers[task], read_arrays(bundle, SURGERY_FILE)
    states = [state for state, of in names.items() if own in ([of] if isinstance(of, str) else of)]
    path = states[0].rpartition(".")[0] if states else ""
    layer = model.get_submodule(path)
    down, up = (arrays.get(f"{task}@{role}", np.empty(0, np.float32)) for role in ("down", "up"))
    form = (entry.rank, layer.in_features) if isinstance(layer, nn.Linear) else None
    if (
        not isinstance(layer, nn.Linear)
        or down.shape != form
        or up.shape != down.shape[::-1]
        or not all(np.isfinite(x).all() for x in (down, up))
    ):
        raise DataError(
            f"{bundle.path / SURGERY_FILE} has no sound correction for `{own}` of task `{task}`",
            hint="make it again with `flexmerge tune --method surgery`",
        )
    factors = (torch.from_numpy(array.copy()) for array in (down, up))
    model.set_submodule(path, CorrectedLinear(layer, *factors))
