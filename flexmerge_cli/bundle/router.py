"""Reads, applies and writes the router of a bundle, which maps features of an input to the probability of each task.

The features are means of the last hidden states of one task's backbone. A router of any kind is stored as a
standardisation and linear layers with ReLU between them, whose last outputs, divided by a temperature, are the logits
of the tasks. Needs no torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.manifest_bytes import fixed
from flexmerge_cli.bundle.added import read_arrays, write_added
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.formats.folders import ROUTER_FILE
from flexmerge_cli.formats.manifest_records import RouterEntry

MAX_LAYERS = 8
HINT = "make one with `flexmerge route bundle/ --spec eval.yaml -o routed/`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A classifier of tasks over features of d numbers."""

    mean: np.ndarray
    """float32 [d], subtracted from the features."""
    scale: np.ndarray
    """float32 [d], positive; the features are divided by it."""
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    """The weight [out, in] and bias [out] of each layer, float32. The last layer has one output per task."""
    temperature: float

    def outputs(self, features: np.ndarray) -> np.ndarray:
        """Return the outputs of the last layer, float64 [n, tasks]. features: [n, d]."""
        x: np.ndarray = (features.astype(np.float64) - self.mean) / self.scale
        for number, (weight, bias) in enumerate(self.layers):
            x = (np.maximum(x, 0) if number else x) @ weight.T + bias
        return x

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return the probability of each task, float64 [n, tasks]. features: [n, d]."""
        x = self.outputs(features) / self.temperature
        powers = np.exp(x - x.max(axis=1, keepdims=True))
        found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return found

    @staticmethod
    def of(bundle: Bundle) -> "Router":
        """Read a bundle's router. Raises UsageError if it has none, DataError if its arrays do not fit each other."""
        entry = bundle.manifest.router
        if entry is None:
            raise UsageError(f"{bundle.path} has no router", hint=HINT)
        arrays = read_arrays(bundle, ROUTER_FILE)
        try:
            names = [(f"weight{number}", f"bias{number}") for number in range((len(arrays) - 2) // 2)]
            layers = tuple((arrays[weight], arrays[bias]) for weight, bias in names)
            found = Router(mean=arrays["mean"], scale=arrays["scale"], layers=layers, temperature=entry.temperature)
            _check(found, len(entry.tasks))
        except (KeyError, ValueError) as error:
            raise DataError(
                f"{bundle.path / ROUTER_FILE} is no router of {len(entry.tasks)} tasks: {error}", hint=HINT
            ) from None
        return found


def _check(router: Router, num_tasks: int) -> None:
    if not 0 < len(router.layers) <= MAX_LAYERS or router.mean.ndim != 1 or router.scale.shape != router.mean.shape:
        raise ValueError("its layers are missing, or its standardisation is not of one width")
    width = len(router.mean)
    for weight, bias in router.layers:
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError("a layer does not fit the one before it")
        width = len(weight)
    arrays = (router.mean, router.scale, *(array for layer in router.layers for array in layer))
    if width != num_tasks or not all(np.isfinite(array).all() for array in arrays) or not (router.scale > 0).all():
        raise ValueError("its outputs are not the tasks, or its numbers are not finite")


def write_routed(bundle: Bundle, router: Router, entry: RouterEntry, target: Path, *, force: bool = False) -> None:
    """Write a copy of a bundle that has this router. Raises like `write_added`."""
    arrays = {"mean": router.mean, "scale": router.scale}
    for number, (weight, bias) in enumerate(router.layers):
        arrays |= {f"weight{number}": weight, f"bias{number}": bias}
    fields = entry.model_dump(mode="json")
    fields |= {"temperature": fixed(entry.temperature), "accuracy": fixed(entry.accuracy)}
    write_added(bundle, ROUTER_FILE, arrays, target, key="router", entry=fields, force=force)
