"""Assigns the five classes of tensors, as far as headers determine them: base-only, tied, constant, private, mergeable.

Whether a tensor is constant depends on its bits, so the survey decides. The rules are tried in that order.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from flexmerge_cli.checkpoint.dtypes import FLOATING
from flexmerge_cli.checkpoint.tensor import StoredTensor


class TensorClass(StrEnum):
    """How a tensor is treated."""

    BASE_ONLY = "base-only"
    """The tensor is in no task, and is not stored."""
    TIED = "tied"
    """The tensor is an alias of another tensor of the same model, and stored as its target."""
    CONSTANT = "constant"
    """The tensor is bit-identical in all of two or more tasks, and stored once."""
    PRIVATE = "private"
    """The tensor belongs to a task: stored exactly, and equal ones only once."""
    MERGEABLE = "mergeable"
    """All other tensors: stored by block and group."""


# First whole segments of the names of modules that a fine-tune adds to the base.
HEADS = (
    "classifier", "classification_head", "classification_heads", "pre_classifier", "score", "scores", "qa_outputs",
    "head", "heads", "head_dist", "regressor", "regression_head", "logits_proj", "summary", "sequence_summary",
    "qa_classifier", "span_outputs", "v_head", "reward_head",
)  # fmt: skip
RESNET_MARKS = ("layer4", "conv1", "layer1")  # in such models `fc` is the head; elsewhere it may be anything
RUNNING = ("running_mean", "running_var", "num_batches_tracked")

INPUT_EMBEDDINGS = (
    "shared", "embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "token_embedding",
    "token_embeddings", "embed_in", "embeddings", "embed", "emb",
)  # fmt: skip


def why_private(
    name: str,
    base: StoredTensor | None,
    tasks: Sequence[StoredTensor | None],
    *,
    private: Iterable[str] = (),
    merge_heads: bool = False,
    resnet: bool = False,
) -> str | None:
    """Say why a tensor is private; None if it is not. Tasks hold None where the tensor is missing."""
    present = [tensor for tensor in tasks if tensor is not None]
    segments = name.rpartition("/")[2].split(".")  # without the subfolder of a part
    if segments[0] in ("model", "module") and len(segments) > 1:
        segments = segments[1:]
    if any(tensor.dtype not in FLOATING for tensor in present):
        return "not floating point"
    if base is None:
        return "missing in the base"
    if base.dtype not in FLOATING:
        return "not floating point in the base"
    if len(present) < len(tasks):
        return "missing in a task"
    if any(tensor.shape != base.shape for tensor in present):
        return "of another shape"
    if segments[-1] in RUNNING:
        return "running statistic"
    if not merge_heads and (segments[0] in HEADS or (segments[0] == "fc" and resnet)):
        return "task head"
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in private):
        return "asked for"
    return None


def is_resized(
    name: str, base: StoredTensor | None, tasks: Sequence[StoredTensor | None], *, resnet: bool, **asked: Any
) -> bool:
    """Return whether a tensor would merge but for its number of rows. asked: as in `why_private`."""
    if base is None or not base.shape or any(tensor is None for tensor in tasks):
        return False
    present = [tensor for tensor in tasks if tensor is not None]
    if all(tensor.shape == base.shape for tensor in present):
        return False
    like_base = [replace(tensor, shape=base.shape) for tensor in present]
    return all(len(tensor.shape) == len(base.shape) and tensor.shape[1:] == base.shape[1:] for tensor in present) and (
        why_private(name, base, like_base, resnet=resnet, **asked) is None
    )


def is_resnet(names: Iterable[str]) -> bool:
    firsts = {name.split(".")[0] for name in names}
    return all(mark in firsts for mark in RESNET_MARKS)


def aliases(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Map aliases to targets among the tensors of one model that share storage, which only a `.bin` file records."""
    by_bytes: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.num_elements and tensor.path.suffix != ".safetensors":
            key = (tensor.path, tensor.offset, tensor.dtype, tensor.shape, tensor.strides, tensor.change)
            by_bytes.setdefault(key, []).append(name)
    found = {}
    for names in by_bytes.values():
        target, *others = sorted(names, key=target_rank)
        found.update(dict.fromkeys(others, target))
    return found


def tied_by_config(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Map each output embedding to the input embedding of equal shape, if the config ties them: equal bits make it an
    alias."""
    text = config.get("text_config")
    default = text.get("tie_word_embeddings", True) if isinstance(text, Mapping) else True
    if not config or not config.get("tie_word_embeddings", default):
        return {}
    inputs = sorted((name for name in tensors if embeds(name)), key=target_rank)
    outputs = [name for name in tensors if is_output(name)]
    outputs += [name for name in inputs if "shared.weight" in inputs and name.endswith("embed_tokens.weight")]
    return {
        output: next(name for name in inputs if _same_form(tensors[name], tensors[output]))
        for output in outputs
        if any(_same_form(tensors[name], tensors[output]) and name != output for name in inputs)
    }


def absent_alias(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """Return the input embedding of a model that ties its output layer to it and does not store that layer; otherwise
    None.

    The config must say so explicitly, since there are no bits to compare.
    """
    text = config.get("text_config")
    of_text = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if name in tensors or not is_output(name) or config.get("tie_word_embeddings", of_text) is not True:
        return None
    inputs = sorted((other for other in tensors if embeds(other) and "pos" not in other), key=target_rank)
    return tensors[inputs[0]] if inputs else None


def is_output(name: str) -> bool:
    """Return whether a tensor is the weight of an output layer, which a model may tie to its input embedding."""
    *_, parent, last = ["", *name.split(".")]
    return last == "weight" and parent in ("lm_head", "decoder", "proj_out", "embed_out")


def embeds(name: str) -> bool:
    return name.split(".")[-1] == "weight" and name.split(".")[-2] in INPUT_EMBEDDINGS if "." in name else False


def _same_form(left: StoredTensor, right: StoredTensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


def target_rank(name: str) -> tuple[int, str]:
    """Return a key that orders aliases: input embeddings before output layers, so that the alias is the head and not
    the table."""
    segments = name.split(".")
    ranks = [INPUT_EMBEDDINGS.index(segment) for segment in segments if segment in INPUT_EMBEDDINGS]
    return (min(ranks, default=len(INPUT_EMBEDDINGS)), name)
