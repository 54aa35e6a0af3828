"""Sources as given on the command line: a recipe, a plan, or --base, --tasks and --task."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.hub import checkpoints_in
from flexmerge_cli.checkpoint.place import HubPlace, is_hub, is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.family.family import Family, find_tasks
from flexmerge_cli.formats.plan_file import Plan, save_plan
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.planning.make import load_plan, make_plan, replan
from flexmerge_cli.request.plan import OrderSettings, PlanRequest, Statistics, known_word
from flexmerge_cli.request.recipe import Recipe, read_recipe
from flexmerge_cli.text import expanded


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Where a plan comes from: sources, or another plan."""

    request: PlanRequest | None
    plan: Plan | None
    order: OrderSettings
    warnings: tuple[str, ...] = ()
    """Warnings: the subfolders of --tasks that are skipped and why, and which tasks are the same model."""
    statistics: Statistics | None = None
    """The statistics that the plan is to hold; None: those of the other plan."""
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

    def make(self, *, save_to: Path, on_open: Callable[[Family], None], **run: Any) -> Plan:
        """Make the plan and save it. on_open: see make_plan; not called where a plan is made from another."""
        if self.request is not None:
            plan = make_plan(self.request, save_to=save_to, on_open=on_open, **run)
        else:
            assert self.plan is not None
            plan = replan(self.plan, self.order, without_statistics=self.statistics == "gram")
            if self.statistics == "all":
                from flexmerge_cli.planning.measuring import add_statistics

                plan = add_statistics(plan, self.folder, access=self.access, **run)
        save_plan(plan, save_to)
        return plan


def plan_request(
    source: Path | None,
    base: str | None,
    tasks: str | None,
    task: list[str],
    order: Mapping[str, Any],
    private: tuple[str, ...],
    merge_heads: bool,
    statistics: str | None = None,
    access: Access = ONLINE,
    adapters: str | None = None,
    assume_base: bool = False,
    ignore: Collection[str] = (),
    with_code: bool = False,
) -> Given:
    """Combine the options with the recipe or plan. Options take precedence."""
    if statistics is not None:
        known_word(get_args(Statistics), statistics, "statistics")
    recipe: Recipe | None = None
    plan: Plan | None = None
    if source is not None:
        if not source.is_file():
            raise SourceError(f"no recipe or plan at {source}", hint="check the path, or give --base and --tasks")
        if source.suffix in (".yaml", ".yml"):
            recipe = read_recipe(source)
        else:
            plan = load_plan(source)
    if plan is not None:
        if base or tasks or task or ignore or with_code or private or merge_heads or adapters or assume_base:
            raise UsageError(
                "the plan already fixes its sources and tensor classes", hint="leave out --base, --tasks, --private …"
            )
        settings = plan.settings
        old = {name: getattr(settings, name) for name in ("blocks", "linkage", "strategy", "similarity")}
        if order.get("strategy") in (None, Strategy.RANDOM):
            old["seed"] = settings.seed
        if old["blocks"] == "rules" and not order.get("blocks"):
            raise UsageError("the plan was made with a rules file", hint="give it again: --blocks rules.yaml")
        assert source is not None
        return Given(
            request=None,
            plan=plan,
            order=order_settings(order, old),
            statistics=cast(Statistics | None, statistics),
            folder=source.absolute().parent,
            access=access,
        )
    base_source = _from_here(base, recipe) if base is not None else recipe.base if recipe else None
    if base_source is None:
        raise UsageError("no base model given", hint="add --base PATH, or give a recipe")
    start = recipe.folder if recipe else Path()
    named: dict[str, str] = dict(recipe.task_sources()) if recipe else {}
    warnings: list[str] = []
    given: dict[str, str] = {}
    folders: dict[str, str] = {}
    if tasks is not None:
        named, warnings, ignore = _tasks_in(tasks, base_source, start, ignore, access)
        folders = {name.lower(): name for name in named}
        given = {name.lower(): f"`{name}` of {tasks}" for name in named}
    for item in task:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise UsageError(
                f"--task {item} is not of the form NAME=SOURCE", hint="for example --task sst2=finetuned/sst2"
            )
        if name.lower() in given:
            folder = folders.get(name.lower())
            raise UsageError(
                f"two tasks have the same name: {given[name.lower()]} and `{name}` of --task {item} (case is ignored)",
                hint=f"rename one, or skip the subfolder: --ignore {folder}" if folder else "rename one",
            )
        given[name.lower()] = f"`{name}` of --task"
        named[name] = _from_here(path, recipe)
    if not named:
        raise UsageError("no tasks given", hint="add --tasks DIR, or --task NAME=PATH")
    request = PlanRequest(
        base=base_source,
        tasks=named,
        order=order_settings(order, recipe.order_fields() if recipe else {}),
        private=private or (tuple(recipe.private) if recipe else ()),
        merge_heads=merge_heads or bool(recipe and recipe.merge_heads),
        adapters=cast(Adapters, adapters or (recipe.adapters if recipe else None) or "keep"),
        assume_base=assume_base or bool(recipe and recipe.assume_base),
        statistics=cast(Statistics, statistics or (recipe.statistics if recipe else None) or "all"),
        relative_to=start,
        access=replace(
            access,
            variant=access.variant or (recipe.variant if recipe else None),
            ignore=tuple(ignore) or (recipe.ignore if recipe else ()),
            with_code=with_code or bool(recipe and recipe.with_code),
        ),
    )
    return Given(request=request, plan=None, order=request.order, warnings=(*warnings, *_twice(named, start)))


def _tasks_in(
    place: str, base: str, start: Path, ignore: Collection[str], access: Access
) -> tuple[dict[str, str], list[str], list[str]]:
    """One task for each subfolder that holds a checkpoint, warnings about the others, and what of `ignore` is none.

    The base is not a task. A subfolder that looks like a model but has no weights is an error unless it is ignored.
    """
    if is_remote(place) and not is_hub(place):
        raise UsageError(
            f"--tasks {place} is neither a folder nor a Hub repository", hint="name each task: --task NAME=SOURCE"
        )
    found = checkpoints_in(place, access) if is_hub(place) else find_tasks(expanded(place))
    kinds = (found.models, found.unfinished, found.others)
    patterns = [name for name in ignore if not any(kind.pop(name, None) for kind in kinds)]
    if found.unfinished:
        lines = [f"`{name}` {why}" for name, why in found.unfinished.items()]
        left_out = " ".join(f"--ignore {name}" for name in found.unfinished)
        raise SourceError(
            f"some models in {place} are incomplete:\n  " + "\n  ".join(lines),
            hint=f"complete them, or skip them with {left_out}",
        )
    if not found.models:
        example = "hf://…" if is_hub(place) else "PATH"
        raise SourceError(f"no checkpoint in any subfolder of {place}", hint=f"name each task: --task NAME={example}")
    of_base = _identity(base, start)
    for name in [name for name, source in found.models.items() if _identity(source, Path()) == of_base]:
        del found.models[name]
        found.others[name] = "the base"
    warnings = [f"skipped in {place}: " + ", ".join(f"{name} ({why})" for name, why in sorted(found.others.items()))]
    sources = {name: source if is_hub(place) else str(Path(source).absolute()) for name, source in found.models.items()}
    return sources, warnings if found.others else [], patterns


def _identity(source: str, start: Path) -> object:
    """A key that is equal for two source strings of one model, as far as is known without reading it."""
    if is_hub(source):
        place = HubPlace.of(source)
        return place.repository, place.folder
    if is_remote(source):
        return source
    path = start / expanded(source)
    path = path.parent if path.is_file() else path  # the source names a weight file
    return path.resolve()


def _twice(named: Mapping[str, str], start: Path) -> list[str]:
    """A warning for each model that is given as several tasks."""
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


def _from_here(source: str, recipe: Recipe | None) -> str:
    """A source typed on the command line; made absolute if there is a recipe, whose paths are relative to itself."""
    return source if recipe is None or "://" in source else str(expanded(source).absolute())


def order_settings(chosen: Mapping[str, Any], otherwise: Mapping[str, Any]) -> OrderSettings:
    """Each setting from the command line, else from the recipe or plan, else the default. Raises UsageError."""
    default = OrderSettings()
    picked = {
        name: next((v for v in (chosen.get(name), otherwise.get(name)) if v is not None), getattr(default, name))
        for name in ("blocks", "linkage", "strategy", "similarity", "seed")
    }
    return OrderSettings(**picked)
