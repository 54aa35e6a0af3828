"""Reads the sources given on the command line: a recipe, a plan, or --base, --tasks and --task."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.family.family import Family
from flexmerge_cli.formats.plan_file import Plan, save_plan
from flexmerge_cli.formats.sealed import save_sealed
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.planning.changed import changed_request
from flexmerge_cli.planning.known import Known
from flexmerge_cli.planning.make import load_plan, make_plan, replan
from flexmerge_cli.planning.parts import Parts, make_part
from flexmerge_cli.request.part import Share
from flexmerge_cli.request.plan import OrderSettings, PlanRequest, Statistics, known_word
from flexmerge_cli.request.recipe import Recipe, read_recipe
from flexmerge_cli.request.tasks import found_tasks, name_of
from flexmerge_cli.text import expanded

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSources:
    """Where a plan comes from: sources, or another plan."""

    request: PlanRequest | None
    plan: Plan | None
    order: OrderSettings
    warnings: tuple[str, ...] = ()
    """Warnings: the subfolders of --tasks that are skipped and why, and which tasks are the same model."""
    statistics: Statistics | None = None
    """The statistics that the plan will hold; None: those of the other plan."""
    folder: Path = Path()
    """The folder of the other plan."""
    access: Access = ONLINE

    @property
    def num_tasks(self) -> int:
        named = self.request.tasks if self.request is not None else self.plan.readers if self.plan is not None else ()
        return len(named)

    @property
    def places(self) -> list[Path]:
        """The paths of local sources and of the rules file for blocks."""
        if self.request is None:
            return []
        sources = [source for source in (self.request.base, *self.request.tasks.values()) if not is_remote(source)]
        found = [self.request.relative_to / expanded(source) for source in sources]
        return found + [path for path in (Path(self.order.blocks),) if path.is_file()]

    known: Known | None = None
    """What the other plan knows about sources, if tasks are added or removed."""
    parts: Parts | None = None
    """What the plan is joined from."""

    def make(self, *, save_to: Path, on_open: Callable[[Family], None], **run: Any) -> Plan:
        """Make the plan and save it. on_open: see make_plan; not called if a plan is made from another."""
        if self.parts is not None:
            plan = self.parts.join(save_to=save_to, on_open=on_open, **run)
        elif self.request is not None:
            plan = make_plan(self.request, save_to=save_to, on_open=on_open, known=self.known, **run)
        else:
            assert self.plan is not None
            plan = replan(self.plan, self.order, without_statistics=self.statistics == "gram")
            if self.statistics == "all":
                from flexmerge_cli.planning.measuring import add_statistics

                plan = add_statistics(plan, self.folder, access=self.access, **run)
        save_plan(plan, save_to)
        return plan

    def make_part(self, part: Share, *, save_to: Path, **run: Any) -> dict[str, Any]:
        """Measure one part of the plan and save it; return what there is to say of it."""
        assert self.request is not None
        made = make_part(self.request, part, **run)
        save_sealed(made, save_to)
        return {"part": str(part), "output": str(save_to), "tensors": len(made.measures), "warnings": [*self.warnings]}


def joined_parts(paths: Sequence[Path], access: Access) -> GivenSources:
    """Read the parts of a plan, which say what it is made of."""
    parts = Parts.read(paths, access)
    return GivenSources(request=parts.request, plan=None, order=parts.request.order, parts=parts)


def plan_request(
    source: Path | Recipe | None,
    *,
    access: Access,
    base: str | None = None,
    tasks: Sequence[str] = (),
    task: Sequence[str] = (),
    order: Mapping[str, Any] | None = None,
    private: Sequence[str] = (),
    merge_heads: bool = False,
    statistics: str | None = None,
    adapters: str | None = None,
    assume_base: bool = False,
    ignore: Collection[str] = (),
    with_code: bool = False,
    follow_links: bool = False,
    add: Collection[str] = (),
    remove: Collection[str] = (),
) -> GivenSources:
    """Combine the options with the recipe or plan. Options take precedence."""
    order = order or {}
    if statistics is not None:
        known_word(get_args(Statistics), statistics, "statistics")
    recipe = source if isinstance(source, Recipe) else None
    plan: Plan | None = None
    if isinstance(source, Path):
        if not source.is_file():
            raise SourceError(f"no recipe or plan at {source}", hint="check the path, or give --base and --tasks")
        if source.suffix in (".yaml", ".yml"):
            recipe = read_recipe(source, access)
        else:
            plan = load_plan(source)
    if plan is not None:
        changes = add or remove
        fixed = (base, tasks, task, with_code, follow_links, private, merge_heads, adapters, assume_base)
        if any(fixed) or (ignore and not changes):
            raise UsageError(
                "the plan already fixes its sources and tensor classes", hint="leave out --base, --tasks, --private …"
            )
        settings = plan.settings
        old = {name: getattr(settings, name) for name in ("blocks", "linkage", "strategy", "similarity")}
        if order.get("strategy") in (None, Strategy.RANDOM):
            old["seed"] = settings.seed
        if old["blocks"] == "rules" and not order.get("blocks"):
            raise UsageError("the plan was made with a rules file", hint="give it again: --blocks rules.yaml")
        assert isinstance(source, Path)
        chosen = order_settings(order, old)
        if changes:
            return _changed(plan, source, add, remove, chosen, statistics, replace(access, ignore=tuple(ignore)))
        return GivenSources(
            request=None,
            plan=plan,
            order=chosen,
            statistics=cast(Statistics | None, statistics),
            folder=source.absolute().parent,
            access=access,
        )
    if add or remove:
        raise UsageError("--add and --remove change a plan", hint="give one: flexmerge plan plan.json --add NAME=MODEL")
    base_source = _from_here(base, recipe) if base is not None else recipe.base if recipe else None
    if base_source is None:
        raise UsageError("no base model given", hint="add --base PATH, or give a recipe")
    start = recipe.folder if recipe else Path()
    require_local("--base ", base_source, start)
    named: dict[str, str] = dict(recipe.task_sources()) if recipe else {}
    warnings: list[str] = list(recipe.warnings) if recipe else []
    found = found_tasks(tasks, base_source, start, ignore=ignore, access=access)
    if tasks:
        named, warnings = found.sources, found.warnings
    given = {name.lower(): f"`{name}` of {place}" for name, place in found.places.items()}
    for item in task:
        name, path = _named("--task", item)
        if name.lower() in given:
            folder = next((other for other in found.folders if other.lower() == name.lower()), None)
            raise UsageError(
                f"two tasks have the same name: {given[name.lower()]} and `{name}` of --task {item} (case is ignored)",
                hint=f"rename one, or skip the subfolder: --ignore {folder}" if folder else "rename one",
            )
        given[name.lower()] = f"`{name}` of --task"
        require_local(f"--task {name}=", path, Path())
        named[name] = _from_here(path, recipe)
    if not named:
        raise UsageError("no tasks given", hint="add --tasks DIR, or --task NAME=PATH")

    def option(name: str, typed: Any) -> Any:
        return typed if typed or recipe is None else getattr(recipe, name)

    request = PlanRequest(
        base=base_source,
        tasks=named,
        order=order_settings(order, recipe.order_fields() if recipe else {}),
        private=tuple(option("private", private)),
        merge_heads=option("merge_heads", merge_heads),
        adapters=option("adapters", adapters) or "keep",
        assume_base=option("assume_base", assume_base),
        statistics=option("statistics", statistics) or "all",
        relative_to=start,
        access=replace(
            access,
            variant=option("variant", access.variant),
            ignore=option("ignore", found.patterns),
            with_code=option("with_code", with_code),
            follow_links=option("follow_links", follow_links),
        ),
    )
    return GivenSources(request=request, plan=None, order=request.order, warnings=(*warnings, *_twice(named, start)))


def _named(option: str, item: str) -> tuple[str, str]:
    """Split NAME=SOURCE into name and source; a source alone is named after itself."""
    name, equals, path = item.partition("=")
    name, path = (name, path) if equals else (name_of(item), item)
    if not name or not path:
        raise UsageError(
            f"{option} {item} is not of the form NAME=SOURCE", hint=f"for example {option} sst2=finetuned/sst2"
        )
    return name, path


def _changed(
    plan: Plan,
    source: Path,
    add: Collection[str],
    remove: Collection[str],
    order: OrderSettings,
    statistics: str | None,
    access: Access,
) -> GivenSources:
    """Return the plan with tasks added or removed."""
    added: dict[str, str] = {}
    for name, path in (_named("--add", item) for item in add):
        if name.lower() in map(str.lower, added):
            raise UsageError(f"--add gives two tasks the name `{name}` (case is ignored)", hint="rename one")
        require_local(f"--add {name}=", path, Path())
        added[name] = path
    folder = source.absolute().parent
    words = cast(Statistics | None, statistics)
    request = changed_request(plan, folder, added, remove, order=order, statistics=words, access=access)
    return GivenSources(
        request=request,
        plan=plan,
        order=order,
        warnings=tuple(_twice(request.tasks, Path())),
        known=Known(plan=plan, new=frozenset(added)),
    )


def _twice(named: Mapping[str, str], start: Path) -> list[str]:
    """Return a warning for each model that is given as several tasks."""
    tasks: dict[object, list[str]] = {}
    for name, source in sorted(named.items()):
        # Two weight files of one folder, or two revisions of one repository, are two models.
        same = source if is_remote(source) else (start / expanded(source)).resolve()
        tasks.setdefault(same, []).append(name)
    return [
        f"tasks {', '.join(f'`{name}`' for name in names)} are the same model: {same}"
        for same, names in tasks.items()
        if len(names) > 1
    ]


def require_local(option: str, source: str, start: Path) -> None:
    """Raise SourceError for a text that looks like the name of a model on the Hub and is not a path here."""
    if HUB_NAME.fullmatch(source) and not (start / expanded(source)).exists():
        raise SourceError(
            f"no checkpoint at {source}: a path without a scheme is a local one",
            hint=f"for the model of that name on the Hub: {option}hf://{source}",
        )


def _from_here(source: str, recipe: Recipe | None) -> str:
    """Return a source typed on the command line; made absolute if there is a recipe, whose paths are relative to
    itself."""
    return source if recipe is None or "://" in source else str(expanded(source).absolute())


def order_settings(chosen: Mapping[str, Any], otherwise: Mapping[str, Any]) -> OrderSettings:
    """Return each setting from the command line, otherwise from the recipe or plan, otherwise the default. Raises
    UsageError."""
    default = OrderSettings()
    picked = {
        name: next((v for v in (chosen.get(name), otherwise.get(name)) if v is not None), getattr(default, name))
        for name in ("blocks", "linkage", "strategy", "similarity", "seed")
    }
    return OrderSettings(**picked)
