"""Make the models and data that the specs beside this file score: for each kind a base and a few fine-tunes of it.

    python samples/eval/make_models.py [--out samples/eval/models] [KIND ...]

Needs torch, transformers and tokenizers; a minute on two cores. The models are tiny (two layers of width 32), the data
are made up, and each model is trained for seconds: they show how a spec is written, and nothing about any method.
Seeded: the same build of torch and the same processor give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from texts import (
    LENGTH,
    NUM_TEST,
    NUM_TRAIN,
    Row,
    better,
    counted,
    days,
    how_much_better,
    judged,
    next_day,
    rows_of,
    share_of_good,
    word_tokenizer,
)
from torch import Tensor

BATCH = 32
WIDTH, LAYERS, HEADS = 32, 2, 2


# ---- training ----


def train(model: torch.nn.Module, loss_of: Callable[[np.ndarray], Tensor], count: int, steps: int, rate: float) -> None:
    """AdamW on random batches of `count` examples."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(rng.integers(count, size=BATCH))
        loss.backward()
        optimizer.step()
    model.eval()


def pieces(rows: list[Row], *names: str) -> list[list[str]]:
    return [[row[name] for row in rows] for name in names if name in rows[0]]


def save(folder: Path, model: Any, tokenizer: Any = None) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- the kinds ----


def bert(out: Path, tasks: dict[str, tuple[Callable[[np.random.Generator], Row], str]], labels: dict[str, Any]) -> None:
    """A base without a head, and a fine-tune with a head of its own for each task."""
    tokenizer = word_tokenizer("[CLS]", None, "[SEP]")
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH, "max_position_embeddings": LENGTH, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=True)
    save(out / "base", base, tokenizer)
    for seed, (name, (make, target)) in enumerate(tasks.items(), 1):
        rows, test = rows_of(make, seed)
        names = labels.get(name)
        heads: dict[str, Any] = {"num_labels": 1}
        if names is not None:
            heads = {"id2label": dict(enumerate(names)), "label2id": {word: n for n, word in enumerate(names)}}
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **heads))
        model.bert.load_state_dict(base.state_dict())
        inputs = tokenizer(*pieces(rows, "sentence", "sentence1", "sentence2"), padding=True, return_tensors="pt")
        known = {} if names is None else model.config.label2id
        wanted = torch.tensor([known.get(row[target], row[target]) for row in rows])

        def loss_of(chosen: np.ndarray, model: Any = model, inputs: Any = inputs, wanted: Tensor = wanted) -> Tensor:
            return model(**{key: value[chosen] for key, value in inputs.items()}, labels=wanted[chosen]).loss

        train(model, loss_of, len(rows), 250, 3e-3)
        save(out / "tasks" / name, model, tokenizer)
        write_rows(out / "data" / f"{name}.jsonl", test)


def text_classification(out: Path) -> None:
    tasks = {"judged": (judged, "label"), "better": (better, "label")}
    bert(out, tasks, {"judged": ("bad", "good"), "better": ("second", "first")})


def regression(out: Path) -> None:
    bert(out, {"share": (share_of_good, "score"), "difference": (how_much_better, "score")}, {})


def causal_lm(out: Path) -> None:
    """A Llama that has read all words at random, and two that know the days."""
    tokenizer = word_tokenizer("<s>", None, None)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=LENGTH, bos_token_id=2,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    save(out / "base", base, tokenizer)
    for seed, (name, make) in enumerate({"days": days, "next": next_day}.items(), 1):
        rows, test = rows_of(make, seed)
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        wanted = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

        def loss_of(chosen: np.ndarray, model: Any = model, inputs: Any = inputs, wanted: Tensor = wanted) -> Tensor:
            return model(**{key: value[chosen] for key, value in inputs.items()}, labels=wanted[chosen]).loss

        train(model, loss_of, len(rows), 60, 3e-3)
        save(out / "tasks" / name, model, tokenizer)
        write_rows(out / "data" / f"{name}.jsonl", test)


def text2text(out: Path) -> None:
    """A T5 that knows nothing, and three that answer in words and numbers."""
    tokenizer = word_tokenizer(None, "</s>", None)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH, num_layers=LAYERS,
        num_heads=HEADS, dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.T5ForConditionalGeneration(config)
    save(out / "base", base, tokenizer)
    tasks = {"generated": (judged, "judge : "), "number": (counted, "count : "), "ranked": (judged, "judge : ")}
    for seed, (name, (make, prefix)) in enumerate(tasks.items(), 1):
        rows, test = rows_of(make, seed)
        model = transformers.T5ForConditionalGeneration(config)
        model.load_state_dict(base.state_dict())
        inputs = tokenizer([prefix + row["sentence"] for row in rows], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        targets = [row["number"] if "number" in row else ("negative", "positive")[row["label"]] for row in rows]
        wanted = tokenizer(targets, padding=True, return_tensors="pt")
        wanted = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)

        def loss_of(chosen: np.ndarray, model: Any = model, inputs: Any = inputs, wanted: Tensor = wanted) -> Tensor:
            return model(**{key: value[chosen] for key, value in inputs.items()}, labels=wanted[chosen]).loss

        train(model, loss_of, len(rows), 200, 3e-3)
        save(out / "tasks" / name, model, tokenizer)
        write_rows(out / "data" / f"{name}.jsonl", test)


TEMPLATES = ("the {}", "a {} : good", "{}")
COLOURS = {"cat": (1, 0, 0), "dog": (0, 1, 0), "cow": (0, 0, 1)}


def pictures(seed: int, names: tuple[str, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in the colour of a class: uint8 [n, 3, 8, 8], and labels [n]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(names), size=count)
    tint = np.array([COLOURS[name] for name in names])[labels][:, :, None, None]
    return (rng.uniform(0, 140, size=(count, 3, 8, 8)) + 60 * tint).astype(np.uint8), labels


def zero_shot(out: Path) -> None:
    """A small CLIP, and two image encoders of it, trained on against its own text tower."""
    tokenizer = word_tokenizer("<s>", "</s>", None)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "eos_token_id": 3,
                     "bos_token_id": 2, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=WIDTH,
    )  # fmt: skip
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    torch.manual_seed(0)
    base = transformers.CLIPModel(config)
    images, labels = pictures(0, tuple(COLOURS), NUM_TRAIN)
    pixels, wanted = normalised(images), torch.from_numpy(labels)
    prompts = tokenizer([TEMPLATES[0].format(label) for label in COLOURS], padding=True, return_tensors="pt")
    prompts.pop("token_type_ids", None)

    def contrast(chosen: np.ndarray) -> Tensor:
        scores = base(**prompts, pixel_values=pixels[chosen]).logits_per_image
        return torch.nn.functional.cross_entropy(scores, wanted[chosen])

    train(base, contrast, len(labels), 5, 2e-3)
    save(out / "base", base, tokenizer)
    (out / "base" / "templates.json").write_text(json.dumps(TEMPLATES) + "\n")
    for seed, (name, classes) in enumerate({"three": ("cat", "dog", "cow"), "two": ("dog", "cow")}.items(), 1):
        model = transformers.CLIPModel(config)
        model.load_state_dict(base.state_dict())
        images, labels = pictures(seed, classes, NUM_TRAIN)
        pixels, wanted = normalised(images), torch.from_numpy(labels)
        with torch.no_grad():
            inputs = tokenizer([f"the {label}" for label in classes], padding=True, return_tensors="pt")
            text = base.text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            text = torch.nn.functional.normalize(base.text_projection(text.pooler_output), dim=-1)

        def loss_of(chosen: np.ndarray, model: Any = model, pixels: Tensor = pixels, wanted: Tensor = wanted,
                    text: Tensor = text) -> Tensor:  # fmt: skip
            pooled = model.vision_model(pixel_values=pixels[chosen]).pooler_output
            seen = torch.nn.functional.normalize(base.visual_projection(pooled), dim=-1)
            return torch.nn.functional.cross_entropy(20 * seen @ text.T, wanted[chosen])

        train(model.vision_model, loss_of, len(labels), 60, 2e-3)
        encoder = transformers.CLIPVisionModel(config.vision_config)
        state = {key: value for key, value in model.state_dict().items() if key.startswith("vision_model.")}
        encoder.load_state_dict(state if "vision_model.embeddings.class_embedding" in encoder.state_dict() else
                                {key.removeprefix("vision_model."): value for key, value in state.items()})  # fmt: skip
        save(out / "tasks" / name, encoder)
        (out / "tasks" / name / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        (out / "data").mkdir(exist_ok=True)
        images, labels = pictures(100 + seed, classes, NUM_TEST)
        np.savez_compressed(out / "data" / f"{name}.npz", images=images, labels=labels)
        first = [np.flatnonzero(labels == number)[0] for number in range(len(classes))]
        texts = [f"the {label}" for label in classes]
        np.savez_compressed(out / "data" / f"{name}-pairs.npz", images=images[first], texts=texts)


SIDE = 16
PER_STAGE = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 16], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 1], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
}  # fmt: skip


def halves(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of two colours, left and right of an edge: uint8 [n, 3, 16, 16], and which of three, [n, 16, 16]."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(3, size=(2, count, 1))
    left = np.arange(SIDE) < rng.integers(4, SIDE - 3, (count, 1))
    classes = np.repeat(np.where(left, first, second)[:, None], SIDE, 1)
    tints = np.eye(3)[classes].transpose(0, 3, 1, 2)
    return (rng.uniform(0, 140, tints.shape) + 100 * tints).astype(np.uint8), classes


def dense(out: Path, base: Any, tasks: dict[str, Callable[[np.ndarray], np.ndarray]], loss_from: Any) -> None:
    """A base that has seen nothing, and a fine-tune for each map from the colours of pixels to their labels."""
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    save(out / "base", base)
    (out / "data").mkdir()
    for seed, (name, label_of) in enumerate(tasks.items(), 1):
        model = type(base)(base.config)
        model.load_state_dict(base.state_dict())
        images, classes = halves(seed, NUM_TRAIN)
        pixels, wanted = normalised(images), torch.from_numpy(label_of(classes))

        def loss_of(chosen: np.ndarray, model: Any = model, pixels: Tensor = pixels, wanted: Tensor = wanted) -> Tensor:
            return loss_from(model(pixel_values=pixels[chosen]), wanted[chosen])

        train(model, loss_of, len(images), 80, 5e-3)
        save(out / "tasks" / name, model)
        (out / "tasks" / name / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        images, classes = halves(100 + seed, NUM_TEST)
        np.savez_compressed(out / "data" / f"{name}.npz", images=images, labels=label_of(classes))


def resized(maps: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(maps, (SIDE, SIDE), mode="bilinear", align_corners=False)


def segmentation(out: Path) -> None:
    """A Segformer, and two that tell colours apart, by different numbers."""
    torch.manual_seed(0)
    base = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**PER_STAGE, num_labels=3))
    tasks = {"colours": lambda classes: classes, "reversed": lambda classes: 2 - classes}
    dense(out, base, tasks, lambda made, wanted: torch.nn.functional.cross_entropy(resized(made.logits), wanted))


def depth(out: Path) -> None:
    """A GLPN, and two for which colours are near or far."""
    torch.manual_seed(0)
    base = transformers.GLPNForDepthEstimation(transformers.GLPNConfig(**PER_STAGE, max_depth=4))
    tasks = {"near": lambda classes: 1.0 + classes, "far": lambda classes: 3.0 - classes}

    def loss(made: Any, wanted: Tensor) -> Tensor:
        return (resized(made.predicted_depth[:, None])[:, 0] - wanted).abs().mean()

    dense(out, base, tasks, loss)


def normalised(images: np.ndarray) -> Tensor:
    """What the model sees, as the processor says."""
    return (torch.from_numpy(images).float() / 255 - 0.5) / 0.25


KINDS: dict[str, Callable[[Path], None]] = {
    "text-classification": text_classification,
    "regression": regression,
    "causal-lm": causal_lm,
    "text2text": text2text,
    "zero-shot-image-classification": zero_shot,
    "semantic-segmentation": segmentation,
    "depth-estimation": depth,
}


def make(out: Path, kinds: list[str]) -> Iterator[Path]:
    """One folder a kind, replaced if it is there: base, tasks, data."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for kind in kinds:
        shutil.rmtree(out / kind, ignore_errors=True)
        (out / kind).mkdir(parents=True)
        KINDS[kind](out / kind)
        yield out / kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; by default all")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "models")
    given = parser.parse_args()
    wrong = set(given.kinds) - set(KINDS)
    if wrong:
        parser.error(f"no such kind: {', '.join(wrong)}")
    for folder in make(given.out, given.kinds or list(KINDS)):
        print(folder)


if __name__ == "__main__":
    main()
