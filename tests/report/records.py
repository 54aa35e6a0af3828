"""Documents of curves without a model behind them: any number of methods and tasks, in the form of `curve --json`."""

import math
from typing import Any

SIZES = ("1x", "1.5x", "2x", "3x", "4x", "6x", "8x")
ONE = 1_234_567


def record(
    num_methods: int = 4, num_tasks: int = 3, *, sizes: tuple[str, ...] = SIZES, name: str = "method"
) -> dict[str, Any]:
    tasks = [f"task{number}" for number in range(num_tasks)]
    references = {task: _reference(0.95 - 0.03 * number) for number, task in enumerate(tasks)}
    points = []
    for method in range(num_methods):
        reached = sizes[method % 3 :]
        for size in reached:
            factor = float(size[:-1]) + 0.003 * method
            part = 1 - (0.5 - 0.45 * method / num_methods) / factor
            points.append(_point(f"{name}{method}:bits={method}", [size], factor, part, references))
    alternatives = [
        _point(f"copies as {bits}", [], factor, 1.0, references)
        for bits, factor in (("fp32", 8.0), ("bf16", 4.0), ("int8 per row", 2.05))
    ]
    return {
        "format": "flexmerge.eval/1",
        "plan": "ab" * 32,
        "one_model_bytes": ONE,
        "num_models": 8,
        "tasks": references,
        "mean": {
            "merged": None,
            "fine_tuned": sum(found["fine_tuned"] for found in references.values()) / num_tasks,
            "base": 0.31,
            "normalised": None,
        },
        "points": points,
        "alternatives": alternatives,
        "unreached": [{"method": f"{name}1:bits=1", "size": "1x", "message": "too small"}],
        "evaluations": {"asked": 100, "computed": 60, "repeated": 30, "cached": 10},
        "order": [
            {"block": f"layer.{layer}.{kind}", "position": (layer * 3 + place) / 36, "similarity": 0.5}
            for layer in range(12)
            for place, kind in enumerate(("attention", "mlp", "norm1"))
        ],
        "data_dependent": None,
    }


def difference() -> dict[str, Any]:
    """Make what diff_value makes of two bundles: a block has other groups, a task other values, and one is new."""
    layer = "vision_model.encoder.layers.11.self_attn"

    def groups(*tasks: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{"tasks": list(of), "method": "ties:K=0.1" if len(of) > 1 else None, "bits": None} for of in tasks]

    return {
        "kind": "bundle",
        "a": {"source": "bundle/", "id": "0" * 64, "generator": "flexmerge 1.0", "tasks": 2},
        "b": {"source": "hf://org/a-bundle-with-a-long-name", "id": "1" * 64, "generator": "flexmerge 1.0", "tasks": 3},
        "equal": False,
        "keys": ["files", "tasks", "units"],
        "settings": {
            "stored_bytes": [ONE, 3 * ONE],
            "methods": [["ties:K=0.1"], ["ties:K=0.1", "average"]],
            "command": ["flexmerge merge plan.json --method ties:K=0.1 --size 1x -o bundle/", None],
        },
        "tasks": {"only_a": [], "only_b": ["sst2"], "changed": {"cola": {"distance": [0.25, 0.5]}}},
        "blocks": {layer: [groups(("cola", "mnli")), groups(("cola",), ("mnli", "sst2"))]},
        "values": {"cola": {"tensors": [f"{layer}.q_proj.weight"], "bytes": ONE, "of": 12, "files": ["config.json"]}},
    }


def scores(num_tasks: int = 3, *, name: str = "task", metrics: tuple[str, ...] = ("accuracy",)) -> dict[str, Any]:
    """Make the record of a bundle that `eval BUNDLE` has; metrics: of the tasks in turn."""
    tasks = {
        f"{name}{number}": _scored(0.9 - 0.03 * number, metrics[number % len(metrics)]) for number in range(num_tasks)
    }
    return {
        "format": "flexmerge.eval/1",
        "tasks": tasks,
        "mean": {
            who: sum(found[who] for found in tasks.values()) / num_tasks
            for who in ("merged", "fine_tuned", "base", "normalised")
        },
        "evaluations": {"computed": 3 * num_tasks, "repeated": 0, "cached": 0},
        "bundle": "cd" * 32, "methods": ["average"], "num_models": num_tasks + 1, "one_model_bytes": ONE,
        "stored_bytes": 2 * ONE, "total_bytes": 2 * ONE + 20_000, "factor": 2.0,
    }  # fmt: skip


def _scored(value: float, metric: str) -> dict[str, Any]:
    values = {"merged": value, "fine_tuned": value + 0.05, "base": 0.31}

    def number(metric: str, value: float) -> dict[str, Any]:
        return {
            "metric": metric, "value": value, "interval": [value - 0.02, value + 0.01], "n": 697, "split": "test",
            "weights": "0" * 32, "bytes": ONE, "notes": [], "others": [],
        }  # fmt: skip

    found: dict[str, Any] = {
        "kind": "text-classification", "metric": metric, "higher_is_better": True, "n": 697, "route_bytes": ONE,
        "normalised": value / (value + 0.05),
        "scores": {
            who: number(metric, one) | {"others": [number("f1", one - 0.1)], "notes": ["3 of 697 outputs are no label"]}
            for who, one in values.items()
        },
    }  # fmt: skip
    for who, one in values.items():
        found |= {who: one, f"{who}_interval": [one - 0.02, one + 0.01]}
    return found


def _reference(value: float) -> dict[str, Any]:
    return {
        "kind": "image-classification", "metric": "accuracy", "higher_is_better": True, "n": 697,
        "merged": None, "merged_interval": None, "normalised": None, "route_bytes": None,
        "fine_tuned": value, "fine_tuned_interval": [value - 0.02, value + 0.01],
        "base": 0.31, "base_interval": [0.28, 0.34],
        "scores": {"fine_tuned": {"split": "test"}, "base": {"split": "test"}},
    }  # fmt: skip


def _point(method: str, sizes: list[str], factor: float, part: float, references: dict[str, Any]) -> dict[str, Any]:
    tasks = {}
    for number, (task, reference) in enumerate(references.items()):
        kept = max(0.1, part - 0.02 * number * math.log2(16 / factor) / 4)
        value = reference["fine_tuned"] * kept
        tasks[task] = {
            "value": value, "interval": [value - 0.03, value + 0.02], "normalised": kept, "weights": "0" * 32,
            "notes": [],
        }  # fmt: skip
    mean = sum(found["value"] for found in tasks.values()) / len(tasks)
    return {
        "method": method, "sizes": sizes, "bytes": int(factor * ONE), "total_bytes": int(factor * ONE) + 20_000,
        "factor": factor, "merges": 3, "undone": 1, "command": f"flexmerge merge plan.json --method '{method}'",
        "tasks": tasks,
        "mean": {
            "value": mean, "interval": [mean - 0.015, mean + 0.012],
            "normalised": sum(found["normalised"] for found in tasks.values()) / len(tasks),
        },
    }  # fmt: skip
