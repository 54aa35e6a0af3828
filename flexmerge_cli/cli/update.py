"""`flexmerge update`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexmerge_cli.cli import options as o


def update(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the old bundle.")],
    plan_file: Annotated[Path, o.option("--plan", "FILE", "The new plan, of the same base and some of the tasks.")],
    output: o.BundleOutput,
    relocate: o.Relocate = None,
    no_card: o.NoCard = False,
    dry_run: o.DryRun = False,
    device: o.Device = "auto",
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Make the bundle of a new plan as BUNDLE was made, reusing everything in BUNDLE that does not change.

    \b
    Examples:
    flexmerge plan plan.json --add qnli=finetuned/qnli -o new.json
    flexmerge update bundle/ --plan new.json -o new/
    flexmerge update bundle/ --plan new.json -o bundle/ --force
    """
    from flexmerge_cli.cli import output as out
    from flexmerge_cli.planning.make import load_plan
    from flexmerge_cli.report.bundle import merge_summary, show_update
    from flexmerge_cli.updating import Update

    memory = o.memory_of(max_memory)
    access = o.access_of(offline=offline, quiet=quiet, stream=stream, max_memory=memory)
    found = Update.of(bundle, load_plan(plan_file), device=device)
    found.check(output, plan_file, force=force)
    measured = None
    if not dry_run:
        with out.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
            measured = found.write(
                output,
                plan_folder=plan_file.absolute().parent,
                relocate=o.relocations(relocate),
                access=access,
                force=force,
                device=device,
                threads=threads,
                max_memory=memory,
                card=not no_card,
                on_progress=on_progress,
            )
    value: dict[str, Any] = merge_summary(found.layout, output, measured, warnings=[], threads=threads)
    value["update"] = found.found.summary()
    out.emit(value, as_json=as_json, quiet=quiet, show=show_update, written=[output] if measured is not None else [])
