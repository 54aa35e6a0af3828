"""Decides what each file of a source is: weights, carried beside them, code, or left behind, and why. No I/O: from
names alone. The rules are the same for a folder on this disk, a repository of the Hub and a URL."""

import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields

from flexmerge_cli.checkpoint.choose import INDEX, WEIGHT_FILES, WEIGHT_SUFFIXES, choose_weights, variants
from flexmerge_cli.text import is_text

# The indices of models that consist of several, each in a folder of its own: diffusers, sentence-transformers.
PIPELINE = "model_index.json"
MODULES = "modules.json"
COMPOSITES = (PIPELINE, MODULES, "router_config.json")

# The files that make weights usable: config, tokenizer, processor, licence.
SIDE_SUFFIXES = (
    ".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".spm", ".yaml", ".yml", ".codes", ".bpe", ".vocab",
    ".tokenizer", ".dic",
)  # fmt: skip
SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY", "vocab", "merges")
LANGUAGE_MODEL = "language_model"  # a folder of speech recognisers with n-grams of kenlm, which are not tensors

# Files that training leaves beside a model, and hidden files.
TRAINING_FOLDER = re.compile(
    r"\..*|checkpoint[-_]\d+|global_step[-_]?\d+|(epoch|step)[-_]\d+|optimizer_\d+"
    r"|runs|logs|wandb|mlruns|tensorboard|lightning_logs|__pycache__|__MACOSX"
)
TRAINING_FILE = re.compile(
    r"\..*|training_args\.(bin|json)|trainer_state\.json|optimizer\.json|events\.out\.tfevents.*|.*\.log|nohup\.out"
    r"|(optimizer|scheduler|scaler|random_states|rng_state)[^/]*\.(pt|pth|bin|pkl|safetensors|npz)"
    r"|zero_to_fp32\.py|latest|latest_checkpointed_iteration\.txt"
)

# Files of weights that are not read. Beside weights that are read, some are the same model for other programs.
OTHER_WEIGHTS = (
    ".h5", ".msgpack", ".ot", ".npz", ".npy", ".pkl", ".pickle", ".joblib", ".keras", ".pdparams", ".nemo",
    ".distcp", ".weights", ".params",
)  # fmt: skip
CONVERTED_SUFFIXES = (
    ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".ort", ".engine", ".pb", ".pte",
)  # fmt: skip
CONVERTED_FOLDERS = ("onnx", "openvino", "coreml", "tflite", "gguf", "original", "tensorrt", "mlx", "ort")
CONVERTED_FILE = re.compile(
    r"(tf_|tf2_|flax_|rust_|diffusion_flax_)?model(-\d+-of-\d+)?\.(h5|msgpack|ot)|openvino_.*|consolidated\..*"
    r"|.*\.ckpt|.*-\d+-of-\d+\.(safetensors|bin)"
)

MAX_DEPTH = 8  # folders within folders
MAX_NAME_BYTES = 249  # for one folder or file: common file systems allow 255, and a bundle may add `.aside`


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The files of a source, by their relative paths, each in exactly one place. A folder that is left out as a whole
    is named with a slash at its end."""

    weights: dict[str, str] = field(default_factory=dict)
    """The weight file or index of each folder. The source itself is the folder ``""``; others hold parts of the
    model."""
    indices: tuple[str, ...] = ()
    """Indices of shards, which are written anew."""
    side: tuple[str, ...] = ()
    """Files carried beside the weights."""
    code: tuple[str, ...] = ()
    """Python files, carried only on request."""
    training: tuple[str, ...] = ()
    """Files left by training, or hidden."""
    value_heads: tuple[str, ...] = ()
    """Files that PPO leaves beside an adapter."""
    copies: tuple[str, ...] = ()
    """Weights in another form or for another program, and shards, some of which may belong to `weights`."""
    unclear: tuple[str, ...] = ()
    """Weights that are not understood."""
    other: tuple[str, ...] = ()
    """Files of no known kind."""
    ignored: tuple[str, ...] = ()
    """Files left out because the user said so."""

    def left(self) -> dict[str, tuple[str, ...]]:
        """Return the files that are not carried, by kind."""
        kinds = [name.name for name in fields(self) if name.name not in ("weights", "indices", "side")]
        return {kind: names for kind in kinds if (names := getattr(self, kind))}


def contents_of(names: Sequence[str], *, variant: str | None = None, ignore: Collection[str] = ()) -> Contents:
    """Sort the files of a source.

    names: relative paths; for a folder that was not searched, its path and a slash. variant: the preferred variant of
    the weights. ignore: patterns of files and folders to leave out.
    """
    found: dict[str, dict[str, None]] = {}  # names in order, each once
    rest: list[str] = []
    for name in sorted(names):
        left = _left(name, ignore)
        if left is None:
            rest.append(name)
        else:
            found.setdefault(left[0], {})[left[1]] = None
    weights = _weights(rest, variant)
    chosen, is_pipeline = set(weights.values()), PIPELINE in rest
    for name in rest:
        if name not in chosen:
            found.setdefault(_kind(name, weights, is_pipeline), {})[name] = None
    return Contents(weights=weights, **{kind: tuple(names) for kind, names in found.items()})


def is_left(folder: str, ignore: Collection[str]) -> bool:
    """Return whether a folder of a source need not be searched."""
    return _left(f"{folder}/", ignore) is not None


def is_ignored(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a file or one of the folders around it, by the whole path or by a name in it."""
    paths = [name.rstrip("/"), *_parents(name)]
    segments = [] if "/" in pattern.rstrip("/") else name.rstrip("/").split("/")
    return any(fnmatch.fnmatchcase(text, pattern.rstrip("/")) for text in (*paths, *segments))


def is_portable(name: str) -> bool:
    """Return whether every file system can hold a relative path, without confusing it with another."""
    segments = name.split("/")
    return (
        is_text(name)
        and not any(character in name for character in "\\:")
        and all(segment not in ("", ".", "..") and len(segment.encode()) <= MAX_NAME_BYTES for segment in segments)
    )


def _left(name: str, ignore: Collection[str]) -> tuple[str, str] | None:
    """Return the kind of a file that is left out by rule, whatever else there is, and its name or that of the folder
    around it; None for any other file."""
    if any(is_ignored(name, pattern) for pattern in ignore):
        return "ignored", name
    *folders, last = name.split("/")
    for depth, folder in enumerate(folders, 1):
        if TRAINING_FOLDER.fullmatch(folder):
            return "training", "/".join(folders[:depth]) + "/"
    if TRAINING_FILE.fullmatch(last):
        return "training", name
    too_deep = len(folders) > MAX_DEPTH
    return ("other", "/".join(folders[: MAX_DEPTH + 1]) + "/") if too_deep else None


def _weights(names: Sequence[str], variant: str | None) -> dict[str, str]:
    """Map each folder to its weights. Empty if the folder of models is no model itself because it has no index."""
    inside: dict[str, list[str]] = {"": []}
    for name in names:
        folder, _, last = name.rpartition("/")
        inside.setdefault(folder, []).append(last)
    chosen = {folder: choose_weights(files, variant) for folder, files in sorted(inside.items()) if _is_part(folder)}
    # Adapters in subfolders are no parts of a model: products of their factors would have to merge.
    found = {f: w for f, w in chosen.items() if w is not None and not (f and w.startswith("adapter_"))}
    if PIPELINE in inside[""] and len(found) > 1:
        found.pop("", None)  # the whole pipeline once more, in one file
    if "" not in found and not set(inside[""]) & set(COMPOSITES):
        return {}
    if found.get("", "").startswith("adapter_"):
        found = {"": found[""]}
    return {folder: f"{folder}/{last}" if folder else last for folder, last in found.items()}


def _is_part(folder: str) -> bool:
    return not set(folder.split("/")) & {*CONVERTED_FOLDERS, LANGUAGE_MODEL}


def _kind(name: str, weights: dict[str, str], is_pipeline: bool) -> str:
    folder, _, last = name.rpartition("/")
    if INDEX.fullmatch(last):
        return "indices"
    if not is_portable(name):
        return "other"
    if LANGUAGE_MODEL in folder.split("/"):
        return "side"
    if not _is_part(folder):
        return "copies"
    if last.endswith(".py"):
        return "code"
    if last.endswith(CONVERTED_SUFFIXES):
        return "copies"
    if last.endswith((*WEIGHT_SUFFIXES, *OTHER_WEIGHTS)):
        known = last in WEIGHT_FILES or variants([last]) or CONVERTED_FILE.fullmatch(last)
        again = folder in weights and known
        return "copies" if again or (not folder and weights and is_pipeline) else "unclear"
    return "side" if last.endswith(SIDE_SUFFIXES) or last in SIDE_NAMES else "other"


def _parents(name: str) -> Iterator[str]:
    path = name.rstrip("/")
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path
