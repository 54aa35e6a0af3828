"""What `eval` does with its options: scores of a bundle or of sources, and starter specs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.cli.eval_outputs import Outputs, check_outputs, write_outputs
from flexmerge_cli.cli.options import access_of, note, progress
from flexmerge_cli.cli.scoring_progress import scoring_progress
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.evaluation.gate import Gate
from flexmerge_cli.evaluation.spec import read_spec
from flexmerge_cli.planning.make import load_plan
from flexmerge_cli.writing import check_file, write_file


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """The options as typed."""

    bundle: str | None
    plan: Path | None
    relocate: Mapping[str, str]
    spec: Path
    sources: bool
    device: str
    reuse: bool
    parallel: int
    allow_exec: bool
    offline: bool
    quiet: bool
    gate: Gate
    outputs: Outputs
    force: bool


def score_bundle(options: ScoreOptions) -> dict[str, Any]:
    """Score, write the requested files and return the document. Whatever can be refused is, before weights are read."""
    from flexmerge_cli.evaluation.running import ScoreRequest, scores

    check_outputs(options.outputs, (options.bundle, options.plan, options.spec), force=options.force)
    access = access_of(offline=options.offline, quiet=options.quiet)
    path: Path | None = None
    tasks: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    if options.plan is not None and not options.plan.is_file():
        raise SourceError(f"no plan at {options.plan}", hint="make one with `flexmerge plan`")
    if options.bundle is not None:
        with progress(quiet=options.quiet) as on_progress:
            located = locate(options.bundle, access, on_progress=on_progress)
        path, tasks = located.path, located.open().tasks
    elif options.plan is not None:
        loaded = load_plan(options.plan)
        tasks, kept = loaded.task_names, tuple(adapter.name for adapter in loaded.adapters)
    spec = read_spec(options.spec, tasks, unscorable=kept, allow_exec=options.allow_exec)
    request = ScoreRequest(
        spec=spec,
        bundle=path,
        plan=options.plan,
        relocate=options.relocate,
        sources=options.sources,
        device=None if options.device == "auto" else options.device,
        reuse=options.reuse,
        parallel=options.parallel,
        access=access,
        gate=options.gate,
    )
    with scoring_progress(len(spec.tasks) * _models_of(request), quiet=options.quiet) as on_step:
        document = scores(request, on_step=on_step)
    write_outputs(document, options.outputs)
    return document


def _models_of(request: Any) -> int:
    """The number of models scored per task; an upper bound if the spec gives further models to only some tasks."""
    if request.parallel > 1 and len(request.spec.tasks) > 1:
        return 1  # one step per task
    named = any(task.checkpoint is not None for task in request.spec.tasks.values())
    both = 2 if request.plan is not None else named + (request.spec.base is not None)
    return int(both) if request.sources else 1 + int(both)


def write_starter(bundle: str, output: Path | None, *, force: bool, offline: bool, quiet: bool) -> None:
    """Write a starter spec. Reads only the side files of the bundle."""
    from flexmerge_cli.evaluation.init import is_starter_spec, starter_spec

    if output is None:
        raise UsageError("no output file given for the spec", hint="flexmerge eval --init bundle/ -o eval.yaml")
    check_apart(output, [bundle])
    check_file(output, force=force, replaceable=is_starter_spec, what="a spec that --init wrote")
    located = locate(bundle, access_of(offline=offline, quiet=quiet))
    write_file(output, starter_spec(located.open(), output.absolute().parent))
    note(f"wrote {output}; now enter the data of each task in it", quiet=quiet)
