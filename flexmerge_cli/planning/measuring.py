"""Runs the one pass over the weights for a plan: over all tensors, or over those that merge to add statistics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.fetch import fetch
from flexmerge_cli.engine.survey_item import Measure, SurveyItem
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.formats.plan_file import Plan, sealed_plan
from flexmerge_cli.planning.sources import open_sources
from flexmerge_cli.version import GENERATOR

OnProgress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all)."""


def silent(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""


def measure(
    items: Sequence[SurveyItem],
    what: str,
    *,
    device: str,
    threads: int | None,
    max_memory: int | None,
    signs: bool = False,
    on_progress: OnProgress = silent,
) -> list[Measure]:
    """Read every item once and measure it. what: the name of the pass in its progress."""
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.engine.memory import survey_chunk
    from flexmerge_cli.engine.pool import default_threads
    from flexmerge_cli.engine.survey import survey

    read = [tensor for item in items for tensor in (item.base, *(own for _, own in item.tasks)) if tensor is not None]
    done, total = 0, sum(tensor.num_bytes for tensor in read)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress(what, done, total)

    where, threads = choose_device(device), threads or default_threads()
    chunk = survey_chunk(items, threads, max_memory, signs=signs)
    return survey(items, device=where, threads=threads, signs=signs, chunk_elements=chunk, on_bytes=on_bytes)


def add_statistics(
    plan: Plan,
    folder: Path,
    *,
    relocate: Mapping[str, str] | None = None,
    access: Access = ONLINE,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress = silent,
) -> Plan:
    """Read the mergeable weights again and add the statistics that `auto` needs.

    folder: the folder that the plan's relative sources are relative to. Raises DataError if the sources have changed
    since the plan.
    """
    if plan.settings.statistics == "all":
        return plan
    if plan.merges_products:
        raise UsageError(
            "statistics of the factors of LoRA adapters say nothing about their products", hint="leave out --statistics"
        )
    sources = open_sources(plan, folder, relocate, access)
    fetch(sources.to_fetch(), access, on_progress)
    located = sources.located
    tensors = [tensor for tensor in plan.tensors if tensor.class_ is TensorClass.MERGEABLE]
    items = [
        SurveyItem(
            name=tensor.name,
            base=located.base[tensor.name],
            tasks=tuple((task, of_task[tensor.name]) for task, of_task in enumerate(located.tasks)),
            gram=True,
            codes=True,
        )
        for tensor in tensors
    ]
    measures = measure(
        items,
        "code",
        device=device,
        threads=threads,
        max_memory=access.memory_left(max_memory),
        on_progress=on_progress,
    )
    for tensor, found in zip(tensors, measures):
        models = zip([*found.digests, found.base_digest], [*tensor.digests, tensor.base_digest])
        for model, (now, then) in enumerate(models):
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
