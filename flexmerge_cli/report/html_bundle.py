"""Shows a bundle as one page: who reads what, which tasks share a block, bytes along depth, each task's distance."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.formats.manifest_records import GroupEntry, UnitEntry
from flexmerge_cli.report.html import block_name, cell_style, cells, legend, name, page, section, table, text, today
from flexmerge_cli.report.html import facts as fact_list
from flexmerge_cli.report.inspect_bundle import (
    ALONE,
    LEGEND,
    BundleFacts,
    bundle_value,
    has_bits,
    is_exact,
    letters,
    method_names,
    resident_message,
    weights_words,
)
from flexmerge_cli.report.inspect_draw import NUMBERED_TASKS
from flexmerge_cli.report.inspect_heat import Scale
from flexmerge_cli.report.inspect_spectrum import spectrum_section
from flexmerge_cli.report.text import human_bytes

TASK_CHARACTERS = 18
_Cell = tuple[str, str, str]
"""The style of a cell, empty for one without colour; what its title says after the task's name; what it shows."""


def bundle_page(facts: BundleFacts, spectrum: Sequence[dict[str, Any]] | None = None) -> str:
    """Make the whole document. spectrum: what `spectrum_value` returns, if it was requested."""
    bundle, value = facts.bundle, bundle_value(facts)
    allocation = value["allocation"]
    pairs = [
        ("size", f"{value['factor']:.4f}x"),
        ("tensors", f"{value['stored_bytes']:,} bytes"),
        ("on disk", f"{value['total_bytes']:,} bytes in {len(value['files']):,} files"),
        ("in memory", text(resident_message(value["resident"]).partition(": ")[2])),
        ("method", text(method_names(value))),
        ("merges", f"{allocation['merges']:,} ({allocation['undone']:,} undone)"),
        ("dtypes", text(allocation["dtype"] or "as found")),
        *([("made again by", f"<code>{text(value['request']['command'])}</code>")] if value["request"] else []),
        ("id", f"<span class=path>{text(value['id'])}</span>"),
    ]
    sections = [_tasks(value)]
    if bundle.manifest.units:
        sections += [_bits(facts) if has_bits(bundle.manifest) else _routing(facts), _bytes(facts), _distance(facts)]
    if spectrum is not None:
        sections.append(spectrum_section(spectrum))
    title = f"{bundle.path.resolve().name}: a bundle of {len(bundle.tasks)} tasks"
    return page(title, fact_list([*pairs, ("page of", today())]), sections)


def _tasks(value: dict[str, object]) -> str:
    tasks = value["tasks"]
    assert isinstance(tasks, dict)
    rows = [
        [
            name(task, 40),
            "bit by bit" if found["exact"] else f"{1 - found['approximated'] / max(1, found['parameters']):.1%}",
            _number(found["distance"]),
            f"{found['route_bytes']:,}",
            f"{found['own_bytes']:,}",
            f"{found['side_bytes']:,}",
            weights_words(found),
        ]
        for task, found in tasks.items()
    ]
    columns = ["task", "exact", "distance", "bytes read", "own bytes", "side files", "weights"]
    return section(
        "Tasks",
        table(columns, rows),
        note="Exact: the share of a task's parameters that come back bit by bit. Distance: 0 is exact, 1 as far off as "
        "the base; null where a task equals the base and yet is not exact. Bytes read include its own bytes, which no "
        "other task reads. Weights in place load from tasks/; `flexmerge export` makes the others.",
    )


def _routing(facts: BundleFacts) -> str:
    tasks = facts.bundle.tasks
    scale = Scale(low=1.0, high=float(max(2, len(tasks))))

    def row(unit: UnitEntry) -> Iterator[_Cell]:
        found, groups = letters(unit), _groups(unit)
        for task in tasks:
            letter, group = found.get(task, " "), groups.get(task)
            style = cell_style(scale, len(group.tasks)) if group is not None and letter not in (ALONE, " ") else ""
            yield style, "in no group" if group is None else group.kind, letter

    return section(
        "Which tasks share a block",
        legend("1 task", f"{scale.high:.0f} tasks in a group"),
        _grid(facts, row),
        note=f"Blocks from top to bottom in order of depth; {LEGEND}.",
    )


def _bytes(facts: BundleFacts) -> str:
    apart = _apart_bytes(facts)
    most = max(1, *apart, *facts.unit_bytes)
    rows = [
        [
            block_name(unit.name),
            human_bytes(stored),
            f"{stored / whole:.0%}" if whole else "",
            f'<div class=bar><span style="width:{100 * whole / most:.2f}%"></span>'
            f'<i style="width:{100 * stored / most:.2f}%"></i></div>',
        ]
        for unit, stored, whole in zip(facts.bundle.manifest.units, facts.unit_bytes, apart)
    ]
    markup = table(["block", "stored", "of copies", ""], rows)
    return section(
        "Bytes along depth",
        markup,
        note="Dark: what the bundle stores of a block. Grey: what a copy for every task would take.",
    )


def _bits(facts: BundleFacts) -> str:
    """Show the bits that `auto` chose. Its groups tell nothing: nearly every tensor has one of all tasks."""
    scale = Scale(low=0.0, high=8.0)

    def row(unit: UnitEntry) -> Iterator[_Cell]:
        groups = _groups(unit)
        for task in facts.bundle.tasks:
            bits = (groups[task].bits or {}).get(task) if task in groups else None
            yield ("", "exact", "=") if bits is None else (cell_style(scale, bits), f"{bits} bits", str(bits))

    return section(
        "Bits of every task and tensor",
        legend("0 bits", "8 bits"),
        _grid(facts, row),
        note="Bits per weight that are stored of a task alone, beside the centre that its group shares; 0: the centre "
        "is all that it has; =: an exact copy.",
    )


def _distance(facts: BundleFacts) -> str:
    tasks, manifest = facts.bundle.tasks, facts.bundle.manifest
    values = np.array([_distances(unit, tasks) for unit in manifest.units])
    scale = Scale(low=0.0, high=float(np.nanmax(values, initial=0.0)) or 1.0)
    numbered = len(tasks) <= NUMBERED_TASKS

    def row(unit: UnitEntry) -> Iterator[_Cell]:
        groups = _groups(unit)
        for task, value in zip(tasks, _distances(unit, tasks)):
            exact = task in groups and is_exact(groups[task], task)
            shown = ("0" if exact else _number(value)) if numbered else ""
            yield "" if exact else cell_style(scale, value), _number(value), shown

    whole = [_number(manifest.tasks[task].distance) for task in tasks]
    total = "".join(f'<td title="{text(task)}">{value}</td>' for task, value in zip(tasks, whole))
    return section(
        "Distance of every block and task",
        legend("0 exact", f"{scale.text(scale.high)} farthest", gaps=bool(np.isnan(values).any())),
        _grid(facts, row, total if numbered else ""),
        note="A block's distance is relative to the whole task's change, so the squares of a column add up to that "
        "of the task's distance. White: exact.",
    )


def _groups(unit: UnitEntry) -> dict[str, GroupEntry]:
    """Map each task of a unit's groups to its group."""
    return {task: group for group in unit.groups for task in group.tasks}


def _grid(facts: BundleFacts, cells_of: Callable[[UnitEntry], Iterable[_Cell]], total: str = "") -> str:
    """Make a matrix with blocks as rows and tasks as columns, whose names are vertical."""
    tasks = facts.bundle.tasks

    def row(unit: UnitEntry) -> Iterator[str]:
        for task, (style, title, shown) in zip(tasks, cells_of(unit)):
            look = f' style="{style}"' if style else " class=off"
            yield f'<td{look} title="{text(f"{task}: {title}")}">{shown}</td>'

    head = (f"<th scope=col class=turned>{name(task, TASK_CHARACTERS)}</th>" for task in tasks)
    rows = ((block_name(unit.name), row(unit)) for unit in facts.bundle.manifest.units)
    return cells(head, rows, first=f"<tr class=total><th scope=row>all blocks</th>{total}</tr>\n" if total else "")


def _distances(unit: UnitEntry, tasks: Iterable[str]) -> list[float]:
    found = {task: distance for group in unit.groups for task, distance in group.distance.items()}
    return [math.nan if found.get(task) is None else float(found[task] or 0.0) for task in tasks]


def _apart_bytes(facts: BundleFacts) -> list[int]:
    """Return the bytes per unit that a copy for every task would take."""
    tensors = {tensor.name: tensor for tensor in facts.bundle.manifest.tensors}
    return [
        sum(
            math.prod(tensor.shape_of(task)) * ITEM_BYTES[tensor.dtype_of(task)]
            for tensor in (tensors[part] for part in unit.tensors)
            for task in tensor.digests
        )
        for unit in facts.bundle.manifest.units
    ]


def _number(value: float | None) -> str:
    return "null" if value is None or math.isnan(value) else f"{value:.3f}"
