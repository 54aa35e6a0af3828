"""`flexmerge eval`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

from flexmerge_cli.cli import options as o

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.access import Access


class EvalCommand(TyperCommand):
    """The command `eval`, which recognises a curve's arguments and says how `curve` takes them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (words := _curve_words(ctx.parent.command.commands["curve"], args)) is not None:
            from flexmerge_cli.errors import UsageError

            raise UsageError(
                "`eval` scores a bundle, or a plan's sources with --sources; `curve` draws accuracy against size",
                hint=shlex.join(["flexmerge", "curve", *words]),
            )
        return super().parse_args(ctx, args)


def _curve_words(curve: Any, args: list[str]) -> list[str] | None:
    """Return the arguments of `curve` that ask for the same: one plan, and options that it has; None for other
    arguments."""
    if {"-h", "--help"} & set(args):
        return None
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--plan=") else [word])]
    has_plan = "--plan" in words
    if has_plan:
        place = words.index("--plan")
        words = [*words[place + 1 : place + 2], *words[:place], *words[place + 2 :]]
    try:
        plan = curve.make_context("curve", list(words)).params["plan"]
    except Exception as error:
        if not hasattr(error, "format_message"):  # the parser's own errors have it
            raise
        return None
    from flexmerge_cli.formats.plan_file import is_plan

    return words if has_plan or is_plan(plan) else None


def evaluate(
    bundle: o.BundleOrNone = None,
    spec: o.Spec = None,
    plan: o.ComparedPlan = None,
    sources: o.ScoreSources = False,
    cross: o.Cross = False,
    corrupt: o.Corrupt = None,
    router: o.Router = False,
    init: o.Init = False,
    output: o.SpecOutput = None,
    no_reuse: o.NoReuse = False,
    parallel: o.Parallel = 1,
    csv: o.Csv = None,
    html: o.Html = None,
    max_drop: o.MaxDrop = None,
    max_mean_drop: o.MaxMeanDrop = None,
    allow_exec: o.AllowExec = False,
    relocate: o.Relocate = None,
    offline: o.Offline = False,
    stream: o.Stream = False,
    device: o.Device = "auto",
    max_memory: o.MaxMemory = None,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Score every task of a bundle on your data.

    With --sources, score the models that a plan was made of, or that the spec names. To score a plan at any size
    without writing bundles, use `flexmerge curve`.

    \b
    Examples:
    flexmerge eval --init bundle/ -o eval.yaml
    flexmerge eval bundle/ --spec eval.yaml --html scores.html
    flexmerge eval bundle/ --spec eval.yaml --cross
    flexmerge eval --sources --plan plan.json --spec eval.yaml
    """
    from flexmerge_cli.cli.eval_outputs import check_outputs, write_outputs
    from flexmerge_cli.cli.gating import finish
    from flexmerge_cli.cli.output import progress
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.gate import parse_gate
    from flexmerge_cli.evaluation.running import score_request, scores
    from flexmerge_cli.report.evaluation import show_evaluation

    memory, moved = o.memory_of(max_memory), o.relocations(relocate)
    access = o.access_of(offline=offline, quiet=quiet, stream=stream, max_memory=memory)
    if init:
        if bundle is None or spec is not None:
            raise UsageError("--init takes a bundle, and no --spec", hint=INIT)
        _write_starter(bundle, output, plan, access, force=force, quiet=quiet)
        return
    if output is not None:
        raise UsageError("-o is where --init writes", hint=INIT)
    if spec is None:
        raise UsageError("no --spec: the data to score each task on", hint="flexmerge eval bundle/ --spec eval.yaml")
    if moved and plan is None:
        raise UsageError("--relocate is for the sources of --plan", hint="--plan plan.json")
    outputs = {kind: path for kind, path in (("csv", csv), ("html", html)) if path}
    check_outputs(outputs, (bundle, plan, spec), force=force)
    with progress(quiet=quiet or as_json) as on_progress:
        request = score_request(
            bundle,
            spec,
            plan=plan,
            relocate=moved,
            sources=sources,
            cross=cross,
            corrupt=corrupt or (),
            router=router,
            device=device,
            reuse=not no_reuse,
            parallel=parallel,
            allow_exec=allow_exec,
            access=access,
            max_memory=memory,
            gate=parse_gate(max_drop, max_mean_drop),
            on_progress=on_progress,
        )
    with progress(quiet=quiet or as_json, verbose=verbose, counts=True, stages=request.num_models) as on_step:
        document = scores(request, on_step=lambda what, done, total: on_step(f"scoring {what}", done, total))
        write_outputs(document, outputs, Path(str(bundle or plan).rstrip("/")).name)
    written = [*outputs.values()]
    finish(document, f"{bundle or plan}", as_json=as_json, quiet=quiet, show=show_evaluation, written=written)


INIT = "flexmerge eval --init bundle/ -o eval.yaml"


def _write_starter(
    bundle: str, output: Path | None, plan: Path | None, access: "Access", *, force: bool, quiet: bool
) -> None:
    """Write a starter spec. Reads no weights."""
    from flexmerge_cli.bundle.apart import check_apart
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.cli.output import note
    from flexmerge_cli.errors import UsageError
    from flexmerge_cli.evaluation.init import is_starter_spec, starter_spec
    from flexmerge_cli.writing import check_file, write_file

    if output is None:
        raise UsageError("no output file given for the spec", hint=INIT)
    check_apart(output, [bundle])
    check_file(output, force=force, replaceable=is_starter_spec, what="a spec that --init wrote")
    write_file(output, starter_spec(locate(bundle, access).open(), output.absolute().parent, plan))
    note(f"wrote {output}; now enter the data of each task in it", quiet=quiet)
