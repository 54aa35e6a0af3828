"""Reads a PEFT adapter: a folder with adapter_config.json and adapter_model.safetensors or .bin.

Supports LoRA (alpha over r or its root, patterns of both per module, transposed and convolution weights, embeddings)
and (IA)³. Other adapters of peft are refused by name: their effect is not a product of two factors, or needs more than
the files. Headers and configs only; family/adapted.py finds the modules in the base. Source: peft 0.21, tuners/lora,
tuners/ia3.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flexmerge_cli.checkpoint import foreign
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.checkpoint.weights import MAX_CONFIG_BYTES, read_json
from flexmerge_cli.errors import DataError

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
BY_HAND = "merge it with peft (model.merge_and_unload().save_pretrained(…)) and give the merged model"

# Variants of LoRA, by the config key that enables them; none of them is base + scale · B · A.
VARIANTS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA", "alora_invocation_tokens": "aLoRA", "layer_replication": "layer replication",
    "target_parameters": "LoRA of parameters (`target_parameters`)", "lora_bias": "LoRA with a bias (`lora_bias`)",
    "trainable_token_indices": "trainable tokens (`trainable_token_indices`)",
}  # fmt: skip
# Initialisations that change the weights of the base, to values that the adapter's files do not contain.
MOVING_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
NAMES = {
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "OFT": "OFT", "BOFT": "BOFT", "HRA": "HRA",
    "FOURIERFT": "FourierFT", "XLORA": "X-LoRA", "PREFIX_TUNING": "prefix tuning", "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "p-tuning", "LN_TUNING": "LN tuning", "VBLORA": "VB-LoRA", "RANDLORA": "RandLoRA",
    "TRAINABLE_TOKENS": "trainable tokens",
}  # fmt: skip
# Bounds the cost of a pattern from an untrusted config: a match tries at most len(name)^this positions.
MAX_REPEATS = 2
MAX_PATTERN_CHARACTERS = 500


class AdapterKind(StrEnum):
    LORA = "lora"
    IA3 = "ia3"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The LoRA factors of one module, as peft stores them."""

    a: StoredTensor
    """Shape [r, in, …]; for an embedding [r, words]."""
    b: StoredTensor
    """Shape [out, r, 1…]; for an embedding [size, r]."""
    scale: float
    """The factor of the product: alpha / r, or alpha / √r."""
    is_embedding: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The contents of an adapter's files. Modules and parameters have the names of the model it was trained on."""

    kind: AdapterKind
    checkpoint: Checkpoint
    factors: Mapping[str, Factors]
    """The LoRA factors of each module."""
    vectors: Mapping[str, StoredTensor]
    """The (IA)³ vector of each module: [out, 1], or [1, in] for the input of a linear layer; for a convolution [1,
    channels, 1…]."""
    own: Mapping[str, StoredTensor]
    """Whole parameters: those of `modules_to_save`, biases, and resized or targeted embeddings."""
    saved_modules: tuple[str, ...]
    """The last segments of the module names in `modules_to_save`."""
    transposed: bool
    """Whether weights are [in, out] (`fan_in_fan_out`); decides where the shapes do not."""
    feedforward: tuple[str, ...]
    """The modules whose input (IA)³ scales."""
    base_name: str | None
    """The model that it was trained on, by its config."""
    model_class: str | None
    """The class of that model, which peft records if no kind of task was named."""

    def tensors(self) -> list[StoredTensor]:
        """Return its factors and vectors, under the names in its file."""
        pairs = [tensor for factors in self.factors.values() for tensor in (factors.a, factors.b)]
        return pairs + list(self.vectors.values())

    def is_saved(self, parameter: str) -> bool:
        """Return whether a parameter belongs to `modules_to_save`."""
        return any(f".{module}." in f".{parameter}" for module in self.saved_modules)


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is an adapter, so that its tensors are factors and not those of a model."""
    weights = {path.name for path in checkpoint.weight_paths()}
    return CONFIG_NAME in checkpoint.side_files and bool(weights) and weights <= set(WEIGHT_NAMES)


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """Read an adapter. Raises DataError if it is malformed, or of an unsupported kind."""
    path = checkpoint.side_files[CONFIG_NAME]
    config = _Config(path, read_json(path, MAX_CONFIG_BYTES))
    name = config.text("peft_type")
    if name not in ("LORA", "IA3"):
        raise DataError(
            f"{checkpoint.path} is an adapter of {NAMES.get(str(name), name or 'no `peft_type`')}; flexmerge reads "
            "LoRA and (IA)³",
            hint=BY_HAND,
        )
    kind = AdapterKind.LORA if name == "LORA" else AdapterKind.IA3
    if kind is AdapterKind.LORA:
        _refuse_variants(config, checkpoint)
    ours = _by_role(checkpoint)
    if kind is AdapterKind.LORA:
        factors, vectors = _factors(config, ours), {}
    else:
        factors, vectors = {}, ours.get("ia3_l", {})
        if unread := [f"{module}.{role}" for role in ours if role not in ("", "ia3_l") for module in ours[role]]:
            raise DataError(f"{checkpoint.path} holds `{unread[0]}`, which is not part of (IA)³", hint=BY_HAND)
    if not factors and not vectors:
        raise DataError(f"{checkpoint.path} has no factors and changes nothing", hint="get a sound copy of the adapter")
    return Adapter(
        kind=kind,
        checkpoint=checkpoint,
        factors=factors,
        vectors=vectors,
        own=ours.get("", {}),
        saved_modules=tuple(config.texts("modules_to_save")),
        transposed=config.flag("fan_in_fan_out"),
        feedforward=tuple(config.texts("feedforward_modules")),
        base_name=config.text("base_model_name_or_path") or None,
        model_class=config.model_class(),
    )


def _refuse_variants(config: "_Config", checkpoint: Checkpoint) -> None:
    for key, name in VARIANTS.items():
        if config.values.get(key):
            raise DataError(f"{checkpoint.path} is a {name} adapter; only plain LoRA is supported", hint=BY_HAND)
    start = config.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVING_THE_BASE):
        raise DataError(
            f"{checkpoint.path} began as `{start[:40]}`, which changes the weights of the base",
            hint="save it with peft's `path_initial_model_for_weight_conversion`, or " + BY_HAND,
        )


def _by_role(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """Sort the tensors: role (`lora_A.weight`, `ia3_l`, …; "" for whole parameters) -> module or parameter ->
    tensor."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for key in sorted(checkpoint.tensors, key=lambda key: "modules_to_save." in key):
        segments = key.removeprefix(PREFIX).split(".")
        at = next((i for i, segment in enumerate(segments) if _is_role(segment)), len(segments))
        module, role = segments[:at], ".".join(segments[at:])
        if not role:
            if "original_module" in segments:
                continue  # the base's own tensor, which peft keeps for its own use
            module = [segment for segment in module if segment not in ("modules_to_save", "base_layer")]
        found.setdefault(role, {}).setdefault(".".join(module), checkpoint.tensors[key])
    return found


def _is_role(segment: str) -> bool:
    return segment.startswith(("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "token_adapter"))


def _factors(config: "_Config", ours: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, Factors]:
    where = config.path.parent
    known = {"", "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}
    if unread := [f"{module}.{role}" for role in ours if role not in known for module in ours[role]]:
        raise DataError(f"{where} holds `{unread[0]}`, which is not part of plain LoRA", hint=BY_HAND)
    found = {}
    for left, right, is_embedding in (
        ("lora_A.weight", "lora_B.weight", False),
        ("lora_embedding_A", "lora_embedding_B", True),
    ):
        a_of, b_of = ours.get(left, {}), ours.get(right, {})
        if alone := sorted(set(a_of) ^ set(b_of)):
            raise DataError(
                f"{where}: `{alone[0]}` has only one of its two factors", hint="get a sound copy of the adapter"
            )
        for module, a in a_of.items():
            b = b_of[module]
            rank = a.shape[0] if a.shape else 0
            if not a.num_elements or not b.num_elements:
                raise DataError(f"{where}: the factors of `{module}` {foreign.ZERO_3}", hint=foreign.ZERO_3_HINT)
            fits = len(a.shape) >= 2 and len(b.shape) >= 2 and b.shape[1] == rank > 0 and math.prod(b.shape[2:]) == 1
            if not fits or not {a.dtype, b.dtype} <= {"F32", "F16", "BF16", "F64"}:
                raise DataError(
                    f"{where}: the factors of `{module}` are {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}, "
                    "which are not a pair",
                    hint="get a sound copy of the adapter",
                )
            found[module] = Factors(a=a, b=b, scale=_scale(config, module, rank), is_embedding=is_embedding)
    return found


def _scale(config: "_Config", module: str, rank: int) -> float:
    """Return the scale, alpha / r or alpha / √r. A pattern that matches the module's name, or its end, overrides the
    default."""
    configured = config.for_module("rank_pattern", module, config.number("r", 8))
    if configured != rank:
        raise DataError(
            f"{config.path}: rank of `{module}` is {configured:g} by the config, {rank} in the weights",
            hint="get a sound copy of the adapter",
        )
    alpha = config.for_module("alpha_pattern", module, config.number("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)


@dataclass(frozen=True, slots=True)
class _Config:
    """The contents of adapter_config.json; checks the types of its values. Raises DataError."""

    path: Any
    values: Mapping[str, Any]

    def text(self, key: str) -> str | None:
        found: str | None = self._typed(key, str, None)
        return found

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, bool, False))

    def model_class(self) -> str | None:
        found = (self._typed("auto_mapping", dict, None) or {}).get("base_model_class")
        return found[:200] if isinstance(found, str) else None

    def number(self, key: str, otherwise: float) -> float:
        return self._number(key, self.values.get(key, otherwise))

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if isinstance(value, str):
            return [value]
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value)
        return value

    def for_module(self, key: str, module: str, otherwise: float) -> float:
        """Return the value for a module, like peft's `get_pattern_key`: that of the first pattern that matches the name
        or what follows a dot."""
        patterns = self._typed(key, dict, None) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({_safe(self.path, key, pattern)})$", module):
                return self._number(f"{key}.{pattern}", value)
        return otherwise

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise self._wrong(key, value)
        return float(value)

    def _typed(self, key: str, kind: type, otherwise: Any) -> Any:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(key, value)
        return otherwise if value is None else value

    def _wrong(self, key: str, value: Any) -> DataError:
        return DataError(f"{self.path}: `{key[:80]}` is {str(value)[:80]!r}", hint="get a sound copy of the adapter")


def _safe(path: Any, key: str, pattern: str) -> str:
    """Return a regular expression, checked to match any name in bounded time: few repeats, none of them of a group."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if repeats > MAX_REPEATS or re.search(r"\)[*+?{]", pattern) or len(pattern) > MAX_PATTERN_CHARACTERS:
        raise DataError(f"{path}: `{key}` has the pattern {pattern[:80]!r}, which is too costly to match", hint=BY_HAND)
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"{path}: `{key}` has the pattern {pattern[:80]!r}: {error}", hint=BY_HAND) from None
    return pattern
