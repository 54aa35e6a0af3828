"""Describes a checkpoint from its headers: parameters, dtypes, blocks and private candidates. Reads no weights.

A single model does not show which tensors are constant, missing, or of another shape in its family; `plan` does.
"""

from typing import Any

from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.peft import is_adapter, read_adapter
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.family.blocks import partition
from flexmerge_cli.family.classes import aliases, is_resnet, tied_by_config, why_private
from flexmerge_cli.report.inspect_draw import long_table
from flexmerge_cli.report.table import say, table
from flexmerge_cli.report.text import human_bytes


def checkpoint_value(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the value that `inspect` shows for a checkpoint."""
    tensors = checkpoint.tensors
    shared = aliases(tensors)
    tied = tied_by_config(checkpoint.config, tensors) | shared
    resnet = is_resnet(tensors)
    private = {
        name: why
        for name, tensor in tensors.items()
        if name not in shared and (why := why_private(name, tensor, [tensor], resnet=resnet)) is not None
    }
    merging = [name for name in tensors if name not in shared and name not in private]
    return {
        "kind": "checkpoint",
        **({"adapter": _adapter(checkpoint)} if is_adapter(checkpoint) else {}),
        "source": checkpoint.source,
        "path": str(checkpoint.path),
        "model_type": _word(checkpoint.config.get("model_type")),
        "architectures": [str(name) for name in _list(checkpoint.config.get("architectures"))],
        "parameters": sum(tensor.num_elements for name, tensor in tensors.items() if name not in shared),
        "bytes": sum(tensor.num_bytes for name, tensor in tensors.items() if name not in shared),
        "files": [
            {
                "path": str(path),
                "bytes": checkpoint.weight_bytes[path],
                "tensors": sum(t.path == path for t in tensors.values()),
            }
            for path in checkpoint.weight_paths()
        ],
        "side_files": list(checkpoint.side_files),
        "ignored": list(checkpoint.ignored),
        "dtypes": {
            dtype: _sums([tensor for tensor in tensors.values() if tensor.dtype == dtype])
            for dtype in sorted({tensor.dtype for tensor in tensors.values()})
        },
        "blocks": [
            {"name": block.name, **_sums([tensors[name] for name in block.tensors])} for block in partition(merging)
        ],
        "private": [
            {"name": name, "dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "why": why}
            for name, why in private.items()
        ],
        "tied": [
            {
                "name": alias,
                "of": target,
                "why": "shared storage" if alias in shared else "by the config, if bit-identical",
            }
            for alias, target in tied.items()
        ],
    }


def show_checkpoint(value: dict[str, Any], *, every: bool) -> None:
    """Print tables on stdout."""
    what = ", ".join(value["architectures"]) or value["model_type"] or "no config.json"
    say(f"{value['source']}: a checkpoint ({what})")
    if "adapter" in value:
        adapter = value["adapter"]
        what = f"{adapter['kind']} of {adapter['modules']} modules" if adapter["kind"] else adapter["refused"]
        say(f"a PEFT adapter: {what}; trained on {adapter['base'] or 'a base it does not name'}")
    say(
        f"{value['parameters']:,} parameters, {human_bytes(value['bytes'])} "
        f"in {sum(file['tensors'] for file in value['files'])} tensors; weight files: {len(value['files'])}"
    )
    if value["side_files"]:
        say(f"beside the weights: {', '.join(value['side_files'])}")
    if value["ignored"]:
        say(f"left where it is: {', '.join(value['ignored'])}")
    table(["dtype", *SUMS], [(dtype, *_cells(sums)) for dtype, sums in value["dtypes"].items()])
    long_table(
        ["block", *SUMS],
        [(block["name"], *_cells(block)) for block in value["blocks"]],
        every=every,
        title=f"{len(value['blocks'])} blocks",
    )
    if value["private"]:
        long_table(
            ["private candidate", "why", "dtype", "shape"],
            [(found["name"], found["why"], found["dtype"], found["shape"]) for found in value["private"]],
            every=every,
            text=(1, 2, 3),
        )
    else:
        say("no private candidates")
    if value["tied"]:
        table(
            ["tied", "to", "why"], [(found["name"], found["of"], found["why"]) for found in value["tied"]], text=(1, 2)
        )


def _adapter(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the kind of an adapter, or why flexmerge cannot read it."""
    try:
        adapter = read_adapter(checkpoint)
    except DataError as error:
        return {"kind": None, "refused": error.message, "base": None, "modules": 0, "ranks": []}
    return {
        "kind": adapter.kind.value,
        "base": adapter.base_name,
        "modules": len(adapter.factors) + len(adapter.vectors),
        "ranks": sorted({factors.a.shape[0] for factors in adapter.factors.values()}),
    }


SUMS = ("tensors", "parameters", "bytes")


def _sums(tensors: list[StoredTensor]) -> dict[str, int]:
    counted = (len(tensors), sum(t.num_elements for t in tensors), sum(t.num_bytes for t in tensors))
    return dict(zip(SUMS, counted))


def _cells(sums: dict[str, Any]) -> list[str]:
    return [f"{sums[key]:,}" for key in SUMS]


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
