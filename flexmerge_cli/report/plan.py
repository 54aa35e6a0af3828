"""Shows the result of `plan`: a value for --json, and the same as tables."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.allocation import copies
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.allocation.options import EXACT
from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES
from flexmerge_cli.family.adapters import BECOMES
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.family.family import Family
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_records import PlanTensor
from flexmerge_cli.planning import left_out
from flexmerge_cli.report.inspect_curve import LINEAR, dense_sizes, distances_at, named_cuts
from flexmerge_cli.report.options import options_value, show_options, show_sizes, size_row
from flexmerge_cli.report.table import say, table
from flexmerge_cli.report.text import human_bytes, merges_words
from flexmerge_cli.report.vocabulary import show_vocabularies, vocabularies, vocabulary_warnings
from flexmerge_cli.request.merge import MergeRequest
from flexmerge_cli.request.plan import PlanRequest

MUCH = 0.05  # As a part of a task's weights.


def plan_summary(
    plan: Plan, path: Path, request: MergeRequest, family: Family | None = None, *, all_methods: bool = False
) -> dict[str, Any]:
    """Return the value that `plan` prints. family: the sources, if they were opened for it."""
    from flexmerge_cli.engine.merge_memory import merge_bytes
    from flexmerge_cli.engine.pool import default_threads

    pricer = Pricer(plan)
    asked = allocate(plan, request, pricer) if request != MergeRequest() else None
    exact = pricer.layout(copies(plan))
    return {
        "plan": str(path),
        "sha256": plan.sha256,
        "one_model_bytes": plan.one_model_bytes,
        "base": plan.base.source,
        "tasks": task_rows(plan),
        "classes": classes(plan),
        "vocabularies": vocabularies(plan),
        "blocks": len(plan.blocks),
        "merges": len(plan.order),
        "near_ties": plan.near_ties,
        "exact_bytes": exact.tensor_bytes,
        "sizes": size_rows(plan),
        **options_value(plan, str(path), all_methods=all_methods),
        "cut": None
        if asked is None
        else {
            "method": request.method,
            "merges": asked.allocation.merges,
            "undone": asked.allocation.undone,
            "tensor_bytes": asked.tensor_bytes,
            "factor": asked.tensor_bytes / max(1, plan.one_model_bytes),
            "total_bytes": asked.total_bytes,
        },
        "peak_memory_bytes": merge_bytes(asked or exact, default_threads()),
        "low_rank": low_rank_rows(plan),
        "warnings": warnings(plan) + (left_out.warnings(family) if family is not None else []),
        **({"left_out": left_out_rows(family)} if family is not None else {}),
    }


def left_out_rows(family: Family) -> list[dict[str, Any]]:
    """Return the files of each task that are not carried, by kind."""
    return [asdict(each) for each in left_out.left_out(family)]


def task_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one row per task; `adapter` is set if the task is, or was, an adapter."""
    rows = []
    for number, each in enumerate(plan.readers):
        row: dict[str, Any] = {"name": each.name, "source": each.source, "bytes": each.bytes}
        if each.adapter_kind is not None:
            row["adapter"] = {"kind": each.adapter_kind, "becomes": plan.settings.adapters}
            row["adapter"] |= {"bytes": each.own_bytes} if number in plan.kept else {}
        rows.append(row)
    return rows


def low_rank_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return the full fine-tunes that are the base plus low-rank matrices, and how much storing them so would save."""
    return [{"task": task.name, **task.low_rank.model_dump()} for task in plan.tasks if task.low_rank is not None]


def show_low_rank(rows: list[dict[str, Any]], plan: str) -> None:
    for row in rows:
        say(
            f"task `{row['task']}` is the base plus matrices of rank {row['rank']}, as a merged LoRA is: as low-rank "
            f"residuals the {row['matrices']} that changed take {row['residual_bytes']:,} bytes, not {row['bytes']:,}, "
            f"{row['bytes'] - row['residual_bytes']:,} less"
        )
    if rows:
        rank = max(row["rank"] for row in rows)
        print(f"  flexmerge merge {plan} --method low_rank:rank={rank},centre=base -o bundle/")


def adapter_words(row: dict[str, Any]) -> str:
    """Describe the adapter of a task's row: `lora, kept in 12,345 bytes`."""
    adapter = row.get("adapter")
    if adapter is None:
        return ""
    becomes = BECOMES[adapter["becomes"]]
    return f"{adapter['kind']}, {becomes}" + (f" {adapter['bytes']:,} bytes" if "bytes" in adapter else "")


def classes(plan: Plan) -> dict[str, Any]:
    """Return the number of tensors per class, their bytes over all tasks, and their names.

    A vocabulary's tensor counts by its common rows; its other rows are private, and count only in bytes.
    """
    found: dict[str, Any] = {}
    for kind in TensorClass:
        tensors = [tensor for tensor in plan.tensors if tensor.class_ is kind]
        found[kind.value] = {
            "tensors": len(tensors),
            "bytes": sum(_bytes(plan, t, k) for t in plan.stored if t.class_ is kind for k in t.present),
            "names": [
                {"name": tensor.name, "shape": list(tensor.shape), "why": tensor.reason}
                for tensor in tensors
                if kind is not TensorClass.MERGEABLE
            ],
        }
    return found


def _bytes(plan: Plan, tensor: PlanTensor, task: int) -> int:
    """Return a task's bytes of a tensor. Tied tensors have no separate rows."""
    is_whole = tensor.class_ is TensorClass.TIED
    shape = plan.whole_shape(tensor.name, tensor.shape_of(task), task) if is_whole else tensor.shape_of(task)
    return math.prod(shape) * ITEM_BYTES[tensor.dtype_of(task)]


def size_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return the prefixes of the order at 1x, 1.25x, … Mx, priced for one dense value per merged block."""
    sizes = dense_sizes(plan)
    named = named_cuts(plan, sizes)
    # Larger sizes need fewer merges; equal ones are one cut.
    cuts = sorted({merges for _, merges in named})
    distances = distances_at(plan, cuts, list(LINEAR.values()))
    return [
        size_row(
            plan, size, merges, sizes[merges], {m: found[cuts.index(merges)] for m, found in zip(LINEAR, distances)}
        )
        for size, merges in named
    ]


def warnings(plan: Plan) -> list[str]:
    """Return warnings that users should know before merging."""
    found = []
    energy = plan.task_energy()
    base = sum(tensor.base_energy for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE)
    for task, squared in zip(plan.tasks, energy):
        ratio = math.sqrt(squared / base) if base > 0 else 0.0
        if ratio >= 0.5:
            named = f"; its config names `{task.config_base}` as its base" if task.config_base else ""
            found.append(
                f"task `{task.name}` is probably not a fine-tune of this base: its change has {ratio:.2f} of "
                f"the base's norm{named}"
            )
        if squared == 0:
            found.append(f"task `{task.name}` equals the base in every tensor that merges")
    found += vocabulary_warnings(plan) + name_warnings(plan)
    damaged = [t.name for t in plan.stored if not t.finite]
    if damaged:
        found.append(
            f"these tensors hold values that are not finite and are stored unchanged: {', '.join(damaged[:10])}"
        )
    found += adapter_warnings(plan)
    if plan.near_ties:
        found.append(
            f"{plan.near_ties} merges are closer than 2^-18 to another, so their order may differ between machines"
        )
    return found


def name_warnings(plan: Plan) -> list[str]:
    """Warn about tasks with many weights under names that the base lacks, while they lack as many of the base's."""
    found = []
    for number, task in enumerate(plan.tasks):
        own = [tensor for tensor in plan.tensors if number in tensor.present and tensor.class_ is not TensorClass.TIED]
        new = [tensor for tensor in own if tensor.base_form is None and tensor.dtype_of(number) in FLOATING]
        gone = [t for t in plan.tensors if t.base_form is not None and number not in t.present and t.dtype in FLOATING]
        weights = [sum(math.prod(tensor.shape) for tensor in tensors) for tensors in (own, new, gone)]
        if weights[0] and min(weights[1:]) >= MUCH * weights[0]:
            found.append(
                f"task `{task.name}`: {len(new)} of its {len(own)} tensors, {weights[1] / weights[0]:.0%} of its "
                f"weights, have names that the base lacks (`{plan.own_name(number, new[0].name)}`, …) and are stored "
                f"unmerged, while it lacks {len(gone)} of the base's (`{gone[0].name}`, …): are they the same tensors?"
            )
    return found


def adapter_warnings(plan: Plan) -> list[str]:
    """Warn about features of kept adapters that inference engines do not support."""
    found = []
    for each in plan.readers:
        if each.adapter_kind is not None and each.own_names:
            some = ", ".join(each.own_names[:3]) + (", …" if len(each.own_names) > 3 else "")
            found.append(
                f"adapter `{each.name}` holds whole tensors ({some}), which vLLM and other engines do not load in an "
                "adapter: they need `flexmerge export --merged`"
            )
    return found


def dry_summary(sources: PlanRequest | None, request: MergeRequest) -> dict[str, Any]:
    """Return the value for --dry-run, from headers alone."""
    from flexmerge_cli.engine.memory import survey_bytes
    from flexmerge_cli.engine.pool import default_threads
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.family.splitting import divided
    from flexmerge_cli.planning.make import provisional_plan, survey_items, to_fetch
    from flexmerge_cli.planning.sources import open_family

    if sources is None:
        raise UsageError(
            "--dry-run reads the headers of sources, but a plan was given", hint="flexmerge inspect plan.json"
        )
    family = open_family(sources)
    plan = provisional_plan(family, sources)
    _, items = survey_items(divided(family, sources.order.blocks), sources)
    return {
        "one_model_bytes": plan.one_model_bytes,
        "base": plan.base.source,
        "tasks": task_rows(plan),
        "classes": classes(plan),
        "vocabularies": vocabularies(plan),
        "blocks": len(plan.blocks),
        **_without_commands(options_value(plan, "plan.json")),
        "read_bytes": sum(task.bytes for task in plan.readers),
        "fetch_bytes": sum(file.size for file in to_fetch(family)),
        "peak_memory_bytes": survey_bytes(items, default_threads()),
        "warnings": vocabulary_warnings(plan)
        + name_warnings(plan)
        + adapter_warnings(plan)
        + left_out.warnings(family),
        "left_out": left_out_rows(family),
    }


def _without_commands(value: dict[str, Any]) -> dict[str, Any]:
    """Drop commands and exact storage: without a plan nothing can be merged, nor deduplication be predicted."""
    rows = [row | {"command": None} for row in value["options"] if row["name"] != EXACT]
    return {"options": rows, "begin_with": None}


def show_part(value: dict[str, Any]) -> None:
    say(f"part {value['part']} of the plan: {value['tensors']:,} tensors measured")
    say("with all parts there: flexmerge plan --join PART… -o plan.json")


def show_plan(value: dict[str, Any]) -> None:
    """Print tables on stdout."""
    whole = sum(task["bytes"] for task in value["tasks"])
    one = value["one_model_bytes"]
    say(f"{len(value['tasks'])} tasks of {value['base']}, {human_bytes(whole)}; 1x = one model = {human_bytes(one)}")
    adapters = any("adapter" in task for task in value["tasks"])
    rows = [
        (task["name"], task["source"], *([adapter_words(task)] if adapters else []), f"{task['bytes']:,}")
        for task in value["tasks"]
    ]
    table(["task", "source", *(["adapter"] if adapters else []), "bytes"], rows, text=(1, 2) if adapters else (1,))
    table(
        ["class", "tensors", "bytes", "names"],
        [
            (kind, found["tensors"], f"{found['bytes']:,}", _names(found["names"]))
            for kind, found in value["classes"].items()
            if found["tensors"]
        ],
        text=(3,),
    )
    show_vocabularies(value["vocabularies"])
    show_low_rank(value.get("low_rank", []), value.get("plan", ""))
    if "sizes" in value and value["blocks"]:
        exact = value["exact_bytes"]
        say(f"after exact deduplication: {exact:,} bytes, {exact / max(1, one):.2f}x")
        if value["merges"]:
            show_sizes(value["sizes"])
    show_options(value)
    if value.get("cut"):
        cut = value["cut"]
        say(
            f"requested: {cut['method'] or 'a cast'}: {cut['factor']:.4f}x, {cut['total_bytes']:,} bytes on disk"
            f"{merges_words(cut, ', ')}"
        )
    if value.get("fetch_bytes"):
        say(f"to download: {value['fetch_bytes']:,} bytes of weights")
    say(f"estimated peak memory beyond Python and torch: {human_bytes(value['peak_memory_bytes'])}")
    if "plan" in value:
        say(f"plan: {value['plan']} ({value['blocks']} blocks, {value['merges']} merges)")


def _names(found: list[dict[str, Any]]) -> str:
    shown = [f"{item['name']}" + (f" ({item['why']})" if item["why"] else "") for item in found[:6]]
    return ", ".join(shown) + (f", … {len(found) - 6} more" if len(found) > 6 else "")
