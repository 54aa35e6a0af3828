"""`auto` beside uniform plans and block merging at the same bytes: accuracy per task, as markdown, and a picture.

    python samples/compare_auto.py [--family samples/digits] [--picture FILE.png] [--json]

Needs the `eval` extra; two minutes on two cores. Sizes are of tensor data, in models. A uniform plan c + b has the
average of all tasks in c bits and residuals of b bits; where it is smaller than a size, merges are undone until the
size is used up. In percent of the fine-tuned models' accuracy, mean over tasks; differences from `auto` with 95 %
intervals of the paired bootstrap, the same images drawn for both.
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from family import arguments, plan_of

from flexmerge_cli import load_plan, merge
from flexmerge_cli.errors import GateError

SIZES = ("smallest", "0.5x", "0.75x", "1x", "1.25x", "1.5x", "2x")
UNIFORM = {
    f"{centre} + {bits}": f"low_bit:bits={bits},gain={'norm' if bits < 3 else 'none'},centre=average,"
    f"centre_bits={centre},scales=bfloat16,clip=search"
    for centre, bits in ((3, 1), (4, 1), (8, 1), (4, 2), (8, 2), (4, 3))
} | {f"4 + {bits:g}": f"sign_runs:run={run},centre_bits=4" for run, bits in ((16, 0.3125), (8, 0.5), (4, 0.75))}
BLOCK_MERGING = ("average", "task_arithmetic", "ties", "tsv_m")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c564b", "#555555")
DRAWS = 2000

Hits = dict[str, np.ndarray]
"""Task -> whether each image's most likely class is its label, bool [n]."""


class Scorer:
    """Makes bundles of one family, and scores the models in them."""

    def __init__(self, family: Path, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.plan = load_plan(folder / "plan.json")
        self.data = {task.name: self._data(task.name) for task in self.plan.tasks}

    def fine_tuned(self) -> Hits:
        path = self.family / "tasks"
        return {task: self._hits(_model(path / task), task) for task in self.data}

    def bundle(self, method: str, size: str) -> tuple[float, Hits] | None:
        """Its size in models, and its hits; None where the method does not reach the size."""
        path = self.folder / f"bundle-{os.getpid()}"
        try:
            made = merge(self.folder / "plan.json", path, method=method, size=size, force=True)
        except GateError:
            return None
        factor = made.manifest.stored_bytes / made.manifest.one_model_bytes
        return factor, {task: self._hits(made.model(task).float(), task) for task in self.data}

    def _data(self, task: str) -> tuple[torch.Tensor, np.ndarray]:
        spec = yaml.safe_load((self.family / "eval.yaml").read_text())
        with np.load(self.family / spec["tasks"][task]["data"]) as file:
            images, labels = file["images"].astype(np.float32), file["labels"]
        how = json.loads((self.family / "tasks" / task / "preprocessor_config.json").read_text())
        pixels = (images * how["rescale_factor"] - how["image_mean"][0]) / how["image_std"][0]
        return torch.from_numpy(pixels.astype(np.float32)), labels

    def _hits(self, model: Any, task: str) -> np.ndarray:
        pixels, labels = self.data[task]
        with torch.inference_mode():
            found: np.ndarray = model(pixel_values=pixels).logits.argmax(-1).numpy() == labels
        return found


def _model(path: Path) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(path, dtype=torch.float32).eval()


scorer: Scorer  # of this process


def start(family: Path, folder: Path) -> None:
    global scorer
    torch.set_num_threads(1)  # the processes share the cores
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    scorer = Scorer(family, folder)


def score(job: tuple[str, str]) -> tuple[float, Hits] | None:
    return scorer.bundle(*job) if job[0] else (0.0, scorer.fine_tuned())


def compare(family: Path) -> dict[str, Any]:
    methods = {"auto": "auto", **UNIFORM, **{name: name for name in BLOCK_MERGING}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan_of(family, folder)
        sizes = {name: smallest(folder / "plan.json") if name == "smallest" else name for name in SIZES}
        jobs = [(method, size) for size in sizes.values() for method in methods.values()]
        with ProcessPoolExecutor(None, get_context("spawn"), start, (family, folder)) as pool:
            tuned = pool.submit(score, ("", ""))
            found = []
            for number, result in enumerate(pool.map(score, jobs)):
                found.append(result)
                print(f"{number + 1} of {len(jobs)}: {jobs[number][0]} at {jobs[number][1]}", file=sys.stderr)
            reference = tuned.result()[1]
    rows = iter(found)
    at = {size: {name: next(rows) for name in methods} for size in sizes}
    return {
        "fine_tuned": {task: float(100 * hits.mean()) for task, hits in reference.items()},
        "sizes": {
            size: {name: told(row, results["auto"], reference) for name, row in results.items() if row is not None}
            for size, results in at.items()
        },
    }


def smallest(plan: Path) -> str:
    """The size that `auto` names as its smallest."""
    from flexmerge_cli.allocation.auto_allocation import auto, smallest_factor
    from flexmerge_cli.allocation.layout import Pricer
    from flexmerge_cli.request.auto_options import Limits

    return f"{smallest_factor(auto(Pricer(load_plan(plan)), Limits()).smallest().layout):g}x"


def told(row: tuple[float, Hits], auto: tuple[float, Hits], reference: Hits) -> dict[str, Any]:
    """Accuracy per task, of the fine-tuned model's, and by how much `auto` is better on the same images."""
    factor, hits = row
    random = np.random.default_rng(0)
    differences = np.zeros(DRAWS)
    for task, of_tuned in reference.items():
        drawn = random.integers(0, len(of_tuned), (DRAWS, len(of_tuned)))
        gained = auto[1][task].astype(float) - hits[task]
        differences += 100 * gained[drawn].mean(1) / np.maximum(of_tuned[drawn].mean(1), 1e-9) / len(reference)
    each = {task: float(100 * hits[task].mean() / reference[task].mean()) for task in reference}
    mean = float(np.mean(list(each.values())))
    of_auto = np.mean([100 * auto[1][task].mean() / reference[task].mean() for task in reference])
    low, high = np.quantile(differences, (0.025, 0.975))
    better = {"difference": float(of_auto - mean), "low": float(low), "high": float(high)}
    return {"factor": factor, "mean": mean, "worst": min(each.values()), "tasks": each, "auto_better": better}


def show(found: dict[str, Any]) -> None:
    tasks = list(found["fine_tuned"])
    print(f"Fine-tuned: {', '.join(f'{task} {value:.1f}' for task, value in found['fine_tuned'].items())}")
    for results in found["sizes"].values():
        factor = results["auto"]["factor"]
        print(f"\n| at {factor:.2f}x | size | mean | `auto` is better by | {' | '.join(tasks)} |")
        print(f"|{' --- |' * (len(tasks) + 4)}")
        for name, row in results.items():
            gain = row["auto_better"]
            better = "" if name == "auto" else f"{gain['difference']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]"
            each = " | ".join(f"{row['tasks'][task]:.0f}" for task in tasks)
            print(f"| {name} | {row['factor']:.2f}x | {row['mean']:.1f} | {better} | {each} |")


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    names = ("auto", "4 + 1", "8 + 1", "4 + 2", "8 + 2", "tsv_m", "average", "task_arithmetic")
    for name, colour, mark in zip(names, COLOURS, "osD^v*xP"):
        rows = [results[name] for results in found["sizes"].values() if name in results]
        size, mean = [row["factor"] for row in rows], [row["mean"] for row in rows]
        axes.plot(size, mean, color=colour, marker=mark, markersize=5, linewidth=2 if name == "auto" else 1, label=name)
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xlabel("size in models, tensor data")
    axes.set_ylabel("accuracy, % of the fine-tuned models'")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    given = arguments(__doc__)
    found = compare(given.family)
    print(json.dumps(found, indent=2)) if given.json else show(found)
    if given.picture:
        draw(found, given.picture)


if __name__ == "__main__":
    main()
