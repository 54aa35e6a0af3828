"""Weights and a config in, the transformers model out: built on the meta device, weights assigned without a copy."""

from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.checkpoint import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.evaluation.scored import TaskModel

MAX_LISTED = 20


def require(*modules: str, extra: str = "flexmerge-cli[eval]") -> None:
    """Raises UsageError with the pip command for what is not installed."""
    import importlib

    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"{error.name or module} is not installed", hint=f"pip install '{extra}'") from None


def quiet_transformers() -> Any:
    """transformers, without its bars and warnings. Raises UsageError if it is not installed."""
    require("transformers")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    """config.json beside the weights. Raises UsageError if there is none, DataError if it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"no config.json in {folder}", hint="kind `python` or `command` scores a model of any form")
    return read_json(path, MAX_CONFIG_BYTES)


def build_model(model: TaskModel, dtype: str | None, device: str, *, architecture: str | None = None) -> Any:
    """The model of the config's class, in eval mode, on `device`.

    dtype: what it computes in; None: what its weights are stored in. Where that is the stored one, and on the CPU,
    parameters lie on the view's own memory. architecture: a class of transformers, where the config names none.
    Raises DataError that lists missing, unexpected and mismatched tensors, UsageError without config.
    """
    transformers = quiet_transformers()
    read_config(model.folder)
    config = transformers.AutoConfig.from_pretrained(model.folder, trust_remote_code=False, local_files_only=True)
    name = (getattr(config, "architectures", None) or [architecture])[0]
    found = getattr(transformers, str(name), None)
    if found is None:
        raise UsageError(f"{model.folder}/config.json: transformers has no `{name}`", hint="kind `python` or `command`")
    weights = dict(model.weights)
    # Documented so: without a path, the weights are those of `state_dict`; made on the meta device, and assigned.
    load, wanted = found.from_pretrained, dtype or _stored_dtype(weights)
    # Mismatches are told below, all at once: without this it would raise at the first, and not say which.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    built, info = load(None, config=config, state_dict=weights, dtype=wanted, **options)
    _check(model, str(name), info)
    return built.eval().to(device)


def _stored_dtype(weights: dict[str, Any]) -> str:
    """The floating dtype that most of the weights' elements have."""
    elements: dict[str, int] = {}
    for tensor in weights.values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            elements[name] = elements.get(name, 0) + tensor.numel()
    return max(elements, key=lambda name: elements[name], default="float32")


def _check(model: TaskModel, name: str, info: dict[str, Any]) -> None:
    """Every parameter came from the weights, and every weight went into one."""
    said = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}
    lines = []
    for key, what in said.items():
        names = sorted(str(item[0]) if isinstance(item, tuple) else str(item) for item in info.get(key) or ())
        rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        lines += [f"{what}: {', '.join(names[:MAX_LISTED])}{rest}"] if names else []
    if lines:
        raise DataError(
            f"the weights of task `{model.task}` do not fit {name}:\n  " + "\n  ".join(lines),
            hint=f"check {model.folder}/config.json: its architecture and sizes",
        )
