"""Reads recipe.yaml, `flexmerge.recipe/1`: the options of `plan` and `merge` in one file; paths are relative to it.

version  1
base     source
tasks    {name: source, or {source, revision}}, or a folder with one subfolder per task
blocks   as --blocks;  order {linkage, strategy, similarity, seed};  private [pattern];  merge_heads;
         statistics  as --statistics;  variant  as --variant;  adapters  as --adapters;  assume_base
ignore   [subfolder of tasks, or pattern of files of the sources], as --ignore;  with_code, follow_links
merge    {method, steps [..], calibrate, method_for {pattern: method}, size or merges, fit, cluster, seed, dtype,
         max_distance, layout, calibration, servable}
gate     {spec, max_drop, max_mean_drop}: what the finished bundle must keep of the fine-tuned scores to be published;
         spec is an eval.yaml, none of whose code is run; it scores every task, or names it under `not_scored`
Unknown keys are refused, with the line and the nearest valid name. Nothing in a recipe is run.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.record import Record
from flexmerge_cli.request.choices import MergeWords
from flexmerge_cli.request.merge import MethodMissing, merge_request
from flexmerge_cli.request.size import parse_sizes
from flexmerge_cli.request.tasks import found_tasks
from flexmerge_cli.text import expanded
from flexmerge_cli.yaml_file import read_document


class TaskSource(Record):
    source: str
    revision: str | None = None


class OrderRecord(Record):
    linkage: Linkage | None = None
    strategy: Strategy | None = None
    similarity: Similarity | None = None
    seed: int | None = Field(default=None, ge=0)


class MergeRecord(MergeWords):
    """The options of `merge`, where a bare number as `size` is a multiple of one model."""

    method_for: dict[str, str] | None = None
    sizes: str | None = None
    """Several sizes, with a bundle for each."""
    layout: Literal["links", "pointer"] | None = None
    calibration: str | None = None
    """The folder that `calibrate` wrote."""

    @field_validator("size", mode="before")
    @classmethod
    def _factor(cls, size: Any) -> Any:
        return f"{size:g}x" if isinstance(size, int | float) and not isinstance(size, bool) else size


class GateRecord(Record):
    spec: str
    max_drop: str | None = None
    max_mean_drop: str | None = None

    @model_validator(mode="after")
    def _limits(self) -> "GateRecord":
        if self.max_drop is None and self.max_mean_drop is None:
            raise ValueError("says no limit: max_drop or max_mean_drop, 1% or 1pt")
        return self


class Recipe(Record):
    """A checked recipe."""

    version: Literal[1]
    base: str
    tasks: dict[str, str | TaskSource]
    blocks: str | None = None
    order: OrderRecord = OrderRecord()
    private: tuple[str, ...] = ()
    merge_heads: bool = False
    variant: str | None = None
    ignore: tuple[str, ...] = ()
    with_code: bool = False
    follow_links: bool = False
    statistics: Literal["all", "gram"] | None = None
    adapters: Adapters | None = None
    assume_base: bool = False
    merge: MergeRecord = MergeRecord()
    gate: GateRecord | None = None
    _folder: Path = PrivateAttr(default=Path())
    _warnings: tuple[str, ...] = PrivateAttr(default=())

    @property
    def folder(self) -> Path:
        """The folder of the recipe, to which its paths are relative."""
        return self._folder

    @property
    def warnings(self) -> tuple[str, ...]:
        """What `tasks: FOLDER` left out, and why."""
        return self._warnings

    def task_sources(self) -> dict[str, str]:
        return {name: _source(value) for name, value in self.tasks.items()}

    def order_fields(self) -> dict[str, Any]:
        blocks = self.blocks
        if blocks is not None and (blocks.endswith((".yaml", ".yml")) or "/" in blocks):
            blocks = str(self.folder / blocks)
        return {"blocks": blocks, **self.order.model_dump()}

    def merge_words(self) -> dict[str, Any]:
        """Return the recipe's arguments of `merge_request`."""
        words = {name: value for name, value in self.merge.model_dump().items() if value is not None}
        if "calibration" in words:
            words["calibration"] = str(self.folder / expanded(words["calibration"]))
        return words


def read_recipe(path: Path, access: Access = ONLINE) -> Recipe:
    """Read a recipe. Raises UsageError with file, line and key.

    The words of methods and steps are checked here, not only where they are used: a file that a stranger's recipe
    names must not run because a method was typed.
    """
    document, folder = read_document(path, "recipe"), path.absolute().parent
    place = document.value.get("tasks") if isinstance(document.value, dict) else None
    if isinstance(place, str):
        document.value["tasks"] = {}  # listed below, once the rest is known to be sound
    recipe = document.check(Recipe)
    if isinstance(place, str):
        where = place if is_remote(place) else str(folder / expanded(place))
        found = found_tasks([where], recipe.base, folder, ignore=recipe.ignore, access=access)
        recipe = recipe.model_copy(update={"tasks": found.sources, "ignore": found.patterns})
        recipe._warnings = tuple(found.warnings)
    if not recipe.tasks:
        raise document.error(("tasks",), "names no task", hint="tasks: {NAME: SOURCE}, or a folder")
    recipe._folder = folder
    words = recipe.merge_words()
    sizes = words.pop("sizes", None)
    if sizes is not None:
        if words.keys() & {"size", "merges"}:
            raise UsageError(f"{path}: merge.sizes goes with neither size nor merges", hint="leave one of them out")
        words["size"] = parse_sizes(sizes)[0].text
    try:
        merge_request(**words)
    except MethodMissing:
        pass  # the command line may name one
    return recipe


def _source(value: "str | TaskSource") -> str:
    if isinstance(value, str):
        return value
    if value.revision is None:
        return value.source
    if not is_hub(value.source):
        raise UsageError(
            f"`{value.source}` is a path, which has no revisions", hint="write hf://org/name, or no revision"
        )
    scheme, rest = value.source.split("://", 1)
    repository, colon, folder = rest.partition(":")
    return f"{scheme}://{repository}@{value.revision}{colon}{folder}"
