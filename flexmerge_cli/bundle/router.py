"""Reads, applies and writes the router of a bundle, which maps features of an input to the probability of each task.

The features are means of the last hidden states of one task's backbone. A router of any kind is stored as a
standardisation and linear layers with ReLU between them, whose last outputs, divided by a temperature, are the logits
of the tasks. Needs no torch.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexmerge_cli.allocation.files import safetensors_header
from flexmerge_cli.allocation.manifest_bytes import amended, fixed
from flexmerge_cli.bundle.export import copy_file
from flexmerge_cli.bundle.links import linker
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, sha256_of
from flexmerge_cli.bundle.publish import bundle_files, publish
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.license import CARD_NAME
from flexmerge_cli.checkpoint.safetensors import read_header
from flexmerge_cli.errors import DataError, IntegrityError, UsageError
from flexmerge_cli.formats.folders import ROUTER_FILE
from flexmerge_cli.formats.manifest import RouterEntry
from flexmerge_cli.writing import NO_LINK

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
        data = b"".join(bundle.chunks(ROUTER_FILE))  # This also checks the digest.
        arrays = {
            name: np.frombuffer(data, np.float32, tensor.num_elements, tensor.offset).reshape(tensor.shape)
            for name, tensor in read_header(bundle.path / ROUTER_FILE)[0].items()
            if tensor.dtype == "F32"
        }
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
    """Write a copy of a bundle that has this router. Its files are hard links if possible, else copies.

    Raises IntegrityError if a file of the bundle is damaged, UsageError if the target exists.
    """
    for task in bundle.tasks:
        bundle.check_files(task)
    arrays = {"mean": router.mean, "scale": router.scale}
    for number, (weight, bias) in enumerate(router.layers):
        arrays |= {f"weight{number}": weight, f"bias{number}": bias}
    header = safetensors_header(
        {name: ("F32", array.shape, array.nbytes) for name, array in arrays.items()}, {"format": "np"}
    )
    manifest = bundle.manifest
    with publish(target, force=force, ours=bundle_files, needed_bytes=bundle.total_bytes) as folder:
        for path in (*(name for name in manifest.files if name != ROUTER_FILE), ROUTER_FILE):
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if path == ROUTER_FILE:
                place.write_bytes(header + b"".join(array.astype("<f4").tobytes() for array in arrays.values()))
                continue
            try:
                os.link((bundle.path / path).resolve(), place)
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                copy_file(bundle, path, place)
        link = linker(folder) if manifest.all_links else None
        for path, weights in manifest.all_links.items():
            assert link is not None
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            link(folder / weights, folder / path)
        file = {
            "bytes": (folder / ROUTER_FILE).stat().st_size,
            "sha256": sha256_of(folder / ROUTER_FILE),
            "tasks": [],
        }

        def change(fields: dict[str, object]) -> None:
            assert isinstance(fields["files"], dict)
            fields["files"][ROUTER_FILE] = file
            numbers = {"temperature": fixed(entry.temperature), "accuracy": fixed(entry.accuracy)}
            fields["router"] = entry.model_dump(mode="json") | numbers

        data = (bundle.path / MANIFEST_NAME).read_bytes()
        if f'"id":"{manifest.id}"'.encode() not in data:
            raise IntegrityError(f"{bundle.path} was replaced meanwhile", hint="run the command again")
        (folder / MANIFEST_NAME).write_bytes(amended(data, change))
        if (bundle.path / CARD_NAME).is_file():
            shutil.copyfile(bundle.path / CARD_NAME, folder / CARD_NAME)
        Router.of(Bundle.open(folder))
