"""`python -m tests.bench serve`: memory, throughput and loading of a runtime, beside plain transformers models.

Two families of eight synthetic fine-tunes, made once in --folder: CLIP's ViT-B/32 image tower (88 M parameters), and a
Llama-shaped language model (110 M). Each is merged by average at 1x, 2.25x and 4x, and packed by `auto` at 1x. Every
figure comes from a process of its own. Numbers of shared machines are noisy: compare ratios of one run.
"""

import shutil
from pathlib import Path
from typing import Any

NUM_TASKS = 8
SIZES = {
    "average-1x": ("average", "1x"),
    "average-2.25x": ("average", "2.25x"),
    "average-4x": ("average", "4x"),
    "auto-1x": ("auto", "1x"),
}


def clip() -> Any:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
        projection_dim=512,
    )  # fmt: skip
    return transformers.CLIPVisionModelWithProjection, config


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM, config


FAMILIES = {"vit": clip, "llama": llama}


def make_families(folder: Path) -> None:
    """A base and its fine-tunes, their plan, and a bundle of every size."""
    import torch

    from flexmerge_cli import make_plan, merge

    for name, form in FAMILIES.items():
        root = folder / name
        if not (root / "plan.json").exists():
            kind, config = form()
            torch.manual_seed(0)
            model = kind(config)
            model.save_pretrained(root / "base")
            base = {key: value.clone() for key, value in model.state_dict().items()}
            for number in range(NUM_TASKS):
                generator = torch.Generator().manual_seed(number + 1)
                with torch.no_grad():
                    for key, value in model.named_parameters():
                        value.copy_(base[key] + 0.001 * torch.randn(value.shape, generator=generator))
                model.save_pretrained(root / "tasks" / f"task{number}")
            tasks = {path.name: path for path in (root / "tasks").iterdir()}
            make_plan(root / "base", tasks, output=root / "plan.json", device="cpu")
        for bundle, (method, size) in SIZES.items():
            if not (root / bundle).exists():
                merge(root / "plan.json", root / bundle, method=method, size=size, device="cpu")
        for path in root.rglob("*.safetensors"):
            shutil.copyfile(path, "/dev/null")  # all runs then find it in the page cache
