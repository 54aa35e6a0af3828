"""Tiny models of transformers' classes on disk: a base and three fine-tunes each, as `save_pretrained` leaves them."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TASKS = ("alpha", "beta", "gamma")
VOCABULARY, LABELS = 40, (2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """How to make it, and how to run it."""

    config: Callable[..., Any]
    """Takes what differs by model."""
    base: type
    task: type
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "logits"
    of_base: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `config`."""
    of_task: tuple[Mapping[str, Any], ...] = ({}, {}, {})
    dtype: torch.dtype = torch.float32
    shard: str | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    """Part of a name -> class of the tensors that have it; the rest is mergeable, constant or base-only."""


def token_inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(2, 14).view(2, 6)}


def image_inputs() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def text(kind: type, **sizes: Any) -> Callable[..., Any]:
    """Return a maker of configs of encoders and decoders of text."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return lambda **own: kind(**(common | sizes | own))


def clip(**own: Any) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.CLIPConfig(
        text_config=small | {"vocab_size": VOCABULARY, "max_position_embeddings": 12, "eos_token_id": 13},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
        **own,
    )


def vit(**own: Any) -> Any:
    return hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        **own,
    )  # fmt: skip


def t5(**own: Any) -> Any:
    return hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **own
    )


def whisper(**own: Any) -> Any:
    return hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=10,
        max_target_positions=12, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None, **own,
    )  # fmt: skip


def resnet(**own: Any) -> Any:
    return hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **own)


def labels() -> tuple[Mapping[str, Any], ...]:
    return tuple({"num_labels": count} for count in LABELS)


def tied(*of_tasks: bool) -> tuple[Mapping[str, Any], ...]:
    return tuple({"tie_word_embeddings": is_tied} for is_tied in of_tasks)


LLAMA: dict[str, Any] = {
    "config": text(hf.LlamaConfig, num_key_value_heads=1), "base": hf.LlamaForCausalLM, "task": hf.LlamaForCausalLM,
    "inputs": token_inputs, "dtype": torch.bfloat16, "shard": "8KB",
}  # fmt: skip
BERT: dict[str, Any] = {
    "config": text(hf.BertConfig), "task": hf.BertForSequenceClassification, "inputs": token_inputs,
    "of_task": labels(), "classes": {"classifier": "private"},
}  # fmt: skip

FAMILIES = {
    "clip": TinyFamily(
        config=clip, base=hf.CLIPModel, task=hf.CLIPModel, inputs=lambda: token_inputs() | image_inputs(),
        output="logits_per_image",
    ),
    "vit": TinyFamily(
        config=vit, base=hf.ViTModel, task=hf.ViTForImageClassification, inputs=image_inputs, of_task=labels(),
        classes={"classifier": "private", "pooler": "base-only"},
    ),
    "bert without its prefix": TinyFamily(base=hf.BertModel, **BERT),
    "bert with its prefix": TinyFamily(base=hf.BertForMaskedLM, **(BERT | {
        "classes": {"classifier": "private", "pooler": "private", "cls.": "base-only"},
    })),
    "bert that drops its prefix": TinyFamily(base=hf.BertForMaskedLM, **(BERT | {
        "task": hf.BertModel, "of_task": ({}, {}, {}), "output": "last_hidden_state",
        "classes": {"pooler": "private", "cls.": "base-only"},
    })),
    "roberta": TinyFamily(
        config=text(hf.RobertaConfig, max_position_embeddings=24), base=hf.RobertaForMaskedLM,
        task=hf.RobertaForSequenceClassification, inputs=token_inputs, of_task=labels(),
        classes={"classifier": "private", "lm_head": "base-only"},
    ),
    "gpt2": TinyFamily(
        config=lambda **own: hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2, **own
        ),
        base=hf.GPT2LMHeadModel, task=hf.GPT2LMHeadModel, inputs=token_inputs,
    ),
    "llama, tied": TinyFamily(of_base=tied(True)[0], of_task=tied(True, True, True), **LLAMA),
    "llama, untied": TinyFamily(of_base=tied(False)[0], of_task=tied(False, False, False), **LLAMA),
    "llama, an untied task of a tied base": TinyFamily(
        of_base=tied(True)[0], of_task=tied(True, False, True), **LLAMA, classes={"lm_head": "private"}
    ),
    "llama, untied tasks of a tied base": TinyFamily(
        of_base=tied(True)[0], of_task=tied(False, False, False), **LLAMA, classes={"lm_head": "mergeable"}
    ),
    "llama, a tied task of an untied base": TinyFamily(
        of_base=tied(False)[0], of_task=tied(True, False, False), **LLAMA, classes={"lm_head": "private"}
    ),
    "llama, tied tasks of an untied base": TinyFamily(
        of_base=tied(False)[0], of_task=tied(True, True, True), **LLAMA, classes={"lm_head": "base-only"}
    ),
    "t5": TinyFamily(
        config=t5, base=hf.T5ForConditionalGeneration, task=hf.T5ForConditionalGeneration,
        inputs=lambda: token_inputs() | {"decoder_input_ids": torch.arange(8).view(2, 4)},
    ),
    "whisper": TinyFamily(
        config=whisper, base=hf.WhisperForConditionalGeneration, task=hf.WhisperForConditionalGeneration,
        inputs=lambda: {
            "input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(6)),
            "decoder_input_ids": torch.arange(8).view(2, 4),
        },
    ),
    "resnet": TinyFamily(
        config=resnet, base=hf.ResNetForImageClassification, task=hf.ResNetForImageClassification, inputs=image_inputs,
        of_base={"num_labels": 5}, of_task=labels(),
        classes={"classifier": "private", "running_mean": "private", "running_var": "private"},
    ),
}  # fmt: skip


def make(family: TinyFamily, root: Path) -> None:
    """Write `root/base` and `root/tasks/NAME`.

    A fine-tune has the base's values, moved a little; a head of its own where the base has none.
    """
    torch.manual_seed(1)
    base = family.base(family.config(**family.of_base)).eval()
    _move(base, 0, 0.02)
    own_values = dict(base.state_dict())
    models = {"base": base}
    for number, (name, own) in enumerate(zip(TASKS, family.of_task), 1):
        torch.manual_seed(number)
        model = family.task(family.config(**own)).eval()
        state = model.state_dict()
        found = {key: _base_value(own_values, key) for key in state}
        model.load_state_dict(
            {key: value for key, value in found.items() if value is not None and value.shape == state[key].shape},
            strict=False,
        )
        _move(model, 10 + number, 0.03)
        models[name] = model
    for name, model in models.items():
        model.to(family.dtype)
        place = root / "base" if name == "base" else root / "tasks" / name
        model.save_pretrained(place, **({"max_shard_size": family.shard} if family.shard else {}))


def _move(model: nn.Module, seed: int, size: float) -> None:
    """Every parameter and running statistic; tied ones once, so that they stay so."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                moved = size * torch.randn(value.shape, generator=generator)
                value.add_(moved.abs() if name.endswith("running_var") else moved)


def _base_value(state: Mapping[str, Tensor], key: str) -> Tensor | None:
    """Find a task's tensor: under its own name, or in or out of the prefix of a wrapped model."""
    wrapped = next((state[name] for name in state if name.endswith(f".{key}")), None)
    return state.get(key, state.get(key.partition(".")[2], wrapped))


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def merge_by_hand(root: Path, is_merged: Callable[[str], bool], target: Path) -> None:
    """A folder per task below `target`, whose mergeable tensors are base + mean(τ), all else being its own.

    From the files, one tensor at a time. is_merged: of a name of the base's.
    """
    base = read(root / "base")
    if "lm_head.weight" not in base and "model.embed_tokens.weight" in base:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]  # tied, and not stored
    states = {task: read(root / "tasks" / task) for task in TASKS}
    for task, state in states.items():
        merged = {}
        for key, own in state.items():
            names = [key, key.partition(".")[2], *(name for name in base if name.endswith(f".{key}"))]
            name = next((name for name in names if name in base), "")
            if is_merged(name):
                deltas = torch.stack([states[other][key].float() - base[name].float() for other in TASKS])
                own = (base[name].float() + deltas.double().mean(0).float()).to(own.dtype)
            merged[key] = own
        shutil.copytree(root / "tasks" / task, target / task, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(merged, target / task / "model.safetensors", metadata={"format": "pt"})


def load(family: TinyFamily, folder: Path) -> Any:
    """Load from files alone; nothing is missing, nothing made up."""
    model, info = family.task.from_pretrained(folder, output_loading_info=True, dtype=family.dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@torch.inference_mode()
def outputs(family: TinyFamily, model: nn.Module) -> Tensor:
    inputs = {k: v.to(family.dtype) if v.is_floating_point() else v for k, v in family.inputs().items()}
    found: Tensor = getattr(model(**inputs), family.output)
    return found
