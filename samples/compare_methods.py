"""Every method at several sizes on the digits sample: mean accuracy over its tasks in percent, as markdown or JSON.

    python samples/compare_methods.py [--family samples/digits] [--json] [--processes 2]

Needs the `eval` extra; some five minutes on two cores. Methods run with their defaults, without data, so none is tuned.
Sizes are of tensor data, in models; 1x is every merge, and a little more for the heads, which are each task's own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from flexmerge_cli import load_plan, make_plan, merge
from flexmerge_cli.allocation.clusters import Cluster
from flexmerge_cli.allocation.plan_file import save_plan
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.errors import GateError
from flexmerge_cli.evaluation.evaluate import evaluate
from flexmerge_cli.evaluation.spec import TaskSpec, read_spec
from flexmerge_cli.methods.coded import declare
from flexmerge_cli.methods.registry import all_methods, parse_call
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.plan import OrderSettings, replan

SIZES = ("1x", "1.5x", "2x", "3x", "4x")
SMALLEST = None
MEAN_AT_8_BITS = "gain=norm,centre=average,centre_bits=8,scales=bfloat16,clip=search"
LOW_BIT = {
    "mean + 2 bits per task": "low_bit:bits=2",
    "mean at 8 bits + 2 bits per task": f"low_bit:bits=2,{MEAN_AT_8_BITS}",
    "mean at 8 bits + 1 bit per task": f"low_bit:bits=1,{MEAN_AT_8_BITS}",
}
BLOCK_MERGING = ("task_arithmetic", "average")  # FlexMerge's, set beside low_bit
BASELINES = {"task_arithmetic, --cluster channels": "channels", "task_arithmetic, whole models clustered": "models"}

Row = dict[str, Any]  # size asked for; factor, bytes, accuracy and accuracies got, or null where it is not reached


class Scorer:
    """Makes bundles of one family and scores them. One a process; a task is scored again only if its weights differ."""

    def __init__(self, folder: Path, spec: Path) -> None:
        self.folder, self.spec_path = folder, spec
        self.known: dict[tuple[str, str], float] = {}

    def row(self, method: str | None, size: str | None, *, plan: str = "plan.json", **options: Any) -> Row:
        bundle_path = self.folder / f"bundle-{os.getpid()}"
        try:
            merge(self.folder / plan, bundle_path, method=method, size=size, force=True, **options)
        except GateError:
            return {"size": size, "factor": None, "bytes": None, "accuracy": None, "accuracies": None}
        accuracies = self.score(Bundle.open(bundle_path))
        manifest = Bundle.open(bundle_path).manifest
        return {
            "size": size,
            "factor": manifest.stored_bytes / manifest.one_model_bytes,
            "bytes": manifest.stored_bytes,
            "accuracy": sum(accuracies.values()) / len(accuracies),
            "accuracies": accuracies,
        }

    def score(self, bundle: Bundle) -> dict[str, float]:
        """Percent, by task."""
        spec = read_spec(self.spec_path, bundle.tasks)
        weights = {
            task: json.dumps([tensor.digests.get(task) for tensor in bundle.manifest.tensors]) for task in spec.tasks
        }
        changed = {
            task: TaskSpec(kind=one.kind, data=one.data, limit=one.limit)  # without the fine-tuned model beside it
            for task, one in spec.tasks.items()
            if (task, weights[task]) not in self.known
        }
        if changed:
            found = evaluate(bundle, spec.model_copy(update={"tasks": changed}))["tasks"]
            self.known |= {(task, weights[task]): 100 * found[task]["merged"] for task in changed}
        return {task: self.known[task, weights[task]] for task in spec.tasks}


scorer: Scorer  # of this process


def start(folder: Path, spec: Path) -> None:
    global scorer
    scorer = Scorer(folder, spec)
    torch.set_num_threads(1)  # the processes share the cores


def rows_of(name: str) -> list[Row]:
    """All of one line of the tables."""
    if name == "fine-tuned":
        return [scorer.row(None, None)]
    if name in LOW_BIT:
        coded = scorer.row(LOW_BIT[name], SMALLEST)
        return [coded, *(scorer.row(method, f"{coded['factor']:.6f}x") for method in BLOCK_MERGING)]
    if name in BASELINES:
        whole = [size for size in SIZES if "." not in size]
        if BASELINES[name] == "channels":
            return [scorer.row("task_arithmetic", size, cluster=Cluster.CHANNELS) for size in whole]
        merges = len(load_plan(scorer.folder / "models.json").order)
        counts = {size: merges + 1 - int(size[:-1]) for size in whole}
        found = [scorer.row("task_arithmetic", None, merges=n, plan="models.json") for n in counts.values()]
        return [row | {"size": size} for row, size in zip(found, whole)]
    return [scorer.row(name, size) for size in (*SIZES, *([SMALLEST] if is_per_task(name) else []))]


def is_per_task(method: str) -> bool:
    """Whether it stores something of each task beside what a group shares."""
    call = parse_call(method)
    return call.method.masked or declare(call) is not None


def compare(family: Path, processes: int) -> dict[str, list[Row]]:
    names = ["fine-tuned", *LOW_BIT, *BASELINES, *sorted(all_methods(), key=is_per_task)]
    found, started = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = {path.name: path for path in sorted((family / "tasks").iterdir())}
        plan = make_plan(family / "base", tasks, output=folder / "plan.json")
        save_plan(replan(plan, OrderSettings(blocks="model", linkage=Linkage.AVERAGE)), folder / "models.json")
        setting = {"mp_context": get_context("spawn"), "initializer": start}
        with ProcessPoolExecutor(processes, **setting, initargs=(folder, family / "eval.yaml")) as pool:
            for name, rows in zip(names, pool.map(rows_of, names)):
                found[name] = rows
                print(f"{time.monotonic() - started:6.0f} s  {name}", file=sys.stderr)
    return found


def show(found: dict[str, list[Row]]) -> None:
    """Two tables in markdown."""

    def cell(row: Row, with_size: bool = False) -> str:
        if row["accuracy"] is None:
            return "–"
        return f"{row['accuracy']:.1f}" + (f" at {row['factor']:.2f}x" if with_size else "")

    def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
        for line in (head := list(head), ["---"] * len(head), *lines):
            print(f"| {' | '.join(line)} |")

    (fine_tuned,) = found["fine-tuned"]
    print(f"Fine-tuned models: {cell(fine_tuned, with_size=True)}\n")
    lines = []
    for name in [*(name for name in found if name in all_methods()), *BASELINES]:
        at = {row["size"]: row for row in found[name]}
        cells = [cell(at[size]) if size in at else "" for size in SIZES]
        lines.append([name, *cells, cell(at[SMALLEST], with_size=True) if SMALLEST in at else ""])
    table(["method", *SIZES, "smallest"], lines)
    print()
    beside = ([name, *(cell(row, with_size=True) for row in found[name])] for name in LOW_BIT)
    table(["low_bit", "is", *(f"{method} at the same bytes" for method in BLOCK_MERGING)], beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, default=Path(__file__).parent / "digits")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    found = compare(given.family, given.processes)
    print(json.dumps(found, indent=2)) if given.json else show(found)


if __name__ == "__main__":
    main()
