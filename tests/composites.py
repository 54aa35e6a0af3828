"""Models of several parts on disk, as sentence-transformers and diffusers lay them out: a base and its fine-tunes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .families import encoder, normal, tuned, write_checkpoint

Parts = dict[str, dict[str, Tensor]]
"""Subfolder ("" for the model itself) -> its tensors."""

SENTENCES: Parts = {
    "": encoder(width=8),
    "2_Dense": {"linear.weight": normal(21, 4, 8), "linear.bias": normal(22, 4)},
    "3_LayerNorm": {"norm.weight": normal(23, 4), "norm.bias": normal(24, 4)},
}
PIPELINE: Parts = {
    "unet": {f"down_blocks.{i}.resnets.0.conv1.weight": normal(30 + i, 4, 4, 3, 3) for i in range(3)},
    "vae": {f"{half}.conv_in.weight": normal(40 + i, 4, 4, 3, 3) for i, half in enumerate(("encoder", "decoder"))},
    "text_encoder": {f"text_model.{name}": value for name, value in encoder(layers=1).items()},
}


def fine_tune(parts: Parts, seed: int, *, same: tuple[str, ...] = ()) -> Parts:
    """same: parts that the fine-tune left as they are."""
    return {part: state if part in same else tuned(state, seed + at) for at, (part, state) in enumerate(parts.items())}


def named(parts: Parts) -> dict[str, Tensor]:
    """Name the tensors as a checkpoint does."""
    return {f"{part}/{name}" if part else name: value for part, state in parts.items() for name, value in state.items()}


def write_sentences(folder: Path, parts: Parts) -> Path:
    """One part as a .bin, as older releases wrote it."""
    write_checkpoint(folder, parts[""])
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_LayerNorm", "type": "sentence_transformers.models.LayerNorm"},
    ]
    texts = {
        "config.json": {"model_type": "bert"},
        "modules.json": modules,
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_cls_token": True},
        "2_Dense/config.json": {"in_features": 8, "out_features": 4, "bias": True},
        "3_LayerNorm/config.json": {"dimension": 4},
    }
    _write_texts(folder, texts)
    save_file(parts["2_Dense"], folder / "2_Dense/model.safetensors")
    torch.save(parts["3_LayerNorm"], folder / "3_LayerNorm/pytorch_model.bin")
    return folder


def write_pipeline(folder: Path, parts: Parts) -> Path:
    """The unet in shards, the others in one file."""
    texts = {
        "model_index.json": {
            "_class_name": "P",
            **{part: ["diffusers", part] for part in (*parts, "scheduler", "tokenizer")},
        },
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
        "tokenizer/vocab.json": {"a": 0},
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"},
        "vae/config.json": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30"},
        "text_encoder/config.json": {"model_type": "clip_text_model"},
    }
    _write_texts(folder, texts)
    write_checkpoint(folder / "unet", parts["unet"], layout="shards")
    for path in sorted((folder / "unet").glob("model*")):
        path.rename(path.with_name(f"diffusion_pytorch_{path.name}"))
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"diffusion_pytorch_model-'))
    save_file(parts["vae"], folder / "vae/diffusion_pytorch_model.safetensors")
    save_file(parts["text_encoder"], folder / "text_encoder/model.safetensors")
    return folder


def _write_texts(folder: Path, texts: dict[str, object]) -> None:
    for name, value in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
