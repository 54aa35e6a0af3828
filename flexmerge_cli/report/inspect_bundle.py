"""Describes a bundle from its manifest and headers: who reads what, how large it is, and the tasks' distances."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexmerge_cli.bundle.locate import Located
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME
from flexmerge_cli.bundle.read import Bundle
from flexmerge_cli.bundle.resident import resident
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.manifest_records import GroupEntry, TensorEntry, UnitEntry
from flexmerge_cli.report import inspect_draw as draw
from flexmerge_cli.report.table import line_columns, say, table
from flexmerge_cli.report.text import merges_words, printable

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALONE = "·"
LEGEND = f"one letter in a row: one group; a capital: kept as copies, equal ones once; {ALONE}: a group of one"

BITS_LEGEND = "a number: bits of what a task has beside the centre that its group shares; =: an exact copy"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundleFacts:
    """Facts that follow from the manifest and the headers."""

    bundle: Bundle
    unit_bytes: tuple[int, ...]
    """Stored bytes of each unit; shared parts count once."""
    unit_elements: tuple[int, ...]
    """The number of parameters of one task."""
    class_bytes: Mapping[str, int]


def bundle_facts(located: Located) -> BundleFacts:
    """Open a bundle. Raises SourceError, DataError, IntegrityError."""
    path, bundle = located.path, located.open()
    manifest = bundle.manifest
    place = {name: index for index, unit in enumerate(manifest.units) for name in (*unit.tensors, unit.name)}
    kinds = {tensor.name: tensor.class_ for tensor in manifest.stored}
    unit_bytes, class_bytes = [0] * len(manifest.units), Counter[str]()
    for file in bundle.parts:
        for part, tensor in part_tensors(bundle, file).items():
            num_bytes = bundle.parts[file][part].num_bytes
            class_bytes[kinds.get(tensor, TensorClass.MERGEABLE).value] += num_bytes
            if kinds.get(tensor, TensorClass.MERGEABLE) is TensorClass.MERGEABLE and tensor in place:
                unit_bytes[place[tensor]] += num_bytes
    sizes = {tensor.name: _elements(tensor) for tensor in manifest.tensors}
    for unit in manifest.units:
        if unknown := [name for name in unit.tensors if name not in sizes]:
            raise DataError(f"{path}: `{unit.name}` holds no tensor `{unknown[0]}`", hint="fetch the bundle again")
    return BundleFacts(
        bundle=bundle,
        unit_bytes=tuple(unit_bytes),
        unit_elements=tuple(sum(sizes[name] for name in unit.tensors) for unit in manifest.units),
        class_bytes=class_bytes,
    )


def part_tensors(bundle: Bundle, file: str) -> dict[str, str]:
    """Map each part of a file to the aligned tensor that it belongs to, or for a factor to the unit."""
    manifest = bundle.manifest
    names = manifest.tasks[manifest.files[file].tasks[0]].names  # dense parts have the names of the first reader
    dense = {names.get(tensor.name, tensor.name): tensor.name for tensor in manifest.stored}
    return {part: dense.get(part) or part.rpartition("@")[0] for part in bundle.parts[file]}


def bundle_value(facts: BundleFacts) -> dict[str, Any]:
    """Return the value that `inspect` shows for a bundle."""
    bundle, manifest = facts.bundle, facts.bundle.manifest
    return {
        "kind": "bundle",
        "bundle": str(bundle.path),
        "id": manifest.id,
        "generator": manifest.generator,
        "plan": manifest.plan,
        "request": manifest.request.dump() if manifest.request is not None else None,
        "methods": bundle.methods,
        "allocation": manifest.allocation.model_dump(mode="json"),
        "one_model_bytes": manifest.one_model_bytes,
        "stored_bytes": manifest.stored_bytes,
        "factor": manifest.stored_bytes / max(1, manifest.one_model_bytes),
        "total_bytes": bundle.total_bytes,
        "files": {path: file.bytes for path, file in manifest.files.items()} | {MANIFEST_NAME: bundle.manifest_bytes},
        "tasks": {task: _task(facts, task) for task in bundle.tasks},
        "classes": {
            kind.value: {
                "tensors": sum(tensor.class_ is kind for tensor in manifest.tensors),
                "bytes": facts.class_bytes.get(kind.value, 0),
            }
            for kind in TensorClass
            if kind is not TensorClass.BASE_ONLY or facts.class_bytes.get(kind.value, 0)
        },
        "units": [
            {
                "name": unit.name,
                "tensors": list(unit.tensors),
                "parameters": elements,
                "bytes": num_bytes,
                "groups": [group.model_dump(mode="json") for group in unit.groups],
            }
            for unit, elements, num_bytes in zip(manifest.units, facts.unit_elements, facts.unit_bytes)
        ],
        "resident": resident_value(bundle),
        "gate": manifest.gate.model_dump(mode="json") if manifest.gate is not None else None,
        "router": manifest.router.model_dump(mode="json") if manifest.router is not None else None,
        "surgery": manifest.surgery.model_dump(mode="json") if manifest.surgery is not None else None,
        "wemoe": manifest.wemoe.model_dump(mode="json") if manifest.wemoe is not None else None,
    }


def resident_value(bundle: Bundle) -> dict[str, Any]:
    """Return the bytes that a runtime of all sound tasks holds, and which weights it can keep as they are stored."""
    held = resident(bundle)
    return {
        "dense_bytes": sum(found.dense for found in held.values()),
        "packed_bytes": sum(found.packed for found in held.values()),
        "weights": {
            name: {"dense_bytes": found.dense, "packed_bytes": found.packed, "stays_packed": found.stays_packed}
            for name, found in held.items()
        },
    }


def resident_message(value: Mapping[str, Any]) -> str:
    """Say in one line how much memory a runtime takes."""
    weights = value["weights"].values()
    count = sum(found["stays_packed"] for found in weights)
    packed = f", {value['packed_bytes']:,} if {count} of {len(weights)} tensors stay packed" if count else ""
    return f"in memory, all tasks: {value['dense_bytes']:,} bytes{packed}"


def router_message(router: Mapping[str, Any]) -> str:
    """Say on one line what a router is, and how well it did. router: its entry in the manifest."""
    return (
        f"{router['kind']} router on features of {router['features']}: tells {len(router['tasks'])} tasks apart, "
        f"{100 * router['accuracy']:.1f} % right in cross-validation"
    )


def gate_message(gate: Mapping[str, Any]) -> str:
    """Say in one line which gate a bundle passed when it was made."""
    limits = [f"{name.replace('_', ' ')} {gate[name]}" for name in ("max_drop", "max_mean_drop") if gate[name]]
    left_out = f", not scored: {', '.join(gate['not_scored'])}" if gate["not_scored"] else ""
    return (
        f"passed its gate when it was made: {', '.join(limits)}, scored: {', '.join(gate['data'])}{left_out}; "
        f"spec {gate['spec'][:16]}…"
    )


def letters(unit: UnitEntry) -> dict[str, str]:
    """Map each task to the letter of its group, as in LEGEND; `#` past `z`. A task in no group has none."""
    found: dict[str, str] = {}
    shared = 0
    for group in unit.groups:
        letter = ALONE
        if len(group.tasks) > 1:
            letter = LETTERS[shared] if shared < len(LETTERS) else "#"
            letter = letter.upper() if group.method is None else letter
            shared += 1
        found.update(dict.fromkeys(group.tasks, letter))
    return found


def has_bits(manifest: Manifest) -> bool:
    """Return whether every task has its own number of bits, as `auto` chooses them."""
    return any(group.bits for unit in manifest.units for group in unit.groups)


def bits(unit: UnitEntry) -> dict[str, str]:
    """Map each task to the bits per weight of what it has alone; `=` for an exact copy."""
    return {
        task: "=" if (group.bits or {}).get(task) is None else str((group.bits or {})[task])
        for group in unit.groups
        for task in group.tasks
    }


def is_exact(group: GroupEntry, task: str) -> bool:
    """Return whether the task's values are restored exactly."""
    return group.method is None and group.distance.get(task) == 0


def show_bundle(facts: BundleFacts, value: dict[str, Any], *, every: bool) -> None:
    """Print tables on stdout."""
    allocation = value["allocation"]
    say(f"{value['bundle']}: a bundle of {len(value['tasks'])} tasks, id {value['id']}")
    say(f"{value['generator']}, plan {value['plan'][:16]}…; {method_names(value)}")
    if value["request"] is not None:
        print(printable(f"made again by: {value['request']['command']}"))
    say(
        f"{value['factor']:.4f}x: {value['stored_bytes']:,} bytes of tensors, {value['total_bytes']:,} on disk in "
        f"{len(value['files'])} files{merges_words(allocation, '; ')}"
    )
    say(resident_message(value["resident"]))
    if value["gate"]:
        say(gate_message(value["gate"]))
    if value["router"]:
        say(router_message(value["router"]))
    if value["surgery"]:
        rank, tasks = value["surgery"]["rank"], value["surgery"]["layers"]
        say(f"surgery of rank {rank} corrects what the last layer gets of {', '.join(tasks)}")
    if value["wemoe"]:
        depth, units = value["wemoe"]["layers"], value["wemoe"]["first"]
        say(f"routers of {depth} layer{'s' * (depth > 1)} weigh the experts of {', '.join(units)}")
    if allocation["dtype"]:
        say(f"floating-point tensors are stored as {allocation['dtype']}")
    table(
        ["task", "bytes\nread", "own\nbytes", "approximated", "distance", "weights"],
        [
            (
                name,
                f"{task['route_bytes']:,}",
                f"{task['own_bytes']:,}",
                "nothing: exact" if task["exact"] else f"{task['approximated'] / max(1, task['parameters']):.1%}",
                draw.number(task["distance"]),
                weights_words(task),
            )
            for name, task in value["tasks"].items()
        ],
        title="approximated: the share of a task's parameters that do not come back bit by bit",
    )
    table(
        ["class", "tensors", "bytes"],
        [
            (kind, found["tensors"], f"{found['bytes']:,}")
            for kind, found in value["classes"].items()
            if found["tensors"]
        ],
    )
    if not facts.bundle.manifest.units:
        return
    chosen = has_bits(facts.bundle.manifest)
    rows = [
        _row(facts.bundle.tasks, *found, chosen=chosen)
        for found in zip(facts.bundle.manifest.units, facts.unit_elements, facts.unit_bytes)
    ]
    heads = ("tensor", "bits by task") if chosen else ("block", "groups by task")
    columns = [*heads, "bytes", "worst\ndistance", "stored as", "parameters"]
    shown = len(columns) if line_columns() >= draw.WIDE else 4
    draw.long_table(
        columns[:shown],
        [row[:shown] for row in rows],
        every=every,
        title="bits per weight of each task" if chosen else "which tasks share a block",
        text=(1, 4) if chosen else (4,),  # many bits are folded
    )
    say("tasks from left to right: " + ", ".join(f"{n} {task}" for n, task in enumerate(value["tasks"], 1)))
    say(BITS_LEGEND if chosen else LEGEND)


def method_names(value: Mapping[str, Any]) -> str:
    """Return the requested method if it is known, else the methods that are stored."""
    asked = (value["request"] or {}).get("method")
    return str(asked) if asked else ", ".join(value["methods"]) or "nothing merged"


def _row(tasks: Sequence[str], unit: UnitEntry, elements: int, num_bytes: int, *, chosen: bool) -> tuple[str, ...]:
    kinds = Counter(group.kind for group in unit.groups)
    distances = [found for group in unit.groups for found in group.distance.values()]
    known = [distance for distance in distances if distance is not None]
    is_all_exact = len(known) == len(distances) and max(known, default=0) == 0
    shared = bits(unit) if chosen else letters(unit)
    return (
        unit.name,
        (" " if chosen or len(tasks) <= draw.NUMBERED_TASKS else "").join(shared.get(task, " ") for task in tasks),
        f"{num_bytes:,}",
        "exact" if is_all_exact else draw.number(max(known, default=None)),
        ", ".join(f"{count} {PLURALS.get(kind, kind) if count > 1 else kind}" for kind, count in kinds.items()),
        f"{elements:,}",
    )


PLURALS = {"copy": "copies"}


def _task(facts: BundleFacts, task: str) -> dict[str, Any]:
    bundle, manifest = facts.bundle, facts.bundle.manifest
    entry, route = manifest.tasks[task], manifest.weight_files(task)
    approximated = sum(
        elements
        for unit, elements in zip(manifest.units, facts.unit_elements)
        for group in unit.groups
        if task in group.tasks and not is_exact(group, task)
    )
    return {
        "source": entry.source,
        "exact": entry.exact,
        "distance": entry.distance,
        "parameters": sum(math.prod(shape) for _, shape in bundle.tensors_of(task).values()),
        "approximated": approximated,
        **({"adapter": entry.kept_as} if entry.is_kept else {}),
        "route_bytes": sum(manifest.files[path].bytes for path in route),
        "own_bytes": sum(manifest.files[path].bytes for path in route if manifest.files[path].tasks == (task,)),
        "side_bytes": sum(manifest.files[path].bytes for path in entry.files if path not in route),
        "files": list(entry.files),
        "in_place": manifest.lies_in_place(task),
        "config": "config.json" in manifest.side_files(task),
    }


def weights_words(task: dict[str, Any]) -> str:
    """Say where a task's weights are, and whether a config describes them; not which library loads them."""
    if "adapter" in task:
        return "kept adapter"
    return ("in place" if task["in_place"] else "after export") + ("" if task["config"] else ", no config")


def _elements(tensor: TensorEntry) -> int:
    return math.prod(tensor.shape)
