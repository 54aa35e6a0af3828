"""`flexmerge merge`."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flexmerge_cli.cli.options import (
    CalibrateOption,
    ClusterOption,
    DeviceOption,
    DtypeOption,
    FitOption,
    ForceOption,
    JsonOption,
    MemoryOption,
    MergesOption,
    MethodForOption,
    MethodOption,
    OfflineOption,
    QuietOption,
    RelocateOption,
    SizeOption,
    StepOption,
    StreamOption,
    ThreadsOption,
    VerboseOption,
)


def merge(
    source: Annotated[Path, typer.Argument(help="A plan.json or a recipe.yaml.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write the bundle to.")],
    method: MethodOption = None,
    step: StepOption = None,
    calibrate: CalibrateOption = None,
    method_for: MethodForOption = None,
    size: SizeOption = None,
    merges: MergesOption = None,
    fit: FitOption = None,
    cluster: ClusterOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the k-means initialisation; requires --cluster.")
    ] = None,
    dtype: DtypeOption = None,
    max_distance: Annotated[
        float | None, typer.Option("--max-distance", min=0, help="Publish only if every task's distance is below this.")
    ] = None,
    relocate: RelocateOption = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Save the recipe's plan here and reuse it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, exact bytes and memory; read no weights.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    offline: OfflineOption = False,
    stream: StreamOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a bundle of any size. Without a method and a size, deduplicate exactly: nothing is lost.

    \b
    Examples:
    flexmerge merge plan.json --method auto --size 1x -o bundle/
    flexmerge merge plan.json --method task_arithmetic:scale=1.5 --size 2.25x -o bundle/
    """
    from flexmerge_cli.cli import options
    from flexmerge_cli.cli.packing import Packing
    from flexmerge_cli.cli.terminal import OutputLost
    from flexmerge_cli.errors import GateError
    from flexmerge_cli.report.auto import show_auto, unlike_predicted
    from flexmerge_cli.report.bundle import merge_summary, show_merge, show_verdict

    memory = options.memory_of(max_memory)
    chosen = {
        "method": method,
        "steps": tuple(step) if step else None,
        "calibrate": calibrate,
        "method_for": tuple(method_for) if method_for else None,
        "size": size,
        "merges": merges,
        "cluster": cluster,
        "seed": seed,
        "dtype": dtype,
        "max_distance": max_distance,
        "fit": fit,
    }
    access = options.access_of(offline=offline, quiet=quiet, stream=stream, max_memory=memory)
    packing = Packing.of(source, chosen, options.relocations(relocate), plan_file, access)
    run = {"device": device, "threads": threads, "max_memory": memory}
    packing.check(output, force=force)
    for message in packing.request.notes:
        options.note(message, quiet=quiet)
    with options.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
        plan = packing.plan(output, on_progress=on_progress, **run)
        layout, warnings = packing.layout(plan, device=device)
    options.warn(warnings, quiet=quiet)
    chosen_by_auto = packing.auto()
    if chosen_by_auto is not None and not as_json:
        show_auto(chosen_by_auto)
    more = {"auto": chosen_by_auto} if chosen_by_auto else {}
    written = None
    try:
        with options.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
            if not dry_run:
                written = packing.write(plan, layout, output, force=force, on_progress=on_progress, **run)
    except GateError as error:
        if not as_json:
            with suppress(OutputLost):  # the verdict weighs more
                options.emit(packing.verdict(), as_json=False, show=show_verdict)
        summary = merge_summary(layout, output, None, warnings=warnings, threads=threads)
        error.document = summary | more | packing.verdict()
        raise
    if written is not None and chosen_by_auto and not packing.request.uses:  # of which the search sees nothing
        distances = {plan.tasks[task].name: distance for task, distance in written.task_distance.items()}
        surprises = unlike_predicted(chosen_by_auto["distance"], distances)
        options.warn(surprises, quiet=quiet)
        warnings += surprises
    value = merge_summary(layout, output, written, warnings=warnings, threads=threads) | more | packing.verdict()
    options.emit(value, as_json=as_json, show=show_merge, written=[output] if written is not None else [])
