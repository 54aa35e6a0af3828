"""A plan without the statistics that `auto` needs in, the same with them out: reads the mergeable weights once more."""

from collections.abc import Callable, Mapping
from pathlib import Path

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan, sealed_plan
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.version import GENERATOR


def add_statistics(
    plan: Plan,
    folder: Path,
    *,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> Plan:
    """folder: what the plan's relative sources are relative to. Raises DataError if they are not what the plan saw."""
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.memory import survey_chunk
    from flexmerge_cli.engine.pool import default_threads
    from flexmerge_cli.engine.survey import SurveyItem, survey

    if plan.settings.statistics == "all":
        return plan
    if plan.pools_lora:
        raise UsageError(
            "how factors of LoRA adapters code says nothing of their products", hint="leave out --statistics"
        )
    sources, _ = open_sources(plan, folder, relocate or {}, access)
    fetch(sources.to_fetch(), access, on_progress)
    located = sources.located
    tensors = [tensor for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
    items = [
        SurveyItem(
            name=tensor.name,
            base=located.base[tensor.name],
            tasks=tuple((task, found[tensor.name]) for task, found in enumerate(located.tasks)),
            gram=True,
            codes=True,
        )
        for tensor in tensors
    ]
    total = sum(stored.num_bytes for item in items for _, stored in item.tasks)
    total += sum(item.base.num_bytes for item in items if item.base)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("code", done, total)

    threads = threads or default_threads()
    measures = survey(
        items,
        device=choose_device(device),
        threads=threads,
        chunk_elements=survey_chunk(items, threads, access.memory_left(max_memory)),
        on_bytes=on_bytes,
    )
    for tensor, measure in zip(tensors, measures):
        for model, (now, then) in enumerate(
            zip([*measure.digests, measure.base_digest], [*tensor.digests, tensor.base_digest])
        ):
            if now != then:
                who = located.describe[model]
                raise DataError(f"{who} has changed since the plan: `{tensor.name}`", hint="make the plan again")
    coding = {tensor.name: found.coding.to_dict() for tensor, found in zip(tensors, measures) if found.coding}
    fields = plan.model_dump(mode="json", by_alias=True)
    for record in fields["tensors"]:
        record["coding"] = coding.get(record["name"])
    fields["settings"]["statistics"] = "all"
    fields["generator"] = GENERATOR
    return sealed_plan(fields)
