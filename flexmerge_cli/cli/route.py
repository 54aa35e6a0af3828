"""`flexmerge route`."""

from pathlib import Path
from typing import Annotated

from flexmerge_cli.cli import options as o


def route(
    bundle: o.Bundle,
    output: Annotated[Path, o.option("-o", "--output", "FOLDER", "Folder for the bundle with its router.")],
    spec: o.Spec = None,
    kind: Annotated[str, o.option("--kind", "linear|centroid|mlp", "Kind of classifier.")] = "linear",
    features: Annotated[
        str | None, o.option("--features", "TASK", "Task whose model gives the features; default: the first.")
    ] = None,
    examples: o.Examples = 256,
    seed: Annotated[int, o.option("--seed", "N", "Seed of the folds, and of the mlp classifier.", min=0)] = 0,
    device: o.Device = "auto",
    max_memory: o.MaxMemory = None,
    offline: o.Offline = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Add a router to a bundle, which finds the task of an input.

    The router is a classifier on hidden states of one task's model, fitted on examples whose only label is their task.
    The new bundle links to the files of the old one where the file system allows it.

    \b
    Examples:
    flexmerge route bundle/ --spec calib.yaml -o routed/
    flexmerge eval routed/ --spec eval.yaml --router
    """
    from flexmerge_cli.bundle.apart import check_apart
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.bundle.publish import bundle_files, check_target
    from flexmerge_cli.bundle.router import write_routed
    from flexmerge_cli.cli.output import emit, progress
    from flexmerge_cli.engine.device import choose_device
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.kinds.kind import Run
    from flexmerge_cli.evaluation.memory import largest_model, require_memory
    from flexmerge_cli.evaluation.router import RouterRequest, fit_router
    from flexmerge_cli.evaluation.spec import read_spec
    from flexmerge_cli.report.router import show_router

    if spec is None:
        raise UsageError("no --spec: examples of each task", hint="flexmerge route bundle/ --spec eval.yaml -o routed/")
    request = RouterRequest(kind=kind, features=features, limit=examples, seed=seed)
    memory = o.memory_of(max_memory)
    access = o.access_of(offline=offline, quiet=quiet)
    check_apart(output, [bundle])
    check_target(output, force=force, ours=bundle_files)
    with progress(quiet=quiet or as_json) as on_progress:
        opened = locate(bundle, access, on_progress=on_progress).open()
    asked = read_spec(spec, opened.tasks)
    if memory is not None:
        require_memory(largest_model(asked, opened), 1, memory)
    with progress(quiet=quiet or as_json, verbose=verbose, counts=True, stages=len(asked.tasks)) as on_step:
        run = Run(device=str(choose_device(device)))
        found, entry = fit_router(opened, asked, request, run, access=access, on_step=on_step)
    write_routed(opened, found, entry, output, force=force)
    value = {"bundle": str(output), "router": entry.model_dump(mode="json")}
    emit(value, as_json=as_json, quiet=quiet, show=show_router, written=[output])
