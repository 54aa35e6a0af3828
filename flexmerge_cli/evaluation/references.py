"""Opens the models that a bundle's tasks are compared with: the fine-tuned model, and the base with the task's head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.models import base_model, checkpoint_model, fetched
from flexmerge_cli.evaluation.scored import TaskModel
from flexmerge_cli.evaluation.spec import EvalSpec

Who = str
"""`fine_tuned` or `base`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """Models by task, each opened on demand, so that one is in memory at a time."""

    models: Mapping[str, Mapping[Who, Callable[[], TaskModel]]] = field(default_factory=dict)
    """Maps each task to its references by name, each a function that opens it and reads its weights for their
    digest."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """Maps each task to the folder of its side files, if there is no bundle that has them."""

    def of(self, task: str) -> Mapping[Who, Callable[[], TaskModel]]:
        return self.models.get(task, {})


def spec_references(spec: EvalSpec, bundle: Bundle, *, access: Access = ONLINE, needed: bool = False) -> References:
    """Return the references that the spec names by `checkpoint` and `base`. Reads headers.

    needed: for a task without `checkpoint` in the spec, use the source that the bundle records; raises UsageError if
    it cannot be found.
    """
    digests: dict[str, str] = {}
    base = open_checkpoint(spec.base, relative_to=spec.folder, access=access) if spec.base is not None else None
    models: dict[str, dict[Who, Callable[[], TaskModel]]] = {}
    for task in spec.tasks:
        written = spec.tasks[task].checkpoint
        if written is None and needed:
            written = bundle.manifest.tasks[task].source
            if not is_remote(written) and not Path(written).is_absolute():
                raise spec.document.error(
                    ("tasks", task),
                    f"no `checkpoint`, and the bundle's `{written}` was relative to its plan",
                    hint="--plan plan.json, or checkpoint: path/of/the/fine-tuned/model",
                )
        found: dict[Who, Callable[[], TaskModel]] = {}
        if written is not None:
            checkpoint = open_checkpoint(written, relative_to=spec.folder, access=access)
            found["fine_tuned"] = lambda task=task, of=checkpoint: checkpoint_model(task, fetched(of, access))  # type: ignore[misc]
        if base is not None:
            found["base"] = lambda task=task, of=base: base_model(bundle, task, fetched(of, access), digests)  # type: ignore[misc]
        models[task] = found
    if needed and base is None:
        raise UsageError(f"{spec.document.path} names no `base`", hint="base: path/of/the/base, or --plan plan.json")
    return References(models=models)
