"""Every method at several sizes on the digits sample: mean accuracy over its tasks in percent, as markdown or JSON.

    python samples/compare_methods.py [--family samples/digits] [--json]

Needs the `eval` extra; four minutes on two free cores. Methods run with their defaults: nothing is tuned to the data.
Methods that need data are in compare_data.py.
Sizes are of tensor data, in models; 1x is every merge, and a little more for the heads, which are each task's own.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from family import arguments, plan_of

from flexmerge_cli import load_plan, merge
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.evaluate import evaluate
from flexmerge_cli.evaluation.models import bundle_model
from flexmerge_cli.evaluation.spec import read_spec
from flexmerge_cli.formats.plan_file import save_plan
from flexmerge_cli.methods.aliases import PRESETS
from flexmerge_cli.methods.registry import all_methods
from flexmerge_cli.methods.use import parse_use
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.planning.make import replan
from flexmerge_cli.request.plan import OrderSettings

SIZES = ("1x", "1.5x", "2x", "3x", "4x")
SMALLEST = None
LOW_BIT = {"low_bit:bits=2": "low_bit:bits=2", **PRESETS}
BLOCK_MERGING = ("task_arithmetic", "average", "tsv_m")  # set beside low_bit
CHANNELS, MODELS = "task_arithmetic, channels clustered", "task_arithmetic, whole models clustered"
Row = dict[str, Any]  # `size` asked for; `factor`, `accuracy`, `accuracies` got; accuracy None where nothing was


class Scorer:
    """Makes bundles of one family and scores them. A task is scored again only if its weights differ."""

    def __init__(self, folder: Path, spec: Path) -> None:
        self.folder, self.spec = folder, spec
        self.known: dict[tuple[str, str], float] = {}

    def row(self, method: str | None, size: str | None, *, plan: str = "plan.json", **options: Any) -> Row:
        path = self.folder / f"bundle-{os.getpid()}"
        try:
            merge(self.folder / plan, path, method=method, size=size, force=True, **options)
        except GateError:
            return {"size": size, "accuracy": None}
        bundle = Bundle.open(path)
        found, factor = self.score(bundle), bundle.manifest.stored_bytes / bundle.manifest.one_model_bytes
        return {"size": size, "factor": factor, "accuracy": sum(found.values()) / len(found), "accuracies": found}

    def models(self, method: str, count: int) -> Row:
        """Whole models clustered. By merges, since beside `count` bodies the heads of all tasks do not fit."""
        merges = len(load_plan(self.folder / "models.json").tasks) - count
        return self.row(method, None, plan="models.json", merges=merges) | {"size": f"{count}x"}

    def score(self, bundle: Bundle) -> dict[str, float]:
        """Percent, by task."""
        spec = read_spec(self.spec, bundle.tasks)
        keys = {task: (task, bundle_model(bundle, task).digest) for task in spec.tasks}
        new = [task for task, key in keys.items() if key not in self.known]
        if new:  # without the fine-tuned models, which have a line of their own
            changed = {task: spec.tasks[task].model_copy(update={"checkpoint": None}) for task in new}
            scores = evaluate(bundle, spec.model_copy(update={"tasks": changed}))["tasks"]
            self.known |= {keys[task]: 100 * scores[task]["merged"] for task in changed}
        return {task: self.known[key] for task, key in keys.items()}


scorer: Scorer  # of this process


def start(folder: Path, spec: Path) -> None:
    global scorer
    scorer = Scorer(folder, spec)
    torch.set_num_threads(1)  # the processes share the cores


def rows_of(name: str) -> list[Row]:
    """One line of a table."""
    whole = [size for size in SIZES if "." not in size]
    if name == "fine-tuned":
        return [scorer.row(None, None)]
    if name in LOW_BIT:
        coded = scorer.row(LOW_BIT[name], SMALLEST)
        return [coded, *(scorer.row(method, f"{coded['factor']:.6f}x") for method in BLOCK_MERGING)]
    if name == CHANNELS:
        return [scorer.row("task_arithmetic", size, cluster="channels") for size in whole]
    if name == MODELS:
        return [scorer.models("task_arithmetic", int(size[:-1])) for size in whole]
    return [scorer.row(name, size) for size in (*SIZES, *([SMALLEST] if parse_use(name).stores_per_task else []))]


def compare(family: Path) -> dict[str, list[Row]]:
    names = [
        "fine-tuned",
        *LOW_BIT,
        *sorted(
            (name for name, method in all_methods().items() if not method.reads),
            key=lambda name: parse_use(name).stores_per_task,
        ),
        CHANNELS,
        MODELS,
    ]
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = plan_of(family, folder)
        save_plan(replan(plan, OrderSettings(blocks="model", linkage=Linkage.AVERAGE)), folder / "models.json")
        with ProcessPoolExecutor(None, get_context("spawn"), start, (folder, family / "eval.yaml")) as pool:
            for name, rows in zip(names, pool.map(rows_of, names)):
                found[name] = rows
                print(f"{len(found)} of {len(names)}: {name}", file=sys.stderr)
    return found


def show(found: dict[str, list[Row]]) -> None:
    """Two tables in markdown."""

    def told(row: Row, with_size: bool = True) -> str:
        return "–" if row["accuracy"] is None else f"{row['accuracy']:.1f}" + f" at {row['factor']:.2f}x" * with_size

    print(f"Fine-tuned models: {told(found['fine-tuned'][0])}\n")
    print(f"| method | {' | '.join(SIZES)} | smallest |\n|{' --- |' * (len(SIZES) + 2)}")
    for name in (name for name in found if name not in ("fine-tuned", *LOW_BIT)):
        at = {row["size"]: row for row in found[name]}
        cells = [told(at[size], with_size=size is SMALLEST) if size in at else "" for size in (*SIZES, SMALLEST)]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n| `low_bit` | | {' | '.join(f'{m} at the same bytes' for m in BLOCK_MERGING)} |\n|{' --- |' * 5}")
    for name in LOW_BIT:
        print(f"| {name} | {' | '.join(map(told, found[name]))} |")


def main() -> None:
    given = arguments(__doc__, picture=False)
    found = compare(given.family)
    print(json.dumps(found, indent=2)) if given.json else show(found)


if __name__ == "__main__":
    main()
