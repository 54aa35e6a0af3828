"""Builds a transformers model on the meta device from a folder's configs, and assigns the weights to it.

Knows of no bundle; whether what the model lacks or does not know is an error, the caller says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.weights import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.errors import DataError, UsageError

MAX_LISTED = 20
SAID = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "of another shape"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A model in eval mode, and the weights that did not fit into it."""

    model: Any
    class_name: str
    misfits: Mapping[str, str]
    """`missing`, `unexpected`, `of another shape` -> names of tensors; what there is none of is left out."""

    def require(self, *of: str, who: str, hint: str) -> None:
        """Raise DataError that lists these misfits."""
        lines = [f"{what}: {names}" for what, names in self.misfits.items() if what in of]
        if lines:
            raise DataError(f"{who} do not fit {self.class_name}:\n  " + "\n  ".join(lines), hint=hint)


def read_config(folder: Path, *, otherwise: str) -> dict[str, Any]:
    """Read config.json. Raises UsageError, with `otherwise` as hint, if there is none, and DataError if it is
    malformed."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"no config.json in {folder}", hint=otherwise)
    return read_json(folder / "config.json", MAX_CONFIG_BYTES)


def assigned_model(
    weights: Mapping[str, Any], folder: Path, *, otherwise: str, architecture: str = "AutoModel", **options: Any
) -> Built:
    """Build a model of transformers from weights, and the config in a folder.

    Parameters use the weights' own memory if these have the requested dtype. The model generates as
    generation_config.json says, as if the folder were loaded. architecture: a class of transformers, if the config
    names none. options: those of the class's `from_pretrained`. Raises UsageError, DataError.
    """
    try:
        import transformers
    except ImportError:
        raise UsageError("transformers is not installed", hint="pip install 'flexmerge-cli[eval]'") from None
    read_config(folder, otherwise=otherwise)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # It comes from transformers, which raises many kinds of errors for odd values.
        said = str(error).split("\n")[0][:200]
        raise UsageError(f"{folder}/config.json is of no model of transformers: {said}", hint=otherwise) from None
    name = str((getattr(config, "architectures", None) or [architecture])[0])
    found = getattr(transformers, name, None)
    if found is None:
        raise UsageError(f"{folder}/config.json: transformers has no `{name}`", hint=otherwise)
    # As documented, without a path the weights are those of `state_dict`, assigned to a model on the meta device. All
    # mismatches are reported at once: without `ignore` it would raise at the first one, and not say which it is.
    built, info = found.from_pretrained(
        None, config=config, state_dict=dict(weights), output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    _generation(transformers, built, folder)
    head = built.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_as_rows)
    misfits = {what: _listed(info[key]) for key, what in SAID.items() if info.get(key)}
    return Built(model=built.eval(), class_name=name, misfits=misfits)


def _as_rows(_head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay the states that a head takes out as rows.

    Those of the last tokens are a slice, which torch multiplies by a frozen matrix in another way than by a trainable
    one: to other bits, and in bfloat16 many times slower.
    """
    rows = [states.reshape(-1, states.shape[-1]).contiguous().view(states.shape) for states in inputs[:1]]
    return *rows, *inputs[1:]  # none of them if the states are given by name


def _generation(transformers: Any, built: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and built.can_generate():
        try:
            built.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # It comes from transformers, as above.
            said = str(error).split("\n")[0][:200]
            raise DataError(f"{folder}/generation_config.json is unsound: {said}", hint="get a sound copy") from None


def _listed(keys: Any) -> str:
    names = sorted(str(key[0]) if isinstance(key, tuple) else str(key) for key in keys)
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
