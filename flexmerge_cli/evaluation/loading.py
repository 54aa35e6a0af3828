"""Builds the transformers model to be scored from a task's weights and config. No tensor may be missing or unused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.model import SAID, assigned_model
from flexmerge_cli.bundle.model import read_config as config_of
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation import skeletons
from flexmerge_cli.evaluation.scored import TaskModel

OTHERWISE = "kind `python` or `command` scores a model of any form"


def require(*modules: str, extra: str = "flexmerge-cli[eval]") -> None:
    """Import a module. Raises UsageError with the pip command if it is not installed."""
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"{error.name or module} is not installed", hint=f"pip install '{extra}'") from None


def quiet_transformers() -> Any:
    """Import transformers, without its progress bars and warnings. Raises UsageError if it is not installed."""
    require("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json beside the weights. Raises UsageError if there is none, DataError if it is malformed."""
    return config_of(folder, otherwise=OTHERWISE)


def build_model(
    model: TaskModel,
    dtype: str | None,
    device: str,
    *,
    architecture: str = "AutoModel",
    on_built: Callable[[Any, Mapping[str, str]], None] = lambda _model, _names: None,
) -> Any:
    """Build the model of the config's class, in eval mode, on `device`.

    dtype: the dtype to compute in; None for that of the weights. On the CPU and in that dtype, parameters use the
    memory of the view. architecture: the transformers class if the config names none. on_built: gets the model on the
    device, and the name in its state -> name among the weights of each tensor.
    Raises DataError that lists missing, unexpected and mismatched tensors, UsageError without config.
    """
    quiet_transformers()
    from flexmerge_cli.bundle.modules import complete
    from flexmerge_cli.bundle.view import View

    view = model.weights if isinstance(model.weights, View) else None
    weights = dict(view.parameters if view else model.weights)
    wanted = dtype or _stored_dtype(weights)

    def finish(found: Any, names: Mapping[str, str]) -> None:
        if view:
            complete(view.bundle, view.task, found, names, view.mixtures)

    key = skeletons.key_of(model.folder, architecture, wanted)
    known = skeletons.filled(key, weights)
    if known is not None:
        found, names = known
        finish(found, names)
        on_built(found.to(device), names)
        return found
    if wanted == "float32":  # all weights have this dtype, or are cast to it here: transformers uses their memory
        weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    built = assigned_model(weights, model.folder, otherwise=OTHERWISE, architecture=architecture, dtype=wanted)
    built.require(
        *SAID.values(),
        who=f"the weights of task `{model.task}`",
        hint=f"check {model.folder}/config.json: its architecture and sizes",
    )
    skeletons.keep(key, built.model, weights)
    same = {name: name for name in built.model.state_dict() if name in weights}  # Cast values share no memory.
    names = same | skeletons.names_of(built.model, weights)
    finish(built.model, names)
    on_built(built.model.to(device), names)
    return built.model


def _stored_dtype(weights: dict[str, Any]) -> str:
    """Return the floating dtype of most of the weights' elements."""
    elements: dict[str, int] = {}
    for tensor in weights.values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            elements[name] = elements.get(name, 0) + tensor.numel()
    return max(elements, key=lambda name: elements[name], default="float32")
