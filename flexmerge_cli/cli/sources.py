"""What the command line says of sources: recipe, plan, --base, --tasks, --task."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from flexmerge_cli.allocation.plan_file import Plan, save_plan
from flexmerge_cli.allocation.plan_records import Statistics
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.hub import checkpoints_in
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.family.family import find_tasks
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.plan import load_plan, make_plan, replan
from flexmerge_cli.plan_request import OrderSettings, PlanRequest
from flexmerge_cli.recipe import Recipe, read_recipe
from flexmerge_cli.text import expanded

if TYPE_CHECKING:
    from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Where a plan comes from: sources, or another plan."""

    request: PlanRequest | None
    plan: Plan | None
    order: OrderSettings
    ignored: tuple[str, ...]
    """What lies in --tasks and is no checkpoint."""
    statistics: Statistics | None = None
    """What the plan is to hold; None: as the other plan."""
    folder: Path = Path()
    """Of the other plan."""
    access: Access = ONLINE

    @property
    def num_tasks(self) -> int:
        named = self.request.tasks if self.request is not None else self.plan.tasks if self.plan is not None else ()
        return len(named)

    def make(self, *, save_to: Path, **run: Any) -> Plan:
        """The plan, saved."""
        if self.request is not None:
            plan = make_plan(self.request, save_to=save_to, **run)
        else:
            assert self.plan is not None
            plan = replan(self.plan, self.order, without_statistics=self.statistics == "gram")
            if self.statistics == "all":
                from flexmerge_cli.measuring import add_statistics

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
) -> Given:
    """Options win over the recipe."""
    if adapters not in (None, *get_args(Adapters)):
        raise UsageError(f"--adapters {adapters} is not known", hint=f"one of: {', '.join(get_args(Adapters))}")
    if statistics not in (None, "all", "gram"):
        raise UsageError(f"--statistics {statistics} is not known", hint="one of: all, gram")
    recipe: Recipe | None = None
    plan: Plan | None = None
    if source is not None:
        if not source.is_file():
            raise SourceError(f"no recipe or plan at {source}", hint="or give --base and --tasks")
        if source.suffix in (".yaml", ".yml"):
            recipe = read_recipe(source)
        else:
            plan = load_plan(source)
    if plan is not None:
        if base or tasks or task or private or merge_heads or adapters or assume_base:
            raise UsageError(
                "a plan has its sources and classes already", hint="leave out --base, --tasks, --private …"
            )
        settings = plan.settings
        old = {name: getattr(settings, name) for name in ("blocks", "linkage", "strategy", "similarity", "seed")}
        if old["blocks"] == "rules" and not order.get("blocks"):
            raise UsageError("the plan was made with rules of its own", hint="give them again: --blocks rules.yaml")
        assert source is not None
        return Given(
            request=None,
            plan=plan,
            order=order_settings(order, old),
            ignored=(),
            statistics=cast(Statistics | None, statistics),
            folder=source.absolute().parent,
            access=access,
        )
    named: dict[str, str] = dict(recipe.task_sources()) if recipe else {}
    ignored: list[str] = []
    if tasks is not None:
        named, ignored = _tasks_in(tasks, access)
    given: set[str] = set()
    for item in task:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--task {item} is not NAME=SOURCE", hint="--task sst2=finetuned/sst2")
        if name in given:
            raise UsageError(f"two tasks of one name: `{name}`", hint="rename one")
        given.add(name)
        named[name] = _from_here(path, recipe)
    base_source = _from_here(base, recipe) if base is not None else recipe.base if recipe else None
    if base_source is None:
        raise UsageError("no base", hint="--base PATH, or a recipe")
    if not named:
        raise UsageError("no tasks", hint="--tasks DIR, or --task NAME=PATH")
    request = PlanRequest(
        base=base_source,
        tasks=named,
        order=order_settings(order, recipe.order_fields() if recipe else {}),
        private=private or (tuple(recipe.private) if recipe else ()),
        merge_heads=merge_heads or bool(recipe and recipe.merge_heads),
        adapters=cast(Adapters, adapters or (recipe.adapters if recipe else None) or "keep"),
        assume_base=assume_base or bool(recipe and recipe.assume_base),
        statistics=cast(Statistics, statistics or (recipe.statistics if recipe else None) or "all"),
        relative_to=recipe.folder if recipe else Path(),
        access=replace(access, variant=access.variant or (recipe.variant if recipe else None)),
    )
    return Given(request=request, plan=None, order=request.order, ignored=tuple(ignored))


def _tasks_in(place: str, access: Access) -> tuple[dict[str, str], list[str]]:
    """One task for each folder that holds a checkpoint, and the names of what else is there."""
    if is_hub(place):
        found, ignored = checkpoints_in(place, access)
        if not found:
            raise SourceError(f"no checkpoint in any folder of {place}", hint="give each task: --task NAME=hf://…")
        return found, ignored
    if is_remote(place):
        raise UsageError(f"--tasks {place}: a folder, or a repository of the Hub", hint="--task NAME=SOURCE for each")
    local, ignored = find_tasks(Path(place))
    return {name: str(Path(path).absolute()) for name, path in local.items()}, ignored


def _from_here(source: str, recipe: Recipe | None) -> str:
    """A source of the command line. A recipe's folder is not where it is typed; else it stays as it was typed."""
    return source if recipe is None or "://" in source else str(expanded(source).absolute())


def order_settings(chosen: Mapping[str, Any], otherwise: Mapping[str, Any]) -> OrderSettings:
    """What was chosen, else what the recipe or plan has, else the defaults. Raises UsageError for an unknown word."""
    default = OrderSettings()
    picked = {
        name: next((v for v in (chosen.get(name), otherwise.get(name)) if v is not None), getattr(default, name))
        for name in ("blocks", "linkage", "strategy", "similarity", "seed")
    }
    return OrderSettings(
        blocks=picked["blocks"],
        linkage=Linkage(_word(Linkage, picked["linkage"], "linkage")),
        strategy=Strategy(_word(Strategy, picked["strategy"], "strategy")),
        similarity=Similarity(_word(Similarity, picked["similarity"], "similarity")),
        seed=picked["seed"],
    )


def _word(kind: "type[StrEnum]", value: str, option: str) -> str:
    if value not in list(kind):
        raise UsageError(f"--{option} {value} is not known", hint=f"one of: {', '.join(kind)}")
    return value
