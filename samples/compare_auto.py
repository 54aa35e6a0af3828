"""`auto` beside uniform plans and block merging at the same bytes, on one family: markdown, and a picture.

    python samples/compare_auto.py [--family samples/digits] [--method M ...] [--picture FILE.png] [--json]
    python samples/compare_auto.py --calibration FOLDER [--calibration FOLDER ...] [--family samples/digits] [--json]

Needs the `eval` extra; minutes. Eight sizes of tensor data, from the smallest that `auto` reaches to four models, in
equal ratios. A uniform plan c + b has the average of all tasks in c bits and residuals of b bits; where it is smaller
than a size, merges are undone until the size is used up. `--method` replaces what `auto` is compared with: any method,
or a uniform plan such as "4 + 1".

With `--calibration`, `auto` with a calibration is compared with `auto` from the plan alone, at the same sizes and at
4/3 of them, and with `auto` with further calibrations, at five sizes up to one model.

Accuracy is in percent of the fine-tuned models'. Differences have the 95 % interval of the paired bootstrap, the same
examples drawn for both. *Best* is the best of all other methods, chosen anew at each size by its accuracy on these very
examples, which nobody without labels can do. The hypervolume is the area under the accuracy of the worst task over the
size, where the best so far counts; that of the others has the best of them at each size.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from family import arguments, plan_of

from flexmerge_cli.allocation.auto_allocation import auto, smallest_factor
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.evaluation.drawing import draw as scored
from flexmerge_cli.evaluation.spec import read_spec
from flexmerge_cli.request.auto_options import Limits
from flexmerge_cli.request.curve import CurveRequest, curve_methods
from flexmerge_cli.request.size import parse_sizes

NUM_SIZES, LARGEST = 8, 4.0
NUM_SIZES_CALIBRATED = 5
LARGER = 4 / 3  # a target is the accuracy of the plan alone at three quarters of its bytes
UNIFORM = {
    f"{centre} + {bits}": f"low_bit:bits={bits},gain={'norm' if bits < 3 else 'none'},centre=average,"
    f"centre_bits={centre},scales=bfloat16,clip=search"
    for centre, bits in ((3, 1), (4, 1), (8, 1), (4, 2), (8, 2), (4, 3))
} | {f"4 + {bits:g}": f"sign_runs:run={run},centre_bits=4" for run, bits in ((16, 0.3125), (8, 0.5), (4, 0.75))}
BLOCK_MERGING = ("average", "task_arithmetic", "ties", "tsv_m")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c564b", "#555555")
DRAWS = 2000

Hits = dict[str, np.ndarray]
"""Maps each task to whether each example's most likely class is its label, [n]."""


def compare(family: Path, others: dict[str, str]) -> dict[str, Any]:
    """Score all methods at all sizes. others: label -> method."""
    with tempfile.TemporaryDirectory() as temporary:
        plan = plan_of(family, Path(temporary))
        smallest = smallest_factor(auto(Pricer(plan), Limits()).smallest().layout)
        sizes = [f"{size:.4f}x" for size in np.geomspace(smallest, LARGEST, NUM_SIZES)]
        names = {"auto": "auto", **others}
        request = CurveRequest(
            methods=curve_methods(list(names.values()), has_statistics=True),
            sizes=parse_sizes(",".join(sizes)),
            alternatives=False,
        )
        spec = read_spec(family / "eval.yaml", plan.task_names)
        curve = scored(plan, Path(temporary) / "plan.json", spec, request)
    at = {(point.method, size): point for point in curve.points for size in point.sizes}
    tuned = {task: np.asarray(found.outcomes, float) for task, found in curve.fine_tuned.items()}
    rows: dict[str, dict[str, Any]] = {}
    for size in sizes:
        points = {label: at[name, size] for label, name in names.items() if (name, size) in at}
        hits = {label: hits_of(point.scores) for label, point in points.items()}
        rows[size] = {
            label: measures(of_method, hits["auto"], tuned)
            | {"size": points[label].tensor_bytes / plan.one_model_bytes}
            for label, of_method in hits.items()
        }
    return {"fine_tuned": {task: 100 * float(hit.mean()) for task, hit in tuned.items()}, "sizes": rows}


def compare_calibrated(family: Path, calibrations: list[Path]) -> dict[str, Any]:
    """Score `auto` with each calibration and without. The first calibration is what the others are compared with."""
    with tempfile.TemporaryDirectory() as temporary:
        plan = plan_of(family, Path(temporary))
        smallest = smallest_factor(auto(Pricer(plan), Limits()).smallest().layout)
        ladder, steps = sizes_by_quarters(smallest)
        sizes = ladder[:NUM_SIZES_CALIBRATED]
        spec = read_spec(family / "eval.yaml", plan.task_names)

        def hits(asked: list[str], calibration: Path | None) -> list[Hits]:
            where = str(calibration) if calibration is not None else None
            methods = curve_methods("auto", has_statistics=True, calibration=where)
            request = CurveRequest(methods=methods, sizes=parse_sizes(",".join(asked)), alternatives=False)
            curve = scored(plan, Path(temporary) / "plan.json", spec, request)
            tuned.update({task: np.asarray(found.outcomes, float) for task, found in curve.fine_tuned.items()})
            points = {size: hits_of(point.scores) for point in curve.points for size in point.sizes}
            return [points[size] for size in asked]

        tuned: Hits = {}
        found = {
            f"auto, {folder.name}" if place else "auto": hits(sizes, folder)
            for place, folder in enumerate(calibrations)
        }
        of_plan = hits(ladder, None)
    found |= {"plan alone": of_plan[: len(sizes)], "plan alone, 4/3 of the size": of_plan[steps:]}
    rows = {
        size: {label: measures(each[place], found["auto"][place], tuned) for label, each in found.items()}
        for place, size in enumerate(sizes)
    }
    return {"fine_tuned": {task: 100 * float(hit.mean()) for task, hit in tuned.items()}, "sizes": rows}


def sizes_by_quarters(smallest: float) -> tuple[list[str], int]:
    """Return five sizes up to one model in equal ratios and as many larger ones, so that each size times 4/3 is among
    them; and by how many places it is later."""
    steps = next(n for n in range(1, 100) if LARGER ** (-(NUM_SIZES_CALIBRATED - 1) / n) >= smallest)
    return [f"{LARGER ** (place / steps):.4f}x" for place in range(1 - NUM_SIZES_CALIBRATED, steps + 1)], steps


def hits_of(scores: Any) -> Hits:
    return {task: np.asarray(found.outcomes, float) for task, found in scores.items()}


def measures(hits: Hits, of_auto: Hits, tuned: Hits) -> dict[str, Any]:
    """Accuracy per task, of the fine-tuned model's, and by how much `auto` is better on the same examples."""
    random = np.random.default_rng(0)
    differences = np.zeros(DRAWS)
    for task, of_tuned in tuned.items():
        drawn = random.integers(0, len(of_tuned), (DRAWS, len(of_tuned)))
        gained = of_auto[task] - hits[task]
        differences += 100 * gained[drawn].mean(1) / np.maximum(of_tuned[drawn].mean(1), 1e-9) / len(tuned)
    each = {task: 100 * float(hits[task].mean() / tuned[task].mean()) for task in tuned}
    difference = np.mean([100 * (of_auto[task].mean() - hits[task].mean()) / tuned[task].mean() for task in tuned])
    low, high = np.quantile(differences, (0.025, 0.975))
    better = {"difference": float(difference), "low": float(low), "high": float(high)}
    return {"mean": float(np.mean(list(each.values()))), "worst": min(each.values()), "tasks": each, "better": better}


def best(row: dict[str, Any], measure: str) -> str | None:
    """The method other than `auto` that is best by the `mean` or the `worst` task."""
    return max((label for label in row if label != "auto"), key=lambda label: row[label][measure], default=None)


def hypervolume(found: dict[str, Any], worst: list[float]) -> float:
    """The area under the best accuracy of a worst task so far, over the sizes."""
    sizes = np.array([float(size.rstrip("x")) for size in found["sizes"]])
    return float((np.maximum.accumulate(worst)[:-1] * np.diff(sizes)).sum())


def show(found: dict[str, Any]) -> None:
    rows = found["sizes"]
    print("| size | `auto`: mean (worst task) | best mean | `auto` is better by | best worst task |\n|" + " --- |" * 5)
    of_auto, of_best = [], []
    for size, row in rows.items():
        mean, worst = best(row, "mean"), best(row, "worst")
        of_auto.append(row["auto"]["worst"])
        of_best.append(row[worst]["worst"] if worst else 0.0)
        told = ["–", "", "–"]
        if mean and worst:
            told = [f"{row[mean]['mean']:.1f}, {mean}", gain(row[mean]), f"{row[worst]['worst']:.1f}, {worst}"]
        print(f"| {shown(size)} | {row['auto']['mean']:.1f} ({row['auto']['worst']:.1f}) | {' | '.join(told)} |")
    volumes = hypervolume(found, of_auto), hypervolume(found, of_best)
    print(f"\nHypervolume of `auto`, of the best single method's: {volumes[0] / max(volumes[1], 1e-9):.3f}\n")
    show_sizes(found)


def show_sizes(found: dict[str, Any]) -> None:
    """The accuracy of every method at every size, and by how much `auto` is better."""
    rows = found["sizes"]
    print(f"| | {' | '.join(map(shown, rows))} |\n|{' --- |' * (len(rows) + 1)}")
    for label in dict.fromkeys(label for row in rows.values() for label in row):
        cells = [told_of(row[label], label) if label in row else "–" for row in rows.values()]
        print(f"| {label} | {' | '.join(cells)} |")


def shown(size: str) -> str:
    return f"{float(size.rstrip('x')):.2f}x"


def gain(cell: dict[str, Any]) -> str:
    better = cell["better"]
    return f"{better['difference']:+.1f} [{better['low']:+.1f}, {better['high']:+.1f}]"


def told_of(cell: dict[str, Any], label: str) -> str:
    return f"{cell['mean']:.1f}" if label == "auto" else f"{cell['mean']:.1f}: {gain(cell)}"


def draw(found: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    names = ("auto", "4 + 0.5", "4 + 1", "4 + 2", "8 + 2", "tsv_m", "average", "task_arithmetic")
    for name, colour, mark in zip(names, COLOURS, "osD^v*xP"):
        rows = [results[name] for results in found["sizes"].values() if name in results]
        size, mean = [row["size"] for row in rows], [row["mean"] for row in rows]
        axes.plot(size, mean, color=colour, marker=mark, markersize=5, linewidth=2 if name == "auto" else 1, label=name)
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("size in models, tensor data")
    axes.set_ylabel("accuracy, % of the fine-tuned models'")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    given = arguments(__doc__, methods=True, calibrations=True)
    if given.calibration:
        found = compare_calibrated(given.family, given.calibration)
        print(json.dumps(found, indent=2)) if given.json else show_sizes(found)
        return
    known = UNIFORM | {name: name for name in BLOCK_MERGING}
    others = {name: known.get(name, name) for name in given.method} or known
    found = compare(given.family, others)
    print(json.dumps(found, indent=2)) if given.json else show(found)
    if given.picture:
        draw(found, given.picture)


if __name__ == "__main__":
    main()
