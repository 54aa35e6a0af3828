"""`flexmerge merge`."""

from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import typer

from flexmerge_cli.cli import options as o
from flexmerge_cli.cli.beside import WORDS, BesideCommand


class MergeCommand(BesideCommand):
    """The command `merge`. A part prints no report and publishes nothing."""

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {
        "part": "join workers dry_run html",
        "join": "workers dry_run",
        "workers": "dry_run",
    }


def merge(
    context: typer.Context,
    source: o.PlanOrRecipe,
    output_: o.BundlePlace,
    method: o.Method = None,
    step: o.Step = None,
    calibrate: o.Calibrate = None,
    method_for: o.MethodFor = None,
    size: o.Size = None,
    sizes: o.Sizes = None,
    merges: o.Merges = None,
    fit: o.Fit = None,
    cluster: o.Cluster = None,
    seed: o.ClusterSeed = None,
    dtype: o.Dtype = None,
    max_distance: o.MaxDistance = None,
    layout_: o.Layout = None,
    calibration: o.Calibration = None,
    servable: o.Servable = None,
    relocate: o.Relocate = None,
    plan_file: o.KeptPlan = None,
    html: o.Html = None,
    no_card: o.NoCard = False,
    scores: o.CardScores = None,
    part: o.Part = None,
    join: o.Join = False,
    workers: o.Workers = None,
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
    """Write a bundle of any size. Without a method and a size, deduplicate exactly: nothing is lost.

    \b
    Examples:
    flexmerge merge plan.json --method auto --size 1x -o bundle/
    flexmerge merge plan.json --method task_arithmetic:scale=1.5 --size 2.25x -o bundle/
    flexmerge merge plan.json --method average --sizes 1.5x,2x,4x -o bundles/
    flexmerge merge plan.json --servable lora:rank=64 -o bundle/
    flexmerge merge plan.json --method auto --size 1x -o s3://bucket/folder
    """
    from flexmerge_cli.bundle.kind import SourceKind
    from flexmerge_cli.checkpoint.place import is_remote
    from flexmerge_cli.cli import output as out
    from flexmerge_cli.cli.eval_outputs import check_outputs
    from flexmerge_cli.cli.packing import Packing
    from flexmerge_cli.cli.storing import AtStore
    from flexmerge_cli.cli.terminal import OutputLost
    from flexmerge_cli.cli.workers import merge_parts
    from flexmerge_cli.errors import GateError, UsageError
    from flexmerge_cli.evaluation.scores_file import read_scores
    from flexmerge_cli.report.auto import show_chosen, unlike_predicted
    from flexmerge_cli.report.bundle import merge_summary, show_merge, show_part, show_sizes, show_verdict
    from flexmerge_cli.report.inspect import write_page
    from flexmerge_cli.request.part import parse_part

    if is_remote(output_) and sizes is not None:
        raise UsageError("--sizes writes folders on this disk", hint="write them, and then: flexmerge push")
    share = parse_part(part) if part is not None else None
    store = AtStore.of(output_, force=force, offline=offline, part=share)
    output = Path(output_) if store is None else store.folder
    memory = o.memory_of(max_memory)
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
        "layout": layout_,
        "calibration": str(calibration) if calibration else None,
        "servable": servable,
        "fit": fit,
    }
    access = o.access_of(offline=offline, quiet=quiet, stream=stream, max_memory=memory)
    packing = Packing.of(source, chosen, o.relocations(relocate), plan_file, access, sizes)
    run: dict[str, Any] = {"device": device, "threads": threads, "max_memory": memory}
    if scores is not None and no_card:
        raise UsageError("--scores is for the card, and --no-card writes none", hint="leave one of them out")
    packing.card, packing.scores = not no_card, read_scores(scores) if scores is not None else None
    packing.part, packing.join = share, join or workers is not None
    packing.check(output, force=force or store is not None)
    check_outputs({"html": html} if html else {}, [source, output], force=force)
    if html is not None and dry_run:
        raise UsageError("--html shows a bundle, and --dry-run writes none", hint="leave one of them out")
    if packing.sizes and (html is not None or scores is not None or part is not None or packing.join):
        raise UsageError(
            "--html, --scores, --part, --join and --workers concern one bundle, and --sizes writes several",
            hint="leave them out, or merge that size by itself",
        )
    for message in packing.request.notes:
        out.note(message, quiet=quiet)
    with out.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
        beside = output if not packing.sizes else output / packing.sizes[0].text
        # The plan of a recipe has sources relative to the bundle; to the recipe if that lies at an address.
        plan = packing.plan(source if store is not None else beside, on_progress=on_progress, **run)
        if packing.sizes:
            value = packing.merge_sizes(plan, output, dry_run=dry_run, force=force, on_progress=on_progress, **run)
            written_to = [] if dry_run else [output / size.text for size in packing.sizes]
            out.emit(value, as_json=as_json, quiet=quiet, show=show_sizes, written=written_to)
            return
        layout, warnings = packing.layout(plan, device=device, max_memory=memory)
    out.warn(warnings, quiet=quiet)
    more = packing.chosen()
    if not as_json and not quiet and part is None:
        show_chosen(more)
    written = None
    try:
        with out.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
            if workers is not None:
                run["device"] = merge_parts(
                    workers, context.meta[WORDS], output_, packing.local_inputs(plan), device=device,
                    threads=threads, on_progress=on_progress,
                )  # fmt: skip
            if not dry_run:
                if store is not None:
                    written = store.write(packing, plan, layout, on_progress=on_progress, **run)
                else:
                    written = packing.write(plan, layout, output, force=force, on_progress=on_progress, **run)
    except GateError as error:
        if not as_json:
            with suppress(OutputLost):  # the verdict is more important
                out.emit(packing.verdict(), as_json=False, quiet=quiet, show=show_verdict)
        summary = merge_summary(layout, output_, None, warnings=warnings, threads=threads)
        error.document = summary | more | packing.verdict()
        raise
    if packing.part is not None:
        value = {"part": part, "output": output_, "warnings": warnings}
        out.emit(value, as_json=as_json, quiet=quiet, show=show_part)
        return
    if written is not None and more and not packing.request.uses:  # what was predicted does not know their methods
        distances = {plan.tasks[task].name: distance for task, distance in written.task_distance.items()}
        (predicted,) = (one["distance"] for one in more.values())
        surprises = unlike_predicted(predicted, distances)
        out.warn(surprises, quiet=quiet)
        warnings += surprises
    if html is not None and written is not None:
        write_page(output, html, SourceKind.BUNDLE)
    if store is not None and written is not None:
        store.done()
    value = merge_summary(layout, output_, written, warnings=warnings, threads=threads) | more | packing.verdict()
    out.emit(
        value, as_json=as_json, quiet=quiet, show=show_merge, written=[Path(output_)] if written is not None else []
    )
