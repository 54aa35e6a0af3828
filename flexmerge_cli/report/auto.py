"""Shows, before anything is written, what `--method auto` and `--servable` chose, and what they predict."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flexmerge_cli.allocation.auto import Solution
from flexmerge_cli.allocation.auto_allocation import AutoFound, AutoSearch
from flexmerge_cli.allocation.auto_centres import CentreBits
from flexmerge_cli.allocation.auto_table import TensorChoice
from flexmerge_cli.allocation.servable import ServableAllocation
from flexmerge_cli.report.table import say, table

UNIFORM: tuple[tuple[CentreBits, int], ...] = ((3, 1), (4, 1), (8, 1), (4, 2), (8, 2), (4, 3), (8, 3), (8, 4))
"""Pairs (bits of the mean, bits of each task)."""


# Squared errors of models with outliers are predicted up to 12 times too low (95 %), distances by the root of that.
MOST_TIMES = 4
LEAST_DISTANCE = 0.01


def auto_summary(auto: AutoSearch, found: AutoFound) -> dict[str, Any]:
    """Return the value for --json. damage is Σ w·P over the searched tensors, which ranks plans of one family."""
    solution, search, one = found.solution, auto.search, max(1, auto.plan.one_model_bytes)
    fixed = auto.fixed_bytes
    uniform = []
    for centre_bits, bits in UNIFORM:
        num_bytes, cost = search.uniform(centre_bits=centre_bits, bits=bits)
        if num_bytes <= solution.num_bytes:
            uniform.append(
                {
                    "centre_bits": centre_bits,
                    "bits": bits,
                    "factor": (num_bytes + fixed) / one,
                    "damage": cost,
                }
            )
    most = sum(int(table.num_bytes[-1]) for table in search.tables)
    twice = search.solve(max(search.smallest_bytes, min(most, 2 * found.layout.tensor_bytes - fixed)))
    return {
        "factor": found.layout.tensor_bytes / one,
        "smallest_factor": (search.smallest_bytes + fixed) / one,
        "searched_bytes": solution.num_bytes,
        "damage": solution.cost,
        "distance": _distances(auto, solution),
        "kinds": _kinds(auto, solution),
        "uniform": uniform,
        "doubled": {
            "factor": (twice.num_bytes + fixed) / one,
            "damage": twice.cost,
            "distance": _distances(auto, twice),
        },
    }


def servable_summary(found: ServableAllocation) -> dict[str, Any]:
    """Return the value for --json. captured, distance: per task, at least and at most."""
    captured = dict(zip(found.layout.plan.task_names, found.captured_M.tolist()))
    return {
        "rank": found.rank,
        "factor": found.layout.tensor_bytes / max(1, found.layout.plan.one_model_bytes),
        "base_bytes": found.base_bytes,
        "adapter_bytes": found.adapter_bytes,
        "captured": captured,
        "distance": {name: max(0.0, 1 - part) ** 0.5 for name, part in captured.items()},
    }


def show_chosen(value: dict[str, Any]) -> None:
    """Print what `auto` or `--servable` chose, by its name."""
    if "auto" in value:
        show_auto(value["auto"])
    if "servable" in value:
        of = value["servable"]
        if of["captured"]:  # there are tasks beside kept adapters, which lose nothing
            table(
                ["task", "captured energy,\nat least"],
                [(name, f"{part:.1%}") for name, part in of["captured"].items()],
            )
        say(
            f"an engine serves one base of {of['base_bytes']:,} bytes and, per task, an adapter of rank {of['rank']} "
            f"with {of['adapter_bytes']:,} bytes at most"
        )


def show_auto(value: dict[str, Any]) -> None:
    """Print a table and two sentences on stdout."""
    rows = [
        (
            kind["kind"],
            kind["centres"],
            kind["tensors"],
            f"{kind['bits']:.2f}",
            f"{kind['bytes']:,}",
            f"{kind['damage_share']:.1%}",
        )
        for kind in value["kinds"]
    ]
    title = "chosen by auto; bits a weight and task, of all that is stored"
    table(["kind", "centres", "tensors", "bits", "bytes", "of predicted\ndamage"], rows, title=title, text=(1,))
    cost = value["damage"]
    for row in value["uniform"]:
        centre = f"mean in {row['centre_bits']} bits + {row['bits']} {'bit' if row['bits'] == 1 else 'bits'} per task"
        say(f"{centre}, {row['factor']:.2f}x: {_times(row['damage'], cost)} the predicted damage")
    twice = value["doubled"]
    if twice["factor"] > value["factor"]:
        say(f"twice the bytes, {twice['factor']:.2f}x: {_times(twice['damage'], cost)} the damage; {_range(twice)}")
    say(f"this size, {value['factor']:.2f}x: {_range(value)}; the smallest is {value['smallest_factor']:.4f}x")


def unlike_predicted(predicted: Mapping[str, float | None], measured: Mapping[str, float | None]) -> list[str]:
    """Warn about tasks that came out much farther off than predicted, or whose distance is undefined."""
    found = []
    for task, distance in measured.items():
        expected = predicted.get(task, 0.0)
        if distance is None:
            found.append(f"task `{task}` equals the base and is not stored exactly, so it has no distance")
        elif expected is not None and distance > MOST_TIMES * expected + LEAST_DISTANCE:
            found.append(f"task `{task}`: distance {distance:.3f}, where {expected:.3f} was predicted")
    return [f"{text}; check its accuracy, or raise --size" for text in found]


def kind_of(block: str) -> str:
    """Return the last word of a block's name: attention, mlp, layer_norm1, …"""
    words = [word for word in block.split(".") if not word.isdigit()]
    named = [word for word in words if word not in ("weight", "bias")]
    return (named or words or [block])[-1]


def _kinds(auto: AutoSearch, solution: Solution) -> list[dict[str, Any]]:
    """Return the bytes by kind of block, most first."""
    kind = {name: kind_of(block.name) for block in auto.searched for name in block.tensors}
    choices: dict[str, list[TensorChoice]] = {}
    for choice in solution.choices:
        choices.setdefault(kind[choice.tensor], []).append(choice)
    rows = []
    for name, of_kind in choices.items():
        num_bytes = sum(choice.num_bytes for choice in of_kind)
        weights = sum(auto.plan.tensor(choice.tensor).num_elements for choice in of_kind) * len(auto.plan.tasks)
        rows.append(
            {
                "kind": name,
                "tensors": len(of_kind),
                "bits": 8 * num_bytes / weights,
                "centres": _centres(of_kind),
                "bytes": num_bytes,
                "damage_share": sum(choice.cost for choice in of_kind) / solution.cost if solution.cost > 0 else 0.0,
            }
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["kind"]))


def _centres(choices: Iterable[TensorChoice]) -> str:
    """Describe the choices by frequency, most frequent first: `average 8 bits ×12, none ×3`."""
    counts: Counter[str] = Counter()
    for centre in (choice.centre for choice in choices):
        bits = "" if centre.kind == "none" else " dense" if centre.bits == "dense" else f" {centre.bits} bits"
        counts[f"{centre.kind}{bits}"] += 1
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} ×{count}" if len(counts) > 1 else name for name, count in found[:3]]
    return ", ".join(shown + ["…"] * (len(found) > 3))


def _distances(auto: AutoSearch, solution: Solution) -> dict[str, float | None]:
    """Return the predicted distance per task; null for a task that equals the base and is not stored exactly."""
    found = auto.search.distances(solution) if solution.choices else np.full(len(auto.plan.tasks), np.nan)
    return {name: None if np.isnan(x) else float(x) for name, x in zip(auto.plan.task_names, found)}


def _range(value: dict[str, Any]) -> str:
    known = [distance for distance in value["distance"].values() if distance is not None]
    return f"distance ≈ {min(known):.3f} to {max(known):.3f}" if known else "no task differs from the base"


def _times(cost: float, of: float) -> str:
    return f"{cost / of:.3g} times" if of > 0 else ("equal" if cost == 0 else "more than")
