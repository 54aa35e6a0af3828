"""Compares two configs to see whether they describe one architecture, and reports the differences in their words. Pure.

Equal shapes are not enough (no shape shows the number of heads), and a list of shapes does not explain what is wrong.
Only keys that both configs have are compared; vocabularies, positions, labels and dtypes may differ.
"""

from collections.abc import Iterator, Mapping
from typing import Any

# The keys of transformers, diffusers and timm that determine the arithmetic of a model.
KINDS = ("model_type", "_class_name", "architecture")
SIZES = (
    "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_sizes", "embedding_size",
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "depths", "layers_per_block", "block_out_channels",
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "num_key_value_heads", "head_dim", "d_kv", "attention_head_dim", "cross_attention_dim",
    "intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
    "num_local_experts", "num_experts", "n_routed_experts", "patch_size", "num_channels",
)  # fmt: skip
# Parts of a model that have a config of their own.
PARTS = ("text_config", "vision_config", "audio_config", "language_config", "encoder", "decoder")
MAX_DEPTH = 3  # of parts within parts
# Model types that share one encoder: a fine-tune of one may call itself another.
SIBLINGS = (
    {"vit", "vit_mae", "vit_msn", "vit_hybrid", "deit"}, {"roberta", "xlm-roberta", "camembert"},
    {"bert", "bert-generation"}, {"t5", "mt5", "umt5"}, {"bart", "mbart"},
)  # fmt: skip

Config = Mapping[str, Any]


def differences(base: Config, task: Config, *, depth: int = 0) -> list[str]:
    """List the differences, e.g. "num_attention_heads is 8, 12 in the base"; empty if none is known.

    One may be a part of the other: the vision tower of a CLIP is compared with the CLIP's vision_config.
    """
    if depth > MAX_DEPTH:
        return []
    mine, theirs = _kind(base), _kind(task)
    if mine is not None and theirs is not None and mine != theirs:
        for whole, part in ((base, theirs), (task, mine)):
            inner = next((found for _, found in _parts(whole) if _kind(found) == part), None)
            if inner is not None:
                pair = (inner, task) if whole is base else (base, inner)
                return differences(*pair, depth=depth + 1)
        if not any({mine, theirs} <= group for group in SIBLINGS):
            key = next(key for key in KINDS if isinstance(task.get(key), str))
            return [f"{key} is {_word(theirs)}, {_word(mine)} in the base"]
    found = [
        f"{key} is {_word(task[key])}, {_word(base[key])} in the base"
        for key in SIZES
        if _is_size(base.get(key)) and _is_size(task.get(key)) and base[key] != task[key]
    ]
    parts = dict(_parts(task))
    for name, inner in _parts(base):
        found += [f"{name}.{text}" for text in differences(inner, parts.get(name, {}), depth=depth + 1)]
    return found


def _kind(config: Config) -> str | None:
    return next((config[key] for key in KINDS if isinstance(config.get(key), str)), None)


def _parts(config: Config) -> Iterator[tuple[str, Config]]:
    for name in PARTS:
        if isinstance(config.get(name), Mapping):
            yield name, config[name]


def _is_size(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_size, value))
    return type(value) is int


def _word(value: object) -> str:
    return str(value)[:60]
