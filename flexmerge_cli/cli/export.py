"""`flexmerge export`."""

from typing import Annotated, Any

from flexmerge_cli.cli import options as o


def export(
    bundle: o.Bundle,
    output: o.ExportOutput,
    task: Annotated[list[str] | None, o.option("--task", "NAME", "Task to export; repeatable.")] = None,
    every: Annotated[bool, o.option("--all", "", "Export every task.")] = False,
    link: Annotated[
        bool, o.option("--link", "", "Link files instead of copying; fails if any tensor needs decoding.")
    ] = False,
    merged: Annotated[
        bool, o.option("--merged", "", "Export a kept adapter as the full model it produces, not as an adapter.")
    ] = False,
    as_lora: Annotated[
        bool,
        o.option("--as-lora", "", "Export one base and a PEFT adapter per task, for engines that serve LoRA adapters."),
    ] = False,
    offline: o.Offline = False,
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Export a task as an ordinary checkpoint folder.

    \b
    Examples:
    flexmerge export bundle/ --task sst2 -o sst2/
    flexmerge export bundle/ --task sst2 --task cola -o models/
    flexmerge export hf://org/bundle --task sst2 -o sst2/
    flexmerge export bundle/ --as-lora -o served/
    """
    from flexmerge_cli.bundle.as_lora import export_as_lora
    from flexmerge_cli.bundle.export import export_task, export_tasks
    from flexmerge_cli.bundle.locate import locate
    from flexmerge_cli.cli.output import emit, progress
    from flexmerge_cli.errors import UsageError

    tasks = task or []
    if as_lora and (tasks or every or link or merged):
        raise UsageError("--as-lora exports all tasks, in its own form", hint="leave out the other options")
    if bool(tasks) == every and not as_lora:
        raise UsageError("give either --task or --all", hint="--task NAME exports one task, --all every task")
    with progress(quiet=quiet or as_json, verbose=verbose) as on_progress:
        access = o.access_of(offline=offline, quiet=quiet)
        located = locate(bundle, access, tasks=tasks or None, on_progress=on_progress)
    opened = located.open(verify="xxh3")
    if as_lora:
        served = {"as_lora": str(output), "commands": export_as_lora(opened, output, force=force)}
        emit(served, as_json=as_json, quiet=quiet, show=_show_commands, written=[output])
        return
    if len(tasks) == 1:
        export_task(opened, tasks[0], output, force=force, link=link, merged=merged)
        places = {tasks[0]: output}
    else:
        places = export_tasks(opened, tasks or opened.tasks, output, force=force, link=link, merged=merged)
    value = {"exported": {name: str(place) for name, place in places.items()}}

    def show(found: dict[str, dict[str, str]]) -> None:
        for name, place in found["exported"].items():
            print(f"{name}: {place}")

    emit(value, as_json=as_json, quiet=quiet, show=show, written=[output])


def _show_commands(value: dict[str, Any]) -> None:
    print(value["as_lora"])
    for engine, lines in value["commands"].items():
        print(f"{engine}:", *(f"  {line}" for line in lines), sep="\n")
