"""Real models of every kind, tiny and untrained, on disk with tokenizers of their own; and specs that score them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from flexmerge_cli.checkpoint.checkpoint import open_checkpoint
from flexmerge_cli.evaluation.models import TaskModel, checkpoint_model, fetched
from flexmerge_cli.evaluation.scored import Scored
from flexmerge_cli.evaluation.scoring import Scorer
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec

WORDS = (
    "red", "green", "blue", "one", "two", "three", "four", "is", "not", "the", "a", "of", "yes", "no", "maybe", "0",
    "1", "2", "3", "4", "5", "negative", "positive",
)  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>"]
PAD, UNK, START, END = range(4)
WIDTH, LENGTH = 16, 24


def tokenizer(*, start: bool = False, end: bool = False, pairs: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token a word."""
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    one = f"{'<s> ' if start else ''}$A{' </s>' if end else ''}"
    made.post_processor = processors.TemplateProcessing(
        single=one, pair=f"{one} $B:1 </s>:1" if pairs else None, special_tokens=[("<s>", START), ("</s>", END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        model_max_length=LENGTH,
    )  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def saved(folder: Path, model: Any, of_text: Any = None) -> Path:
    """Weights spread out, so that an untrained model decides this and that."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    if of_text is not None:
        of_text.save_pretrained(folder)
    return folder


def bert(folder: Path, num_labels: int, **config: Any) -> Path:
    sizes = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=WIDTH, max_position_embeddings=LENGTH, num_labels=num_labels, **config,
    )  # fmt: skip
    return saved(folder, transformers.BertForSequenceClassification(sizes), tokenizer(start=True, end=True, pairs=True))


def tuned_bert(folder: Path, name: str, seed: int, labels: Sequence[str] = ("no", "yes"), *, size: float = 0.1) -> Path:
    """A fine-tune, `tasks/NAME`, that differs by its seed, from 1; the first one's backbone is also saved as `base`."""
    ids = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    path = bert(folder / "tasks" / name, len(labels), **ids)
    model = transformers.BertForSequenceClassification.from_pretrained(path)
    if seed == 1:
        model.bert.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return path


def vit(folder: Path, num_labels: int = 3, **config: Any) -> Path:
    sizes = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=WIDTH, image_size=8,
        patch_size=4, num_channels=3, num_labels=num_labels, **config,
    )  # fmt: skip
    path = saved(folder, transformers.ViTForImageClassification(sizes))
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def gpt2(folder: Path) -> Path:
    sizes = transformers.GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS), n_embd=WIDTH, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=START,
        eos_token_id=END,
    )  # fmt: skip
    return saved(folder, transformers.GPT2LMHeadModel(sizes), tokenizer())


def llama(folder: Path) -> Path:
    sizes = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=LENGTH, bos_token_id=START,
        eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return saved(folder, transformers.LlamaForCausalLM(sizes), tokenizer(start=True))


def t5(folder: Path) -> Path:
    sizes = transformers.T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD,
    )  # fmt: skip
    return saved(folder, transformers.T5ForConditionalGeneration(sizes), tokenizer(end=True))


def clip(folder: Path) -> Path:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    of_text = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": LENGTH, "eos_token_id": END,
               "bos_token_id": START, "pad_token_id": PAD}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=sizes | of_text,
        vision_config=sizes | {"image_size": 8, "patch_size": 4, "projection_dim": 8},
        projection_dim=8,
    )
    return saved(folder, transformers.CLIPModel(config), tokenizer(start=True, end=True))


def rows(path: Path, **columns: list[Any]) -> str:
    """A .jsonl; gives its name."""
    lines = [json.dumps(dict(zip(columns, values))) for values in zip(*columns.values())]
    path.write_text("\n".join(lines) + "\n")
    return path.name


def spec_of(folder: Path, task: dict[str, Any], **top: Any) -> EvalSpec:
    """A spec of one task, `it`, written beside its data."""
    path = folder / "eval.yaml"
    path.write_text(json.dumps({"version": 1, **top, "tasks": {"it": task}}))  # JSON is YAML
    return read_spec(path, ("it",), allow_exec=True)


def source_model(task: str, source: str) -> TaskModel:
    """The model of a checkpoint."""
    return checkpoint_model(task, fetched(open_checkpoint(source)))


def scored(model: Path, task: dict[str, Any], *, reference: Path | None = None, **top: Any) -> Scored:
    """The score of a checkpoint on a task whose data lie beside it."""
    spec = spec_of(model.parent, task, **top)
    other = source_model("it", str(reference)) if reference is not None else None
    return Scorer(spec=spec, device="cpu", cache=None).score(source_model("it", str(model)), reference=other)
