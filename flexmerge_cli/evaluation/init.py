"""Writes a starter spec for a bundle: kinds from the configs' architectures, label names, and facts from side files.

Reads side files and looks for data near the place where the spec will be. What it cannot know is a comment, or a file
name to be filled in.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import FlexmergeError
from flexmerge_cli.evaluation.kinds.classes import architecture_of, label_count, label_names
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.readers import SUFFIXES
from flexmerge_cli.writing import has_start

HEAD = """\
# flexmerge.eval-spec/1: what each task is scored on; paths are relative to this file.
version: 1
# base: path/of/the/base  # scored with each task's own head
# limit: 200              # examples of each task; the first ones, or with `seed` drawn ones
# dtype: float32          # what models compute in; by default what they are stored in
tasks:
"""
UNNAMED = re.compile(r"LABEL_\d+")  # the name that transformers gives to a class without one
MAX_LABELS = 1000
FOLDERS = ("test", "data", "validation", ".")


def starter_spec(bundle: Bundle, folder: Path) -> str:
    """The text of a starter spec. folder: where the spec will be."""
    return HEAD + "".join(_task(bundle, task, folder) for task in bundle.tasks)


def is_starter_spec(path: Path) -> bool:
    """Whether a file begins like a starter spec, so that --init may replace it with --force."""
    return has_start(path, HEAD.partition(":")[0].encode())


def _task(bundle: Bundle, task: str, folder: Path) -> str:
    side = bundle.config_folder(task)
    lines = [f"kind: {_kind(side)}", *_keys(side, task, folder)]
    source = bundle.manifest.tasks[task].source
    # The path is relative to the plan, whose place is not known here.
    lines.append(f"{'' if is_remote(source) else '# '}checkpoint: {_quoted(source)}  # the fine-tuned model")
    return f"  {_quoted(task)}:\n" + "".join(f"    {line}\n" for line in lines)


def _kind(side: Path) -> str:
    try:
        config = read_config(side)
    except FlexmergeError:
        return "command"
    name = architecture_of(config) or ""
    if name.startswith("CLIP"):
        return "zero-shot-image-classification"
    if name.endswith("ForSequenceClassification"):
        return "regression" if label_count(config) == 1 else "text-classification"
    ends = {"ForImageClassification": "image-classification", "ForConditionalGeneration": "text2text"}
    ends |= {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm"}
    return next((kind for end, kind in ends.items() if name.endswith(end)), "command")


def _keys(side: Path, task: str, folder: Path) -> list[str]:
    """The spec's keys for the kind."""
    kind = _kind(side)
    if kind == "command":
        return ['command: [python, score.py, "{checkpoint}"]  # prints {"value": 0.9, "n": 100}; needs --allow-exec']
    suffix = "npz" if "image" in kind else "jsonl"
    found = _data(task, folder)
    comment = "" if found else "  # jsonl, csv, parquet, npz, safetensors, folders of images, or hf://org/name"
    lines = [f"data: {_quoted(found or f'data/{task}.{suffix}')}{comment}"]
    names = label_names(read_config(side))
    named = bool(names) and len(names) <= MAX_LABELS and not all(map(UNNAMED.fullmatch, names))
    labels = f"labels: {_list(names)}" if named else "# labels: [first, second]  # names of the classes, in their order"
    if kind == "image-classification":
        return [*lines, "columns: {image: images, label: labels}", labels]
    if kind == "zero-shot-image-classification":
        of_classes = labels if named else "labels: [cat, dog]  # names of the classes, in their order"
        return [
            *lines, of_classes, '# templates: ["a photo of a {}."]',
            "text_model: path/of/the/base  # a whole CLIP model; by default `base`",
        ]  # fmt: skip
    if kind == "text-classification":
        return [*lines, "columns: {text: text, label: label}  # pair: the second text's", labels]
    if kind == "regression":
        return [*lines, "columns: {text: text, label: label}  # pair: the second text's", "metric: [spearman, pearson]"]
    if kind == "causal-lm":
        return [*lines, "columns: {text: text}  # for multiple choice {context: …, choices: …, label: …}"]
    return [
        *lines, 'template: "{text}"', "columns: {target: label}", "# labels: [negative, positive]  # of classes",
        "metric: exact_match  # with labels accuracy, f1; of numbers spearman",
    ]  # fmt: skip


def _data(task: str, folder: Path) -> str | None:
    """A file near the spec that is named after the task, if there is one."""
    for name in FOLDERS:
        for suffix in dict.fromkeys(SUFFIXES):
            path = folder / name / f"{task}{suffix}"
            if path.is_file():
                return path.relative_to(folder).as_posix()
    return None


def _quoted(text: str) -> str:
    """Quote a text for YAML."""
    try:
        plain = bool(re.fullmatch(r"[\w./:@+-]+", text)) and yaml.safe_load(f"- {text}") == [text]
    except (yaml.YAMLError, ValueError):
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, names))}]"
