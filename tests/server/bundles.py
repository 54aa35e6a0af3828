"""Bundles of tiny models with tokenizers, of every kind that is served."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from flexmerge_cli import make_plan, merge

from ..evaluation import tiny


def _moved(base: Path, folder: Path, seed: int) -> Path:
    """A copy of a checkpoint whose weights lie a little elsewhere."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    state = load_file(folder / "model.safetensors")
    state = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _bundle(root: Path, base: Path, made: dict[str, Path], **options: Any) -> Path:
    tasks = {name: _moved(path, root / "tasks" / name, seed) for seed, (name, path) in enumerate(made.items(), 1)}
    make_plan(base, tasks, output=root / "plan.json")
    merge(root / "plan.json", root / "bundle", **(options or {"method": "average", "size": "1.5x"}))
    return root / "bundle"


def texts(root: Path) -> Path:
    heads = {"two": tiny.bert(root / "2", 2), "three": tiny.bert(root / "3", 3), "grade": tiny.bert(root / "1", 1)}
    return _bundle(root, heads["two"], heads)


def images(root: Path) -> Path:
    base = tiny.vit(root / "base")
    return _bundle(root, base, {"cats": base, "dogs": base})


def t5(root: Path) -> Path:
    base = tiny.t5(root / "base")
    return _bundle(root, base, {"sums": base, "words": base})


def gpt2(root: Path) -> Path:
    base = tiny.gpt2(root / "base")
    return _bundle(root, base, {"first": base, "second": base})


def mixed(root: Path) -> Path:
    """Eight tasks of one Llama: four language models, one of them with a chat template, and four with heads."""
    base = tiny.llama(root / "base")
    config = transformers.LlamaConfig.from_pretrained(base)
    made = dict.fromkeys(("code", "prose", "verse"), base)
    made["talk"] = tiny.saved(root / "talk", transformers.LlamaForCausalLM(config), tiny.tokenizer(start=True))
    template = "{% for one in messages %}{{ one.content }} is {% endfor %}"
    (made["talk"] / "chat_template.jinja").write_text(template)
    for name, labels in {"mood": 2, "topic": 3, "tone": 4, "grade": 1}.items():
        config.num_labels = labels
        head = transformers.LlamaForSequenceClassification(config)
        made[name] = tiny.saved(root / name, head, tiny.tokenizer(start=True))
    return _bundle(root, base, made, method="average", size="3x")


def encoders(root: Path) -> Path:
    """Encoders of texts without heads."""
    sizes = transformers.BertConfig(
        vocab_size=len(tiny.SPECIAL) + len(tiny.WORDS), hidden_size=tiny.WIDTH, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=tiny.WIDTH, max_position_embeddings=tiny.LENGTH,
    )  # fmt: skip
    base = tiny.saved(root / "base", transformers.BertModel(sizes), tiny.tokenizer(start=True, end=True))
    return _bundle(root, base, {"one": base, "two": base})


def sentences(root: Path) -> Path:
    """The same, as sentence-transformers saves them: the first token's states, of length 1."""
    base = encoders(root / "plain").parent / "base"
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    return _bundle(root, base, {"one": base, "two": base})


def clip(root: Path) -> Path:
    base = tiny.clip(root / "base")
    return _bundle(root, base, {"pets": base, "cars": base})


def vision(root: Path) -> Path:
    """Vision towers of a CLIP."""
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tiny.clip(root / "whole"))
    base = tiny.saved(root / "base", tower)
    return _bundle(root, base, {"pets": base, "cars": base})


def whisper(root: Path) -> Path:
    """It hears a second, in 20 frames."""
    sizes = transformers.WhisperConfig(
        vocab_size=len(tiny.SPECIAL) + len(tiny.WORDS), num_mel_bins=8, d_model=tiny.WIDTH, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=tiny.WIDTH, decoder_ffn_dim=tiny.WIDTH, encoder_attention_heads=2,
        decoder_attention_heads=2, max_source_positions=10, max_target_positions=20, pad_token_id=tiny.PAD,
        bos_token_id=tiny.START, eos_token_id=tiny.END, decoder_start_token_id=tiny.START, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    base = tiny.saved(root / "base", transformers.WhisperForConditionalGeneration(sizes), tiny.tokenizer())
    transformers.WhisperFeatureExtractor(feature_size=8, hop_length=800, chunk_length=1).save_pretrained(base)
    return _bundle(root, base, {"calls": base, "songs": base})


MADE: dict[str, Callable[[Path], Path]] = {
    "texts": texts, "images": images, "t5": t5, "gpt2": gpt2, "mixed": mixed, "encoders": encoders,
    "sentences": sentences, "clip": clip, "vision": vision, "whisper": whisper,
}  # fmt: skip
