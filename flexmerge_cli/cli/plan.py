"""`flexmerge plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flexmerge_cli.family.family import Family

from flexmerge_cli.cli.options import (
    DeviceOption,
    DtypeOption,
    FitOption,
    ForceOption,
    JsonOption,
    MemoryOption,
    MergesOption,
    MethodOption,
    OfflineOption,
    QuietOption,
    SizeOption,
    StreamOption,
    ThreadsOption,
    VariantOption,
    VerboseOption,
)


def plan(
    source: Annotated[
        Path | None, typer.Argument(help="A recipe.yaml, or a plan.json to derive a new plan from.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The pre-trained model.")] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Folder or hf://org/name with one subfolder per fine-tune.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="NAME=SOURCE, once per fine-tune.")] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore", help="Skip this subfolder of --tasks, or files of the sources that match; repeatable."
        ),
    ] = None,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Carry the Python files of the sources, which loaders may run.")
    ] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write plan.json.")] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            help="Unit of merging: component, layer, tensor, model, or a rules.yaml. With --linkage average, `model` "
            "clusters whole models, to be merged at --size Kx.",
        ),
    ] = None,
    linkage: Annotated[
        str | None, typer.Option("--linkage", help="Similarity of groups: complete, average, single or centroid.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="Merge order: greedy, left-to-right, right-to-left or random.")
    ] = None,
    similarity: Annotated[
        str | None, typer.Option("--similarity", help="Similarity of tasks: cosine, euclidean or sign.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of --strategy random.")] = None,
    private: Annotated[
        list[str] | None, typer.Option("--private", help="Never merge tensors that match this pattern; repeatable.")
    ] = None,
    merge_heads: Annotated[bool, typer.Option("--merge-heads", help="Merge task heads of equal shape.")] = False,
    statistics: Annotated[
        str | None,
        typer.Option(
            "--statistics", help="all (default), or gram, which skips the statistics that --method auto needs."
        ),
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            "--adapters",
            help="What to do with PEFT adapters: keep them unchanged beside the base (default), merge each into the "
            "base and treat it like any fine-tune, or pool them, which merges them with one another.",
        ),
    ] = None,
    assume_base: Annotated[
        bool, typer.Option("--assume-base", help="Accept --base for adapters that name a different base model.")
    ] = False,
    method: MethodOption = None,
    size: SizeOption = None,
    merges: MergesOption = None,
    fit: FitOption = None,
    dtype: DtypeOption = None,
    methods: Annotated[str, typer.Option("--methods", help="Storage options to list: common or all.")] = "common",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report from headers alone; read no weights.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    offline: OfflineOption = False,
    stream: StreamOption = False,
    variant: VariantOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare fine-tuned models block by block. The plan holds all that a later merge of any size needs.

    \b
    Example:
    flexmerge plan --base base/ --tasks finetuned/ -o plan.json
    """
    from flexmerge_cli.allocation.options import check_methods
    from flexmerge_cli.bundle.apart import check_apart
    from flexmerge_cli.cli import options
    from flexmerge_cli.cli.sources import plan_request
    from flexmerge_cli.errors import UsageError

    check_methods(methods)
    chosen = {"blocks": blocks, "linkage": linkage, "strategy": strategy, "similarity": similarity, "seed": seed}
    memory = options.memory_of(max_memory)
    access = options.access_of(offline=offline, quiet=quiet, variant=variant, stream=stream, max_memory=memory)
    apart = tuple(private or ())
    given = plan_request(
        source,
        base,
        tasks,
        task or [],
        chosen,
        apart,
        merge_heads,
        statistics,
        access,
        adapters,
        assume_base,
        ignore or (),
        with_code,
    )
    if output is None and not dry_run:
        raise UsageError("no output file given for the plan", hint="add -o plan.json")
    if output is not None and not dry_run:
        check_apart(output, [source, *given.places])
        options.check_plan_place(output, force=force)
    from flexmerge_cli.report.plan import dry_summary, plan_summary, show_plan
    from flexmerge_cli.request.merge import merge_request

    if method is None and (size is not None or merges is not None):
        method = "average"  # every method that stores one dense value per block is cut in the same place
    request = merge_request(method=method, size=size, merges=merges, fit=fit, dtype=dtype, run_files=True)
    if request.size is not None:
        request.size.target(num_tasks=given.num_tasks, one_model_bytes=1)
    for message in request.notes:
        options.note(message, quiet=quiet)
    options.warn(given.warnings, quiet=quiet)
    if dry_run:
        value = dry_summary(given.request, request)
    else:
        assert output is not None
        families: list[Family] = []
        with options.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
            found = given.make(
                save_to=output,
                device=device,
                threads=threads,
                max_memory=memory,
                on_progress=on_progress,
                on_open=families.append,
            )
        value = plan_summary(found, output, request, *families, methods=methods)
    options.warn(value["warnings"], quiet=quiet)
    value["warnings"] = [*given.warnings, *value["warnings"]]
    options.emit(value, as_json=as_json, show=show_plan, written=[] if output is None or dry_run else [output])
