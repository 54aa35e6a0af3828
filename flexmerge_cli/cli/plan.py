"""`flexmerge plan`."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from flexmerge_cli.cli import options as o
from flexmerge_cli.cli.beside import WORDS, BesideCommand

if TYPE_CHECKING:
    from flexmerge_cli.family.family import Family


class PlanCommand(BesideCommand):
    """The command `plan` or `serve`, whose --tasks and --join take all words up to the next option, as wildcards do."""

    WITHOUT_EFFECT: ClassVar[dict[str, str]] = {
        "part": "join workers dry_run html method size merges fit dtype all_methods",
        "workers": "join dry_run",
        "join": "source base tasks task add remove ignore with_code follow_links blocks linkage strategy similarity "
        "seed private merge_heads statistics adapters assume_base variant dry_run",
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        among = ""  # the words of which option
        for word in args:
            is_file = among == "--tasks" and word.endswith((".yaml", ".yml", ".json"))
            if among and words[-1] != among and not word.startswith("-") and not is_file:
                words.append(among)
            among = word if word in ("--tasks", "--join") else "" if word.startswith("-") or is_file else among
            words.append(word)
        return super().parse_args(ctx, words)


def plan(
    context: typer.Context,
    source: o.PlanSource = None,
    base: o.Base = None,
    tasks: o.Tasks = None,
    task: o.Task = None,
    add: o.Add = None,
    remove: o.Remove = None,
    ignore: o.Ignore = None,
    with_code: o.WithCode = False,
    follow_links: o.FollowLinks = False,
    output: o.PlanOutput = None,
    blocks: o.Blocks = None,
    linkage: o.Linkage = None,
    strategy: o.Strategy = None,
    similarity: o.Similarity = None,
    seed: o.OrderSeed = None,
    private: o.Private = None,
    merge_heads: o.MergeHeads = False,
    statistics: o.StatisticsWord = None,
    adapters: o.Adapters = None,
    assume_base: o.AssumeBase = False,
    method: o.Method = None,
    size: o.Size = None,
    merges: o.Merges = None,
    fit: o.Fit = None,
    dtype: o.Dtype = None,
    all_methods: o.AllMethods = False,
    html: o.Html = None,
    part: o.Part = None,
    join: o.JoinParts = None,
    workers: o.Workers = None,
    dry_run: o.DryRun = False,
    device: o.Device = "auto",
    threads: o.Threads = None,
    max_memory: o.MaxMemory = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    variant: o.Variant = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare fine-tuned models block by block. The plan holds everything that a later merge of any size needs.

    \b
    Example:
    flexmerge plan --base base/ --tasks finetuned/ -o plan.json
    """
    from flexmerge_cli.bundle.apart import check_apart
    from flexmerge_cli.cli import output as out
    from flexmerge_cli.cli.eval_outputs import check_outputs
    from flexmerge_cli.cli.sources import joined_parts, plan_request
    from flexmerge_cli.cli.workers import plan_parts
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.request.part import parse_part

    chosen = {"blocks": blocks, "linkage": linkage, "strategy": strategy, "similarity": similarity, "seed": seed}
    memory = o.memory_of(max_memory)
    access = o.access_of(offline=offline, quiet=quiet, variant=variant, stream=stream, max_memory=memory)
    share = parse_part(part) if part is not None else None
    if join:
        given = joined_parts(join, access)
    else:
        given = plan_request(
            source,
            access=access,
            base=base,
            tasks=tasks or (),
            task=task or (),
            order=chosen,
            private=private or (),
            merge_heads=merge_heads,
            statistics=statistics,
            adapters=adapters,
            assume_base=assume_base,
            ignore=ignore or (),
            with_code=with_code,
            follow_links=follow_links,
            add=add or (),
            remove=remove or (),
        )
    if (share is not None or workers is not None) and (given.request is None or given.known is not None):
        raise UsageError(
            f"{'--part' if share else '--workers'} divides the work of a new plan",
            hint="give sources or a recipe, not a plan",
        )
    if output is None and not dry_run:
        raise UsageError("no output file given for the plan", hint="add -o plan.json")
    if output is not None and not dry_run:
        check_apart(output, [source, *given.places, *(join or ())])
        (o.check_plan_place if share is None else o.check_part_place)(output, force=force)
    check_outputs({"html": html} if html else {}, [source, output, *given.places], force=force)
    if html is not None and dry_run:
        raise UsageError("--html shows a plan, and --dry-run makes none", hint="leave one of them out")
    from flexmerge_cli.bundle.kind import SourceKind
    from flexmerge_cli.report.inspect import write_page
    from flexmerge_cli.report.plan import dry_summary, plan_summary, show_part, show_plan
    from flexmerge_cli.request.merge import MergeRequest, merge_request

    if method is None and (size is not None or merges is not None):
        method = "average"  # every method that stores one dense value per block is cut in the same place
    request = merge_request(method=method, size=size, merges=merges, fit=fit, dtype=dtype, run_files=True)
    if request.size is not None:
        request.size.target(num_tasks=given.num_tasks, one_model_bytes=1)
    for message in request.notes:
        out.note(message, quiet=quiet)
    out.warn(given.warnings, quiet=quiet)
    if share is not None:
        assert output is not None
        with out.progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
            value = given.make_part(
                share, save_to=output, device=device, threads=threads, max_memory=memory, on_progress=on_progress
            )
        out.emit(value, as_json=as_json, quiet=quiet, show=show_part, written=[output])
        return
    if dry_run:
        value = dry_summary(given.request, request)
    else:
        assert output is not None
        families: list[Family] = []
        with ExitStack() as stack:
            on_progress = stack.enter_context(out.progress(quiet=quiet or as_json, verbose=verbose))
            if workers is not None:
                assert given.request is not None
                parts = plan_parts(
                    workers, context.meta[WORDS], output, given.request, device=device, threads=threads,
                    on_progress=on_progress,
                )  # fmt: skip
                given = joined_parts(stack.enter_context(parts), access)
            found = given.make(
                save_to=output,
                device=device,
                threads=threads,
                max_memory=memory,
                on_progress=on_progress,
                on_open=families.append,
            )
        is_shown = as_json or not quiet or request != MergeRequest()  # a size may be out of reach
        value = {"warnings": []}
        if is_shown:
            value = plan_summary(found, output, request, *families, all_methods=all_methods)
        if html is not None:
            write_page(output, html, SourceKind.PLAN)
    out.warn(value["warnings"], quiet=quiet)
    value["warnings"] = [*given.warnings, *value["warnings"]]
    out.emit(value, as_json=as_json, quiet=quiet, show=show_plan, written=[] if output is None or dry_run else [output])
