"""Make `samples/digits/`: a small ViT and eight fine-tunes of it, really trained on scikit-learn's handwritten digits.

    python samples/make_digits.py [--out samples/digits]
    python samples/make_digits.py --tasks 30 --base samples/digits/base --out build/digits-30

The second makes a family of thirty tasks, those eight among them, from a base that is there already. Needs torch,
transformers and scikit-learn; about ten minutes on two cores. 1100 of the 1797 digits train, 697 test.
The base is pre-trained without labels (masked patches). Each task is then fine-tuned from it in full, and saved in
bfloat16 in Hugging Face layout with its test data. Exits 1, having written everything, unless each task is at least 20
points above chance and above the base with the task's own head. Seeded: a second run on the same build of torch and
the same processor gives the same weights, elsewhere nearly the same scores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from digit_tasks import MAX_INK, MORE_TASKS, TASKS, Images, Labels, Task, shifted_far
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTForMaskedImageModeling
from transformers.utils import logging

# N images; points are percentage points
NUM_TRAIN = 1100
NUM_CALIBRATION = 256
BATCH = 64
MASKED_FRACTION = 0.4
PRETRAIN_STEPS, PRETRAIN_RATE = 4000, 1e-3
TUNE_STEPS, TUNE_RATE, HEAD_RATE = 400, 1.5e-4, 6e-4
MIN_POINTS = 20.0

BODY = {
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "encoder_stride": 2,
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": False,
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / MAX_INK,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
    "size": {"height": 8, "width": 8},
}


# ---- training ----


def pixels(images: Images) -> Tensor:
    """What the model sees, as PREPROCESSOR says. [N, 8, 8] or [N, 1, 8, 8] -> [N, 1, 8, 8] float32 in [-1, 1]."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).float() * PREPROCESSOR["rescale_factor"]
    return ((scaled - 0.5) / 0.5).reshape(-1, 1, 8, 8)


def jitter(images: Images, rng: np.random.Generator) -> Images:
    """A few faint errors of ink, so that 1100 digits are not learnt by heart."""
    noise = rng.normal(0, 1.0, size=images.shape) * (rng.random(images.shape) < 0.5)
    return (images + noise).round().clip(0, MAX_INK).astype(np.uint8)


def batches(num_items: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` index arrays of BATCH items, each item once an epoch."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = np.concatenate([queue, rng.permutation(num_items)])
        yield queue[:BATCH]
        queue = queue[BATCH:]


def train(modules: dict[nn.Module, float], losses: Iterator[Tensor], steps: int) -> None:
    """AdamW at each module's own peak rate: warm-up over a tenth of the steps, then cosine to zero."""
    groups = [{"params": list(module.parameters())} for module in modules]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [*modules.values()], total_steps=steps + 1, pct_start=0.1)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()


def pretrain(images: Images, digits: Labels, rng: np.random.Generator) -> ViTForMaskedImageModeling:
    """Learn to fill in masked patches of digits in every pose and shade the tasks know, and never see a label.

    The class token draws the whole picture through a linear map that is thrown away; else nothing would train it.
    """
    model = ViTForMaskedImageModeling(ViTConfig(**BODY))
    draw = nn.Linear(BODY["hidden_size"], 64)
    makers = [shifted_far if name == "shifted" else task.make for name, task in TASKS.items()]

    def losses() -> Iterator[Tensor]:
        for items in batches(len(images), PRETRAIN_STEPS, rng):
            make = makers[rng.integers(len(makers))]
            seen, _ = make(images[items], digits[items], rng)
            target = pixels(seen)
            masked = torch.from_numpy(rng.random((len(items), 16)) < MASKED_FRACTION)
            output = model(target, bool_masked_pos=masked, output_hidden_states=True)
            picture = draw(model.vit.layernorm(output.hidden_states[-1])[:, 0]).reshape(target.shape)
            yield output.loss + (picture - target).abs().mean()

    train({model: PRETRAIN_RATE, draw: PRETRAIN_RATE}, losses(), PRETRAIN_STEPS)
    return model.bfloat16()


def fine_tune(base: Path, task: Task, images: Images, digits: Labels, rng: np.random.Generator) -> PreTrainedModel:
    """All weights of the base and a new head, on the task's labels."""
    names = dict(enumerate(task.classes))
    model = ViTForImageClassification.from_pretrained(
        base, dtype=torch.float32, id2label=names, label2id={name: label for label, name in names.items()}
    )

    def losses() -> Iterator[Tensor]:
        for items in batches(len(images), TUNE_STEPS, rng):
            seen, labels = task.make(images[items], digits[items], rng)
            yield model(pixels(jitter(seen, rng)), labels=torch.from_numpy(labels)).loss

    train({model.vit: TUNE_RATE, model.classifier: HEAD_RATE}, losses(), TUNE_STEPS)
    return model.bfloat16()


# ---- the sample: everything written below one folder, and checked ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--tasks", type=int, choices=(8, 30), default=8)
    parser.add_argument("--base", type=Path, help="a base to fine-tune, instead of pre-training one")
    asked = parser.parse_args()
    out, tasks = asked.out, TASKS if asked.tasks == 8 else TASKS | MORE_TASKS
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    trained, held_out = order[:NUM_TRAIN], order[NUM_TRAIN:]
    base = out / "base"
    torch.set_num_threads(2)  # fixed here and below: the number of threads decides the order of sums
    if asked.base is None:
        pretrain(images[trained], labels[trained], np.random.default_rng(1)).save_pretrained(base)
    else:
        shutil.copytree(asked.base, base, dirs_exist_ok=True)
    for folder in ("test", "calib"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as fast, a step here being so small
    for number, (name, task) in enumerate(tasks.items()):
        torch.manual_seed(number)
        model = fine_tune(base, task, images[trained], labels[trained], np.random.default_rng(100 + number))
        model.save_pretrained(out / "tasks" / name)
        (out / "tasks" / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
        seen, truth = task.make(images[held_out], labels[held_out], np.random.default_rng(500 + number))
        np.savez_compressed(out / "test" / f"{name}.npz", images=seen[:, None], labels=truth)
        write_calibration(out, number, name, task, images[trained], labels[trained])
    finish(out, tasks)


def write_calibration(out: Path, number: int, name: str, task: Task, images: Images, digits: Labels) -> None:
    """A few of the training digits as the task sees them, without labels, for `flexmerge calibrate`."""
    some = slice(NUM_CALIBRATION)
    seen, _ = task.make(images[some], digits[some], np.random.default_rng(900 + number))
    np.savez_compressed(out / "calib" / f"{name}.npz", images=seen[:, None])


def finish(out: Path, tasks: Mapping[str, Task]) -> None:
    """Write the spec, score what was written, and tell the scores. Exits 1 if a task is too near its base."""
    spec = ["# flexmerge.eval-spec/1: what each task is scored on, beside its fine-tuned model", "version: 1"]
    spec += ["dtype: float32  # several times faster than bfloat16 on most CPUs"]
    spec += ["batch_size: 64  # of so small a model these fit the cache: a quarter faster than 256", "tasks:"]
    spec += [f"  {n}: {{kind: image-classification, data: test/{n}.npz, checkpoint: tasks/{n}}}" for n in sorted(tasks)]
    (out / "eval.yaml").write_text("\n".join(spec) + "\n")
    calib = [
        "# examples of each task for `flexmerge calibrate`, without labels",
        "version: 1",
        "dtype: float32",
        "tasks:",
    ]
    calib += [f"  {n}: {{kind: image-classification, data: calib/{n}.npz}}" for n in sorted(tasks)]
    (out / "calib.yaml").write_text("\n".join(calib) + "\n")
    rows, near = [], []
    for name in sorted(tasks):
        tuned = ViTForImageClassification.from_pretrained(out / "tasks" / name, dtype=torch.float32).eval()
        body = ViTForImageClassification.from_pretrained(out / "base", dtype=torch.float32).vit.state_dict()
        with np.load(out / "test" / f"{name}.npz") as data:
            seen, truth = data["images"][:, 0], data["labels"]
        own, chance = accuracy(tuned, seen, truth), 100 / len(tasks[name].classes)
        tau = torch.cat([(p - body[key]).flatten() for key, p in tuned.vit.state_dict().items() if key in body])
        theta = torch.cat([p.flatten() for p in body.values()])
        tuned.vit.load_state_dict(body, strict=False)
        untuned = accuracy(tuned, seen, truth)
        rows.append((name, len(truth), own, untuned, chance, float(tau.norm() / theta.norm())))
        if own < max(untuned, chance) + MIN_POINTS:
            near.append(name)
    head = [
        "| task | n | fine-tuned | base with its head | chance | change / weights |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    table = head + [f"| {n} | {c} | {a:.1f} | {b:.1f} | {d:.1f} | {t:.3f} |" for n, c, a, b, d, t in rows]
    (out / "README.md").write_text(ABOUT + "\n".join(table) + "\n")
    print("\n".join(table))
    if near:
        sys.exit(f"within {MIN_POINTS:g} points of the base or of chance: {', '.join(near)}")


def accuracy(model: PreTrainedModel, images: Images, labels: Labels) -> float:
    """Percent."""
    with torch.inference_mode():
        return 100 * float((model(pixels(images)).logits.argmax(-1).numpy() == labels).mean())


ABOUT = """# digits

A small ViT (five layers of width 64, 8 × 8 pixels in patches of 2 × 2) and fine-tuned models of it, in bfloat16,
in Hugging Face layout. Made by `samples/make_digits.py` from scikit-learn's handwritten digits: 1100 train, 697 test.

- `base/` is pre-trained on masked patches, without labels.
- `tasks/NAME/` is fine-tuned from it in full, with a head of its own.
- `test/NAME.npz` has the held-out digits as the task sees them: `images` uint8 [697, 1, 8, 8], ink from 0 to 16, and
  `labels`. `preprocessor_config.json` says how pixels are scaled.
- `eval.yaml` is the spec that `flexmerge eval` reads.
- `calib/NAME.npz` has 256 of the training digits as the task sees them, without labels, and `calib.yaml` names them:
  what `flexmerge calibrate` reads.

Accuracy in percent on the test digits; change / weights is ‖θ - θ_base‖ / ‖θ_base‖ of the body.

"""


if __name__ == "__main__":
    main()
