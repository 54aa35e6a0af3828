"""Compares two plans, or two bundles, into a value for JSON. Reads no weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexmerge_cli.bundle.kind import SourceKind, recognise
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.bundle.manifest_file import MANIFEST_NAME, read_manifest, standing
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.dtypes import ITEM_BYTES
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.formats.folders import ADDED
from flexmerge_cli.formats.manifest import Manifest
from flexmerge_cli.formats.manifest_records import GroupEntry
from flexmerge_cli.formats.plan_file import Plan, read_plan
from flexmerge_cli.text import expanded

# Two files that differ only in these have the same contents: the version that made them, and their own digests.
NO_CONTENT = ("generator", "build", "id", "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two plans or bundles, in the form in which they are compared."""

    summary: dict[str, Any]
    """The entries of the value that it has for each side, whether they differ or not."""
    fields: Mapping[str, Any]
    """The whole contents of its file, by the file's own keys."""
    settings: dict[str, Any]
    """The settings that concern all of it: bytes, methods, and the request."""
    tasks: dict[str, dict[str, Any]]
    """Maps each task to what is recorded about it."""
    blocks: dict[str, Any]
    """Maps each block to its groups in a bundle, or its merges in a plan."""
    values: dict[str, dict[str, tuple[str, int]]]
    """Maps each task to the tensors that it reads, and each tensor to its digest and bytes."""
    files: dict[str, dict[str, str]]
    """Maps each task to its side files, and each side file to its digest."""


def diff_value(a: str, b: str, access: Access = ONLINE) -> dict[str, Any]:
    """Compare two plans or two bundles; only the manifests of bundles are read.

    Raises UsageError for anything else, or for a plan and a bundle, and whatever reading raises.
    """
    kinds = [recognise(source, access) for source in (a, b)]
    for source, kind in zip((a, b), kinds):
        if kind is SourceKind.CHECKPOINT and not expanded(source).exists() and "://" not in source:
            raise SourceError(f"no plan or bundle at {source}", hint="check the path")
        if kind is SourceKind.CHECKPOINT:
            raise UsageError(
                f"{source} is a checkpoint, but `diff` compares plans or bundles",
                hint="to compare models, plan them: flexmerge plan --base A --task b=B -o plan.json",
            )
    if kinds[0] is not kinds[1]:
        raise UsageError(f"{a} is a {kinds[0]}, but {b} is a {kinds[1]}", hint="give two plans, or two bundles")
    sides = [_plan(source) if kinds[0] is SourceKind.PLAN else _bundle(source, access) for source in (a, b)]
    left, right = sides
    both = [name for name in left.tasks if name in right.tasks]
    keys = sorted({*left.fields, *right.fields} - set(NO_CONTENT))
    differ = [key for key in keys if left.fields.get(key) != right.fields.get(key)]
    return {
        "kind": str(kinds[0]),
        "a": {"source": a, **left.summary},
        "b": {"source": b, **right.summary},
        "equal": not differ,
        "keys": differ,
        "settings": _pairs(left.settings, right.settings),
        "tasks": {
            "only_a": [name for name in left.tasks if name not in right.tasks],
            "only_b": [name for name in right.tasks if name not in left.tasks],
            "changed": {name: pairs for name in both if (pairs := _pairs(left.tasks[name], right.tasks[name]))},
        },
        "blocks": _pairs(left.blocks, right.blocks),
        "values": {
            name: found
            for name in both
            if (found := _values(left.values[name], right.values[name], left.files[name], right.files[name]))
        },
    }


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Map each key whose values differ to both values, with None for a side that has none."""
    return {key: [a.get(key), b.get(key)] for key in {**a, **b} if a.get(key) != b.get(key)}


def _values(
    a: Mapping[str, tuple[str, int]], b: Mapping[str, tuple[str, int]], of_a: Mapping[str, str], of_b: Mapping[str, str]
) -> dict[str, Any]:
    """Return the tensors and side files whose bytes differ for a task; empty if there are none."""
    tensors, files = list(_pairs(a, b)), sorted(_pairs(of_a, of_b))
    if not tensors and not files:
        return {}
    num_bytes = sum(max(side[name][1] for side in (a, b) if name in side) for name in tensors)
    return {"tensors": tensors, "bytes": num_bytes, "of": len({**a, **b}), "files": files}


def _plan(source: str) -> Side:
    plan: Plan = read_plan(expanded(source))
    # The rounding of sums over tasks depends on the number of tasks, so the last digits do not count as a difference.
    lengths = [float(f"{math.sqrt(value):.12g}") for value in plan.task_energy()]
    names = plan.task_names
    merges: dict[str, list[list[list[str]]]] = {block.name: [] for block in plan.blocks}
    for merge in plan.order:
        merges[merge.block].append([[names[task] for task in side] for side in (merge.left, merge.right)])
    values: dict[str, dict[str, tuple[str, int]]] = {reader.name: {} for reader in plan.readers}
    for number, reader in enumerate(plan.readers):
        for tensor in plan.stored:
            given = reader.given(tensor.name, tensor, number)
            if given is not None:
                digest = given.digest if number >= len(plan.tasks) else tensor.digests[number]
                size = math.prod(given.shape) * ITEM_BYTES[given.dtype]
                values[reader.name][tensor.name] = f"{digest} {given.dtype} {given.shape}", size
    return Side(
        summary={"sha256": plan.sha256, "generator": plan.generator, "tasks": len(plan.readers)},
        fields=plan.model_dump(mode="json", by_alias=True),
        settings={
            "one_model_bytes": plan.one_model_bytes,
            "base": plan.base.source,
            "base_weights": plan.base.fingerprint,
        }
        | plan.settings.model_dump(mode="json"),
        tasks={
            reader.name: {
                "source": reader.source,
                "weights": reader.fingerprint,
                "bytes": reader.bytes,
                "adapter": reader.adapter_kind,
                "length": lengths[number] if number < len(lengths) else None,
            }
            for number, reader in enumerate(plan.readers)
        },
        blocks=merges,
        values=values,
        files={reader.name: {name: file.digest for name, file in reader.files.items()} for reader in plan.readers},
    )


def _bundle(source: str, access: Access) -> Side:
    path = standing(locate(source, access, headers_only=True).path)
    manifest = read_manifest(path)
    manifest_bytes = (path / MANIFEST_NAME).stat().st_size
    values: dict[str, dict[str, tuple[str, int]]] = {name: {} for name in manifest.tasks}
    for tensor in manifest.stored:
        for task, digest in tensor.digests.items():
            dtype, shape = tensor.dtype_of(task), tensor.shape_of(task)
            values[task][tensor.name] = f"{digest} {dtype} {shape}", math.prod(shape) * ITEM_BYTES[dtype]
    total = sum(file.bytes for file in manifest.files.values()) + manifest_bytes
    return Side(
        summary={"id": manifest.id, "generator": manifest.generator, "tasks": len(manifest.tasks)},
        fields=manifest.model_dump(mode="json", by_alias=True),
        settings={
            "format": manifest.format,
            "plan": manifest.plan,
            "one_model_bytes": manifest.one_model_bytes,
            "stored_bytes": manifest.stored_bytes,
            "total_bytes": total,
            "methods": [_method(manifest, number) for number in range(len(manifest.methods))],
            "command": manifest.request.command if manifest.request is not None else None,
            "gate": manifest.gate.model_dump(mode="json", exclude_none=True) if manifest.gate is not None else None,
            **{key: file.sha256 if (file := manifest.files.get(path)) else None for key, path in ADDED.items()},
        }
        | manifest.allocation.model_dump(mode="json"),
        tasks={
            name: {
                "source": task.source,
                "weights": task.fingerprint,
                "route_bytes": sum(manifest.files[path].bytes for path in manifest.weight_files(name)),
                "distance": task.distance,
            }
            for name, task in manifest.tasks.items()
        },
        blocks={unit.name: [_group(manifest, group) for group in unit.groups] for unit in manifest.units},
        values=values,
        files={
            name: {path: manifest.files[path].sha256 for path in task.files if path not in manifest.weight_files(name)}
            for name, task in manifest.tasks.items()
        },
    )


def _method(manifest: Manifest, number: int) -> str:
    method = manifest.methods[number]
    arguments = ",".join(f"{name}={value}" for name, value in sorted(method.args.items()))
    return "+".join(
        [*method.steps, method.name + (f":{arguments}" if arguments else ""), *filter(None, [method.calibrate])]
    )


def _group(manifest: Manifest, group: GroupEntry) -> dict[str, Any]:
    return {
        "tasks": list(group.tasks),
        "method": _method(manifest, group.method) if group.method is not None else None,
        "bits": dict(group.bits) if group.bits is not None else None,
    }
