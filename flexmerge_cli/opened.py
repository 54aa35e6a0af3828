"""A bundle as `from flexmerge_cli import open_bundle` gives it: its tasks as tensors, as models, and in one process."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flexmerge_cli.bundle import files
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.verify import require_sound
from flexmerge_cli.errors import UsageError

if TYPE_CHECKING:
    from flexmerge_cli.bundle.view import View
    from flexmerge_cli.evaluation.predict import Prediction, Predictor
    from flexmerge_cli.serving.runtime import Runtime

Verify = Literal["first-use", "all", "off"]
DIGESTS: Mapping[Verify, files.Verify] = {"first-use": "xxh3", "all": "sha256", "off": "off"}
"""The digest that is compared when a file is first read."""


class OpenBundle:
    """A bundle to read from. `tasks` holds the names of its tasks, `manifest` its whole manifest."""

    def __init__(self, path: Path | str, *, verify: Verify | bool = "first-use") -> None:
        """Open a bundle on this disk. Arguments and errors: `open_bundle`."""
        verify = ("all" if verify else "off") if isinstance(verify, bool) else verify
        if verify not in DIGESTS:
            raise UsageError(f"verify={verify!r} is none of `first-use`, `all`, `off`", hint='verify="first-use"')
        located = locate(str(path))
        self._predictors: dict[tuple[str, str], Predictor] = {}
        self._bundle = Bundle.look(located.path) if verify == "all" else located.open(verify=DIGESTS[verify])
        if verify == "all":
            require_sound(self._bundle)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._bundle.tasks

    @property
    def manifest(self) -> Any:
        return self._bundle.manifest

    def view(self, task: str, *, copy: bool = False, device: str = "cpu") -> "View":
        """Return a read-only mapping from a task's tensor names to tensors.

        Tensors of a dense group are mapped from the file, and tasks of one group share the storage: they see each
        other's writes, which never reach the file. copy=True returns private copies. device: `cuda` or `cuda:n`, where
        tensors coded in few bits are decoded.

        The digest of a file is checked before its first tensor is returned (see `verify` of open_bundle). The view
        keeps its files open: if the bundle is replaced or removed, it still returns the tensors of the one that was
        opened. Failures of the disk: see View.

        Raises UsageError for a device that does not exist, SourceError for an unknown task, and IntegrityError if a
        file that the task reads is missing, damaged, or was replaced since the bundle was opened. A look-up raises
        IntegrityError and, if the disk fails, MachineError.
        """
        from flexmerge_cli.bundle.view import View

        return View(self._bundle, task, copy=copy, device=device)

    def model(self, task: str, **kwargs: Any) -> Any:
        """Build the transformers model of the task's stored config, without a second copy of the weights.

        Parameters on a mapped file, which other tasks of the group share, do not require gradients.

        Checks every file of the task against the manifest first, including config and tokenizer. Raises like `view`.
        """
        from flexmerge_cli.bundle.view import load_model

        return load_model(self.view(task), **kwargs)

    def runtime(
        self,
        *,
        tasks: Collection[str] | None = None,
        device: str = "cpu",
        weights: Literal["dense", "packed"] = "dense",
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    ) -> "Runtime":
        """Return a runtime that serves several tasks from one process: what the bundle stores once is in memory once.

        tasks: those to begin with, by default all; each is loaded when it is first used. device: `cpu`, where dense
        weights are the mapped file, `cuda` or `cuda:n`. weights: `packed` keeps those of layers as they are stored, in
        few bits, and computes with them tile by tile. dtype: that of weights and arithmetic, by default the task's own.
        Raises SourceError for an unknown task, and UsageError for a device that does not exist.
        """
        from flexmerge_cli.serving.runtime import Runtime

        return Runtime(self._bundle, tasks=tasks, device=device, weights=weights, dtype=dtype)

    def predict(
        self, inputs: Sequence[Any], *, device: str = "cpu", weights: Literal["dense", "packed"] = "dense"
    ) -> "list[Prediction]":
        """Answer inputs whose task is unknown: the bundle's router finds the task of each, and its model answers.

        inputs: texts, pairs of texts, or images: arrays [channels, height, width], paths, bytes, or PIL images.
        device, weights: as in `runtime`. Models stay loaded for the next call with the same device and weights.
        Raises UsageError if the bundle has no router (`flexmerge route` adds one), or for an input of another kind.
        """
        from flexmerge_cli.evaluation.predict import Predictor

        if (device, weights) not in self._predictors:
            self._predictors[device, weights] = Predictor(self._bundle, device=device, weights=weights)
        return self._predictors[device, weights].predict(inputs)


def open_bundle(path: Path | str, *, verify: Verify | bool = "first-use") -> OpenBundle:
    """Open a bundle, given as a folder or `hf://org/name`. Checks paths, headers and sizes.

    verify: when to check the digests of files against the manifest. `first-use`: the xxh3-128 of a file before its
    first tensor is returned, once while the bundle is open; the SHA-256 if the bundle is from before the xxh3-128 was
    recorded. `all` or True: the SHA-256 of every file, now. `off` or False: never, if you have checked them already.
    A file that is missing, truncated or damaged affects only the tasks that read it, for which `view` raises. With
    `all`, any such file raises here; so it does with every setting if no task is left.
    Raises SourceError, DataError, IntegrityError, MachineError, and UsageError for another value of verify.
    """
    return OpenBundle(path, verify=verify)
