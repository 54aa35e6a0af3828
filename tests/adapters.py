"""Adapters as peft makes them, on tiny models of transformers; factors are random, so that every module changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(num_key_value_heads=2, vocab_size=50, **SMALL),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=50),
    ),
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(image_size=16, patch_size=8, **SMALL),
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16),
    ),
}
LORA, IA3 = peft.LoraConfig, peft.IA3Config


@dataclass(frozen=True)
class Adapted:
    """A base and adapters of it, each beside the model that peft makes of it."""

    kind: str
    base: Path
    tasks: Path
    merged: Path

    def model(self, folder: Path | None = None) -> Any:
        return MODELS[self.kind][0].from_pretrained(folder or self.base).eval()

    def full(self, name: str, seed: int) -> Path:
        """A fine-tune of every weight, beside them."""
        model, place = self.model(), self.base.parent / "full" / name
        draw = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.data += (0.02 * torch.randn(weight.shape, generator=draw)).to(weight.dtype)
        model.save_pretrained(place)
        return place

    def logits(self, model: Any) -> Tensor:
        """Compute outputs of an input that is always the same."""
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            if self.kind == "vit":
                return model(pixel_values=torch.randn(2, 3, 16, 16, generator=draw)).logits
            words = torch.randint(0, 50, (2, 7), generator=draw)
            extra = {"decoder_input_ids": words} if self.kind == "t5" else {}
            return model(input_ids=words, **extra).logits


def make(
    root: Path, kind: str, configs: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, size: float = 0.1
) -> Adapted:
    """size: standard deviation of what is drawn for the factors; (IA)³ vectors are 1 and thrice that."""
    model_class, config = MODELS[kind]
    found = Adapted(kind, root / "base", root / "tasks", root / "merged")
    torch.manual_seed(0)
    model_class(config).to(dtype).save_pretrained(found.base)
    for seed, (name, adapter) in enumerate(configs.items()):
        model = peft.get_peft_model(model_class.from_pretrained(found.base, dtype=dtype), adapter)
        draw = torch.Generator().manual_seed(seed)
        for key, weight in model.named_parameters():
            drawn = size * torch.randn(weight.shape, generator=draw)
            if "lora_" in key or "modules_to_save" in key:
                weight.data = drawn.to(weight.dtype)
            elif "ia3_" in key:
                weight.data = 1 + 3 * drawn.to(weight.dtype)
        model.save_pretrained(found.tasks / name)
        model.merge_and_unload().save_pretrained(found.merged / name)
    return found
