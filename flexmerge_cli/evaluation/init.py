"""Writes a starter spec for a bundle: kinds from the configs' architectures, label names, and facts from side files.

Reads side files, the plan if there is one, and the columns of data near the place where the spec will be. Facts that it
cannot know become comments, or file names to be filled in.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import FlexmergeError, UsageError
from flexmerge_cli.evaluation.kinds.classes import architecture_of, label_count, label_names
from flexmerge_cli.evaluation.loading import read_config
from flexmerge_cli.evaluation.readers import SUFFIXES, guess_format, open_source
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.writing import has_start

HEAD = """\
# flexmerge.eval-spec/1: what each task is scored on; paths are relative to this file.
version: 1
{base}  # scored with each task's own head
# limit: 200              # examples per task: the first ones or, with `seed`, random ones
# dtype: float32          # the dtype to compute in; by default that of the weights
tasks:
"""
UNNAMED = re.compile(r"LABEL_\d+")  # the name that transformers gives to a class without one
MAX_LABELS = 1000
USUAL = {
    "image": ("image", "images", "img", "pixel_values"),
    "text": ("text", "sentence", "sentence1", "premise", "question", "input"),
    "target": ("target", "targets", "label", "output", "answer", "labels"),
    "label": ("label", "labels", "target", "class", "score"),
}
"""Usual names of columns, by their content."""
FOLDERS = ("test", "data", "validation", ".")


def starter_spec(bundle: Bundle, folder: Path, plan_path: Path | None = None) -> str:
    """Write the text of a starter spec. folder: where the spec will be.

    plan_path: the bundle's plan, which knows its sources; by default a plan.json beside the bundle or in the current
    folder, if the bundle was made from it. Raises UsageError for another one.
    """
    sources = _sources(bundle, folder, plan_path)
    base = f"base: {_quoted(sources[''])}" if "" in sources else "# base: path/of/the/base"
    return HEAD.replace("{base}", base) + "".join(_task(bundle, task, folder, sources) for task in bundle.tasks)


def _sources(bundle: Bundle, folder: Path, plan_path: Path | None) -> dict[str, str]:
    """Map each task to its source as the spec names it, and the empty name to the base; empty without the plan."""
    beside = [bundle.path.absolute().parent / "plan.json", Path("plan.json").absolute()]
    for path in [plan_path] if plan_path is not None else [path for path in beside if path.is_file()]:
        try:
            plan = load_plan(path)
        except FlexmergeError:
            if plan_path is not None:
                raise
            continue
        if plan.sha256 != bundle.manifest.plan:
            if plan_path is not None:
                raise UsageError(f"the bundle was not made from {plan_path}", hint="give its own plan, or none")
            continue
        start = path.absolute().parent
        named = {"": plan.base.source} | {task.name: task.source for task in plan.readers}
        return {
            name: source if is_remote(source) else Path(os.path.relpath(start / source, folder)).as_posix()
            for name, source in named.items()
        }
    return {}


def is_starter_spec(path: Path) -> bool:
    """Return whether a file begins like a starter spec, so that --init may replace it with --force."""
    return has_start(path, HEAD.partition(":")[0].encode())


def _task(bundle: Bundle, task: str, folder: Path, sources: Mapping[str, str]) -> str:
    side = bundle.config_folder(task)
    lines = [f"kind: {_kind(side)}", *_keys(side, task, folder)]
    source = sources.get(task, bundle.manifest.tasks[task].source)
    # Without the plan, it is not known what a path is relative to.
    is_known = task in sources or is_remote(source)
    lines.append(f"{'' if is_known else '# '}checkpoint: {_quoted(source)}  # the fine-tuned model")
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
    """Return the spec's keys for the kind."""
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
    names_found = _column_names(folder / found) if found else ()
    if kind == "image-classification":
        return [*lines, _columns({"image": "images", "label": "labels"}, names_found), labels]
    if kind == "zero-shot-image-classification":
        of_classes = labels if named else "labels: [cat, dog]  # names of the classes, in their order"
        return [
            *lines, of_classes, '# templates: ["a photo of a {}."]',
            "text_model: path/of/the/base  # a whole CLIP model; by default `base`",
        ]  # fmt: skip
    if kind == "text-classification":
        return [*lines, _columns({"text": "text", "label": "label"}, names_found, "pair: the second text's"), labels]
    if kind == "regression":
        columns = _columns({"text": "text", "label": "label"}, names_found, "pair: the second text's")
        return [*lines, columns, "metric: [spearman, pearson]"]
    if kind == "causal-lm":
        more = "for multiple choice {context: …, choices: …, label: …}"
        return [*lines, _columns({"text": "text"}, names_found, more)]
    return [
        *lines, _template(names_found), _columns({"target": "label"}, names_found),
        "# labels: [negative, positive]  # of classes",
        "metric: exact_match  # with labels: accuracy, f1; for numbers: spearman",
    ]  # fmt: skip


def _column_names(path: Path) -> tuple[str, ...]:
    """Return the columns of a file of data; none if it cannot be read."""
    try:
        return tuple(open_source(path, guess_format(path) or "", None).names)
    except FlexmergeError:
        return ()


def _columns(usual: Mapping[str, str], names: Sequence[str], comment: str = "") -> str:
    """Write `columns:` with the columns that the data have. usual: maps each role to a name, if the data are
    unknown."""
    found = {
        role: next((name for name in (default, *USUAL[role]) if name in names), default)
        for role, default in usual.items()
    }
    missing = bool(names) and not set(found.values()) <= set(names)
    comments = [f"the data have {', '.join(names)}"] * missing + [comment] * bool(comment)
    pairs = ", ".join(f"{role}: {_quoted(name)}" for role, name in found.items())
    return f"columns: {{{pairs}}}" + (f"  # {'; '.join(comments)}" if comments else "")


def _template(names: Sequence[str]) -> str:
    column = next((name for name in USUAL["text"] if name in names), "text")
    return f"template: {json.dumps('{' + column + '}')}"


def _data(task: str, folder: Path) -> str | None:
    """Find a file near the spec that is named after the task; None if there is none."""
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
