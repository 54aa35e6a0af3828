"""Makes the request for a plan of another plan's tasks, with some added and some removed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.request.plan import OrderSettings, PlanRequest, Statistics
from flexmerge_cli.text import expanded


def changed_request(
    plan: Plan,
    folder: Path,
    add: Mapping[str, str],
    remove: Collection[str],
    *,
    order: OrderSettings,
    statistics: Statistics | None,
    access: Access,
) -> PlanRequest:
    """Make the request for a new plan of the plan's tasks, with some added and some removed.

    folder: the folder that the plan's relative sources are relative to. add: name -> source, relative to the working
    directory. Raises UsageError for a task that is not in the plan, for a name that is taken, and if no task is left.
    """
    sources = {reader.name: reader.source for reader in plan.readers}
    for name in remove:
        if name not in sources:
            raise UsageError(f"--remove {name}: the plan has no such task", hint=f"it has: {', '.join(sources)}")
    kept = {name: source for name, source in sources.items() if name not in remove}
    taken = {name.lower(): name for name in kept}
    for name in add:
        if name.lower() in taken:
            other = taken[name.lower()]
            raise UsageError(
                f"--add {name}: the plan has a task `{other}` already"
                + ("" if other == name else " (case is ignored)"),
                hint=f"to replace it: --remove {other} --add {name}=…; else choose another name",
            )
    if not kept and not add:
        raise UsageError("no task is left", hint="keep one, or --add another")

    def there(source: str) -> str:
        return source if is_remote(source) else str(folder / expanded(source))

    def here(source: str) -> str:
        return source if is_remote(source) else str(expanded(source).absolute())

    asked = plan.settings
    return PlanRequest(
        base=there(plan.base.source),
        tasks={name: there(source) for name, source in kept.items()} | {name: here(add[name]) for name in add},
        order=order,
        private=asked.private,
        merge_heads=asked.merge_heads,
        statistics=statistics or asked.statistics,
        adapters=asked.adapters,
        assume_base=asked.assume_base,
        access=replace(
            access,
            variant=access.variant or asked.variant,
            ignore=tuple(dict.fromkeys((*asked.ignore, *access.ignore))),
            with_code=asked.with_code,
            follow_links=asked.follow_links,
        ),
    )
