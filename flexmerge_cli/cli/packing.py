"""Prepares the source of `merge`: a plan, or a recipe, which is planned first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexmerge_cli.allocation.allocate import advice, allocate, auto_found, offers, servable_found
from flexmerge_cli.allocation.layout import BundleLayout, Pricer
from flexmerge_cli.allocation.manifest_bytes import Measured
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.card import Scores
from flexmerge_cli.bundle.publish import bundle_files, check_target
from flexmerge_cli.bundle.unchanged import Unchanged
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.hub import pinned_source
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.cli.options import check_plan_place
from flexmerge_cli.cli.sources import GivenSources, plan_request
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.evaluation.gate import Gate, parse_gate, require_scored
from flexmerge_cli.evaluation.memory import largest_model, require_memory
from flexmerge_cli.evaluation.running import BundleGate, references_of
from flexmerge_cli.evaluation.scores_file import scores_of
from flexmerge_cli.evaluation.spec import EvalSpec, read_spec
from flexmerge_cli.family.family import Family
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.merging import OnProgress, calibration_of, merge
from flexmerge_cli.merging_sizes import at_sizes, merge_sizes
from flexmerge_cli.planning import left_out
from flexmerge_cli.planning.fields import requested_settings
from flexmerge_cli.planning.make import load_plan, make_plan
from flexmerge_cli.report.auto import auto_summary, servable_summary
from flexmerge_cli.report.bundle import merge_summary
from flexmerge_cli.request.merge import MergeRequest, MethodMissing, merge_request
from flexmerge_cli.request.part import Share
from flexmerge_cli.request.recipe import Recipe, read_recipe
from flexmerge_cli.request.size import Size, parse_sizes
from flexmerge_cli.text import expanded


@dataclass(slots=True, kw_only=True)
class Packing:
    """A source and the request for it."""

    source: Path
    recipe: Recipe | None
    request: MergeRequest
    keep_plan: Path | None
    relocate: Mapping[str, str]
    access: Access
    sizes: tuple[Size, ...] = ()
    """Sizes of several bundles; empty for one."""
    plan_folder: Path = field(default_factory=Path)
    source_warnings: tuple[str, ...] = ()
    pricer: Pricer | None = None
    spec: EvalSpec | None = None
    """The evaluation spec of the recipe's gate."""
    limits: Gate = field(default_factory=Gate)
    gate: BundleGate | None = None
    """The recipe's gate, once there is a plan."""
    card: bool = True
    """Whether the bundle gets a card."""
    part: Share | None = None
    """The part of the bundle that is written; None for all of it."""
    join: bool = False
    """Whether to publish a bundle whose parts have all been written."""
    scores: Scores | None = None
    """The scores that the card shows."""

    @staticmethod
    def of(
        source: Path,
        chosen: Mapping[str, Any],
        relocate: Mapping[str, str],
        keep_plan: Path | None,
        access: Access = ONLINE,
        sizes: str | None = None,
    ) -> "Packing":
        """Read the source and parse the request. chosen: arguments of `merge_request`. sizes: those of `--sizes`."""
        if not source.is_file():
            raise SourceError(f"no plan or recipe at {source}", hint="create a plan with `flexmerge plan`")
        recipe = read_recipe(source, access) if source.suffix in (".yaml", ".yml") else None
        if recipe is None and keep_plan is not None:
            raise UsageError(
                "--plan requires a recipe as the source", hint="to merge an existing plan: flexmerge merge plan.json"
            )
        words = {name: value for name, value in chosen.items() if value is not None}
        typed = "method" in words or "method_for" in words  # the user typed it, so a method file may be run
        if recipe:
            of_recipe = recipe.merge_words()
            if sizes is not None or "size" in words or "merges" in words:
                for name in ("size", "sizes", "merges"):
                    of_recipe.pop(name, None)
            words = of_recipe | words
        sizes = words.pop("sizes", sizes)
        several = parse_sizes(sizes) if sizes is not None else ()
        if several and ("size" in words or "merges" in words):
            raise UsageError("--sizes cannot be combined with --size or --merges", hint="leave one of them out")
        words |= {"size": several[0].text} if several else {}
        try:
            request = merge_request(**words, run_files=typed)
        except MethodMissing as error:
            if recipe is not None:
                raise
            dtype = merge_request(dtype=words.get("dtype")).dtype
            raise UsageError(f"{error.message}\n{offers(load_plan(source), dtype)}", hint=error.hint) from None
        request.require_calibration()
        if recipe and request.size is not None:
            request.size.target(num_tasks=len(recipe.tasks), one_model_bytes=1)
        return Packing(
            source=source,
            recipe=recipe,
            request=request,
            keep_plan=keep_plan,
            relocate=relocate,
            access=access,
            sizes=several,
        )

    def check(self, output: Path, *, force: bool) -> None:
        """Check, before anything is read, where the bundle and a kept plan go."""
        made = self.keep_plan is not None and self.keep_plan.is_file()
        if (self.part or self.join) and self.recipe is not None and not made:
            raise UsageError(
                "every part of a bundle would make the recipe's plan", hint="make it first, with `flexmerge plan`"
            )
        check_apart(output, self._inputs())
        if self.sizes and self.recipe is not None and self.recipe.gate is not None:
            raise UsageError("a gate judges one bundle, and --sizes writes several", hint="merge each size by itself")
        if not self.sizes:
            check_target(output, force=force, ours=bundle_files, resumes=True)
        if self.keep_plan is not None:
            check_apart(self.keep_plan, [output, *self._inputs()])
            check_plan_place(self.keep_plan, force=True)
        if self.recipe is not None and self.recipe.gate is not None:
            asked = self.recipe.gate
            self.limits = parse_gate(asked.max_drop, asked.max_mean_drop)
            self.spec = read_spec(self.recipe.folder / asked.spec, tuple(sorted(self.recipe.tasks)))
            require_scored(self.spec, "the recipe's bundle")

    def _inputs(self) -> list[Path]:
        """Return the inputs known before there is a plan. A plan's sources are checked when they are opened."""
        if self.recipe is None:
            return [self.source]
        gate, sources = self.recipe.gate, [self.recipe.base, *self.recipe.task_sources().values()]
        named = [source for source in sources if not is_remote(source)] + ([gate.spec] if gate is not None else [])
        return [self.source, *(self.recipe.folder / expanded(name) for name in named)]

    def local_inputs(self, plan: Plan) -> list[Path]:
        """Return what a merge reads on this disk: models, where the plan says that they are, and the calibration."""
        models = [plan.base.source, *(reader.source for reader in plan.readers)]
        places = [self.plan_folder / expanded(source) for source in models if not is_remote(source)]
        return places + ([Path(self.request.calibration)] if self.request.calibration is not None else [])

    def plan(self, output: Path, **run: Any) -> Plan:
        """Return the plan of the source. A recipe's plan is made, or read from --plan if it has the same sources."""
        if self.recipe is None:
            self.plan_folder = self.source.absolute().parent
            return load_plan(self.source)
        given = plan_request(self.recipe, access=self.access)
        self.source_warnings = given.warnings

        def on_open(family: Family) -> None:
            self.source_warnings += tuple(left_out.warnings(family))

        if self.keep_plan is None:
            assert given.request is not None
            self.plan_folder = output.absolute().parent
            return make_plan(given.request, save_to=self.plan_folder / "plan.json", on_open=on_open, **run)
        self.plan_folder = self.keep_plan.absolute().parent
        if self.keep_plan.is_file():
            plan = load_plan(self.keep_plan)
            if _holds(plan, given, self.plan_folder):
                return plan
        return given.make(save_to=self.keep_plan, on_open=on_open, **run)

    def layout(self, plan: Plan, *, device: str, max_memory: int | None) -> tuple[BundleLayout, list[str]]:
        """Return the layout of what will be written.

        A gate whose spec or data do not fit, or whose models need more memory, is refused before merging.
        """
        if self.spec is not None:
            memory = self.access.memory_left(max_memory)
            if memory is not None:
                require_memory(largest_model(self.spec, plan), 1, memory)
            references = references_of(plan, self.plan_folder, self.spec, relocate=self.relocate, access=self.access)
            on = None if device == "auto" else device
            self.gate = BundleGate(spec=self.spec, gate=self.limits, references=references, device=on)
        calibration = calibration_of(self.request, plan)
        self.pricer = Pricer(plan, gate=self.gate.record if self.gate is not None else None, calibration=calibration)
        layout = allocate(plan, self.request, self.pricer)
        return layout, [*self.source_warnings, *advice(plan, layout, self.pricer)]

    def chosen(self) -> dict[str, Any]:
        """Return what `auto` or `--servable` chose, by its name, after `layout`; nothing for other methods."""
        assert self.pricer is not None
        auto, servable = auto_found(self.pricer, self.request), servable_found(self.pricer, self.request)
        found = {"auto": auto_summary(*auto)} if auto is not None else {}
        return found | ({"servable": servable_summary(servable)} if servable is not None else {})

    def write(
        self,
        plan: Plan,
        layout: BundleLayout,
        output: Path,
        *,
        force: bool,
        on_progress: OnProgress,
        old: Unchanged | None = None,
        **run: Any,
    ) -> Measured:
        def examine(folder: Path) -> Scores | None:
            return None if self.gate is None else scores_of(self.gate.require(folder, on_progress))

        return merge(
            plan, self.request, output, plan_folder=self.plan_folder, relocate=self.relocate, access=self.access,
            force=force, layout=layout, examine=examine, card=self.card, scores=self.scores, on_progress=on_progress,
            part=self.part, join=self.join, old=old, **run,
        )[1]  # fmt: skip

    def merge_sizes(
        self, plan: Plan, output: Path, *, dry_run: bool, force: bool, on_progress: OnProgress, **run: Any
    ) -> dict[str, Any]:
        """Write a bundle of each size, and return what is reported: `bundles`, by size, and `warnings`."""
        calibration = calibration_of(self.request, plan)
        self.pricer = Pricer(plan, calibration=calibration)
        requests = at_sizes(self.request, self.sizes)
        layouts = {size: allocate(plan, request, self.pricer) for size, request in requests.items()}
        found: dict[str, Measured] = {}
        if not dry_run:
            found = merge_sizes(
                plan, {size: (requests[size], layouts[size]) for size in layouts}, output, force=force,
                plan_folder=self.plan_folder, relocate=self.relocate, access=self.access, card=self.card,
                on_progress=on_progress, **run,
            )  # fmt: skip
        bundles = {}
        for size, layout in layouts.items():
            value = merge_summary(layout, output / size, found.get(size), warnings=[], threads=run["threads"])
            bundles[size] = value | {"was_there": size not in found and not dry_run}
        return {"bundles": bundles, "written": not dry_run, "warnings": [*self.source_warnings]}

    def verdict(self) -> dict[str, Any]:
        """Return `evaluation`, and its `gate`, once the bundle was scored."""
        document = self.gate.document if self.gate is not None else None
        return {} if document is None else {"gate": document["gate"], "evaluation": document}


def _holds(plan: Plan, given: GivenSources, folder: Path) -> bool:
    """Return whether a kept plan has the recipe's sources and settings. The merge itself checks the bytes of the
    sources."""
    assert given.request is not None
    request = given.request

    def resolved(source: str, start: Path) -> str:
        return pinned_source(source, request.access) if is_remote(source) else str((start / source).resolve())

    old = {task.name: resolved(task.source, folder) for task in plan.readers} | {"": resolved(plan.base.source, folder)}
    new = {name: resolved(source, request.relative_to) for name, source in request.tasks.items()}
    new[""] = resolved(request.base, request.relative_to)
    settings = plan.settings
    wanted = requested_settings(request)
    if settings.statistics == "all":
        wanted = wanted.model_copy(update={"statistics": "all"})
    return old == new and settings == wanted
