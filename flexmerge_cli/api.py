"""The public API that `from flexmerge_cli import …` provides: a thin layer over the modules that do the work."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flexmerge_cli.allocation.allocate import allocate
from flexmerge_cli.allocation.layout import Pricer
from flexmerge_cli.bundle.apart import check_apart
from flexmerge_cli.bundle.locate import locate
from flexmerge_cli.bundle.verify import Verification
from flexmerge_cli.bundle.verify import verify as _verify
from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.place import is_hub, is_remote
from flexmerge_cli.checkpoint.stream import StreamPool
from flexmerge_cli.errors import UsageError
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.formats.plan_file import Plan, is_plan, save_plan
from flexmerge_cli.merging import calibration_of
from flexmerge_cli.merging import merge as _merge
from flexmerge_cli.opened import OpenBundle
from flexmerge_cli.opened import open_bundle as open_bundle
from flexmerge_cli.planning.make import load_plan as load_plan
from flexmerge_cli.planning.make import make_plan as _make_plan
from flexmerge_cli.request.merge import merge_request
from flexmerge_cli.request.plan import OrderSettings as OrderSettings
from flexmerge_cli.request.plan import PlanRequest
from flexmerge_cli.request.size import parse_sizes
from flexmerge_cli.writing import check_file

WORDS = (
    "steps",
    "calibrate",
    "method_for",
    "merges",
    "fit",
    "cluster",
    "seed",
    "max_distance",
    "layout",
    "calibration",
    "servable",
)
"""Options of `merge` that define the request."""


def make_plan(
    base: str | Path,
    tasks: Mapping[str, str | Path],
    *,
    output: Path | str | None = None,
    order: OrderSettings | None = None,
    private: tuple[str, ...] = (),
    merge_heads: bool = False,
    statistics: Literal["all", "gram"] = "all",
    offline: bool = False,
    stream: bool = False,
    variant: str | None = None,
    adapters: Adapters = "keep",
    assume_base: bool = False,
    ignore: Sequence[str] = (),
    with_code: bool = False,
    follow_links: bool = False,
    **run: Any,
) -> Plan:
    """Read every weight once and make a plan, which holds all that a later merge needs; with `output`, save it there.

    An output replaces only a plan, and must not lie in a source or a bundle.
    base, tasks: paths, `hf://org/name[@revision][:folder]`, or URLs. statistics: `gram` skips those that `auto` needs.
    offline: use only what the Hub's cache holds. stream: read weights over the network, and store none of them.
    variant: the preferred variant of the weights, e.g. `fp16`. adapters: `keep`, `merge` or `pool` tasks that are PEFT
    adapters; assume_base: accept adapters that name another base. ignore: patterns of the sources' files to leave out.
    with_code: carry their Python files. follow_links: follow links out of them, as DVC and git-annex make them. run:
    device, threads, max_memory, on_progress, and on_open, which gets the opened sources before the weights are read.
    Raises SourceError, DataError, UsageError.
    """
    request = PlanRequest(
        base=str(base),
        tasks={name: str(source) for name, source in tasks.items()},
        order=order or OrderSettings(),
        private=private,
        merge_heads=merge_heads,
        statistics=statistics,
        access=replace(
            _access(offline, stream, run.get("max_memory"), variant),
            ignore=tuple(ignore),
            with_code=with_code,
            follow_links=follow_links,
        ),
        adapters=adapters,
        assume_base=assume_base,
    )
    path = Path(output) if output is not None else None
    if path is not None:
        rules = Path(request.order.blocks)
        check_apart(path, [base, *tasks.values(), rules if rules.is_file() else None])
        check_file(path, force=True, replaceable=is_plan, what="a plan of flexmerge")
    plan = _make_plan(request, save_to=path, **run)
    if path is not None:
        save_plan(plan, path)
    return plan


def change_plan(
    plan: Path | str,
    *,
    add: Mapping[str, str | Path] | None = None,
    remove: Collection[str] = (),
    output: Path | str,
    order: OrderSettings | None = None,
    offline: bool = False,
    stream: bool = False,
    **run: Any,
) -> Plan:
    """Make and save a plan of a saved plan's tasks, with some added and some removed. It equals one made from scratch.

    add: maps names to sources, relative to the working directory. order: by default the old plan's; required if that
    plan was made with a rules file. Less is read than for a plan from scratch. run: as in `make_plan`.
    Raises UsageError for added tasks that exist or removed ones that do not, DataError for sources that changed.
    """
    from flexmerge_cli.planning.changed import changed_request
    from flexmerge_cli.planning.known import Known

    source, path = Path(plan), Path(output)
    old, added = load_plan(source), {name: str(model) for name, model in (add or {}).items()}
    if order is None:
        if old.settings.blocks == "rules":
            raise UsageError(
                "the plan was made with a rules file", hint='give it: order=OrderSettings(blocks="rules.yaml")'
            )
        names = ("blocks", "linkage", "strategy", "similarity", "seed")
        order = OrderSettings(**{name: getattr(old.settings, name) for name in names})
    access = _access(offline, stream, run.get("max_memory"))
    request = changed_request(old, source.absolute().parent, added, remove, order=order, statistics=None, access=access)
    check_apart(path, [source, *added.values()])
    check_file(path, force=True, replaceable=is_plan, what="a plan of flexmerge")
    found = _make_plan(request, save_to=path, known=Known(plan=old, new=frozenset(added)), **run)
    save_plan(found, path)
    return found


def update(
    bundle: Path | str,
    plan: Path | str,
    output: Path | str,
    *,
    force: bool = False,
    offline: bool = False,
    stream: bool = False,
    device: str = "auto",
    **options: Any,
) -> OpenBundle:
    """Write the bundle that `merge` makes of a new plan as the old bundle was made, and open it.

    What does not change is taken from the old bundle, as hard links where possible. With force, output may be the old
    bundle. options: relocate, card, threads, max_memory, on_progress, as in `merge`.
    Raises UsageError for a bundle of another base or of other tasks, IntegrityError if what is taken over is damaged.
    """
    from flexmerge_cli.updating import Update

    path, place = Path(plan), Path(output)
    found = Update.of(Path(bundle), load_plan(path), device=device)
    found.check(place, path, force=force)
    access = _access(offline, stream, options.get("max_memory"))
    found.write(place, plan_folder=path.absolute().parent, access=access, force=force, device=device, **options)
    return OpenBundle(place)


def diff(a: Path | str, b: Path | str, *, offline: bool = False) -> dict[str, Any]:
    """Compare two plans or two bundles. Returns the document of `flexmerge diff --json`; `equal` says whether they are.

    Bundles may be on the Hub; weights are not read. Raises UsageError for anything else, or for a plan and a bundle.
    """
    from flexmerge_cli.bundle.differences import diff_value

    return diff_value(str(a), str(b), _access(offline, False, None))


def push(
    bundle: Path | str,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    per_task: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish what changed of a bundle on the Hub, in one commit, or in an object store. Returns the document of
    `flexmerge push --json`.

    repository: `hf://org/name`, created if it does not exist, or an address such as `s3://bucket/folder`. dry_run: only
    compare.
    Raises IntegrityError for a damaged bundle, SourceError if the repository cannot be written or has changed
    meanwhile, UsageError for `private` if the repository exists and is public.
    """
    from flexmerge_cli.bundle.push import push_bundle
    from flexmerge_cli.bundle.store import push_to_store

    if is_remote(repository) and not is_hub(repository):
        if private or per_task or revision is not None:
            raise UsageError("private, revision and per_task are for repositories of the Hub", hint="leave them out")
        sent = push_to_store(Path(bundle), repository, dry_run=dry_run)
        return {"pushed": not dry_run, "repositories": {repository: sent}}
    return push_bundle(Path(bundle), repository, private=private, revision=revision, per_task=per_task, dry_run=dry_run)


def merge(
    plan: Plan | Path | str,
    output: Path | str,
    *,
    method: str | None = None,
    size: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    sources_relative_to: Path | str | None = None,
    offline: bool = False,
    stream: bool = False,
    **options: Any,
) -> OpenBundle:
    """Write a bundle and open it. `size` is `2.25x`, `40%` or `600MiB`. Without a method nothing is merged.

    A method may come from a file, `./my.py#NAME`, which is run.
    sources_relative_to: folder of the plan's relative sources; by default that of the plan file, or the current one.
    options: steps, calibrate, method_for, merges, fit, cluster, seed, max_distance, layout, calibration and servable,
    with the values of the command line; relocate, a mapping; card, whether README.md is written; device, threads,
    max_memory, on_progress.
    offline, stream: as in `make_plan`.
    Raises UsageError for unknown words, and for options that would have no effect.
    """
    if is_remote(str(output)):
        raise UsageError(f"{output}: Python writes bundles to folders", hint="merge into one, and then: push")
    path = None if isinstance(plan, Plan) else Path(plan)
    folder = Path(sources_relative_to) if sources_relative_to else path.parent if path else Path.cwd()
    words = {key: options.pop(key) for key in WORDS if key in options}
    if words.get("calibration") is not None:
        words["calibration"] = str(words["calibration"])
    request = merge_request(method=method, size=size, dtype=dtype, run_files=True, **words)
    request.require_calibration()
    relocate, access = options.pop("relocate", None), _access(offline, stream, options.get("max_memory"))
    loaded = plan if isinstance(plan, Plan) else load_plan(plan)
    _merge(loaded, request, Path(output), plan_folder=folder, relocate=relocate, access=access, force=force, **options)
    return OpenBundle(output)


def merge_sizes(
    plan: Path | str,
    output: Path | str,
    *,
    method: str | None = None,
    sizes: str,
    dtype: str | None = None,
    force: bool = False,
    offline: bool = False,
    stream: bool = False,
    **options: Any,
) -> dict[str, OpenBundle]:
    """Write a bundle of each size to `output/SIZE`, in one read of the weights, and open them.

    They equal single merges.

    sizes: `1.5x,2x,4x` or `1x:8x:1x`. A size whose bundle is already there is skipped. options: as in `merge`.
    """
    from flexmerge_cli.merging_sizes import at_sizes
    from flexmerge_cli.merging_sizes import merge_sizes as _merge_sizes

    path, folder, several = Path(plan), Path(output), parse_sizes(sizes)
    words = {key: options.pop(key) for key in WORDS if key in options}
    request = merge_request(method=method, size=several[0].text, dtype=dtype, run_files=True, **words)
    loaded, access = load_plan(path), _access(offline, stream, options.get("max_memory"))
    pricer = Pricer(loaded, calibration=calibration_of(request, loaded))
    bundles = {size: (one, allocate(loaded, one, pricer)) for size, one in at_sizes(request, several).items()}
    check_apart(folder, [path])
    place = path.absolute().parent
    _merge_sizes(loaded, bundles, folder, force=force, plan_folder=place, access=access, **options)
    return {size: OpenBundle(folder / size) for size in bundles}


def calibrate(
    plan: Path | str,
    spec: Path | str,
    output: Path | str,
    *,
    statistics: str | None = None,
    examples: int = 256,
    through: str | None = None,
    size: str | None = None,
    device: str | None = None,
    relocate: Mapping[str, str] | None = None,
    force: bool = False,
    offline: bool = False,
    stream: bool = False,
) -> None:
    """Run each fine-tuned model of a plan on a few examples, and write what it measured to the folder `output`.

    spec: as for `evaluate`, without metrics and labels. statistics: some of `inputs,fisher,outputs`; by default the
    first two. examples: of each task, at most. through, size: measure inputs through a merge by this method, block by
    block, as RegMean++ does. `merge` takes the folder as `calibration`.
    Raises UsageError, SourceError, DataError for activations that are not finite, MachineError.
    """
    from flexmerge_cli.calibration.make import calibrate
    from flexmerge_cli.calibration.request import calibration_request

    request = calibration_request(
        Path(plan),
        Path(spec),
        statistics=statistics,
        examples=examples,
        through=through,
        size=size,
        device=device,
        relocate=relocate,
        access=_access(offline, stream, None),
    )
    calibrate(request, Path(output), force=force)


def tune(
    plan: Path | str,
    spec: Path | str,
    output: Path | str,
    *,
    method: str = "adamerging",
    bundle: Path | str | None = None,
    examples: int = 256,
    device: str | None = None,
    relocate: Mapping[str, str] | None = None,
    force: bool = False,
    offline: bool = False,
    stream: bool = False,
) -> None:
    """Find a weight for each task and block on unlabelled examples, and write them to the file `output`.

    spec: as for `calibrate`. method: `adamerging`, `concrete` or `fw_merging`, with arguments as `NAME:key=value,…`.
    examples: of each task, at most. `merge` takes the file as `weighted_average:weights=@FILE,normalize=count`. With a
    bundle, `surgery` writes to the folder `output` a copy of it that corrects what the last layers of its models get,
    and `wemoe` one with routers that weigh its experts.
    Raises UsageError, SourceError, DataError, IntegrityError, MachineError.
    """
    from flexmerge_cli.calibration.tune import fitting_request, tune, tune_request

    access = _access(offline, stream, None)
    asked: dict[str, Any] = {"examples": examples, "device": device, "relocate": relocate, "access": access}
    if bundle is not None:
        opened = locate(str(bundle), access).open()
        fitting_request(Path(plan), Path(spec), method=method, bundle=opened, **asked)(Path(output), force=force)
        return
    tune(tune_request(Path(plan), Path(spec), method=method, **asked), Path(output), force=force)


def evaluate(
    bundle: Path | str,
    spec: Path | str,
    *,
    plan: Path | str | None = None,
    max_drop: str | None = None,
    max_mean_drop: str | None = None,
    cross: bool = False,
    corrupt: Sequence[str] = (),
    router: bool = False,
    device: str | None = None,
    reuse: bool = True,
    parallel: int = 1,
    offline: bool = False,
    stream: bool = False,
    max_memory: int | None = None,
    allow_exec: bool = False,
) -> dict[str, Any]:
    """Score every task of a bundle as `eval.yaml` at `spec` says. Returns the document of `flexmerge eval --json`.

    plan: the plan whose sources the scores are compared with; by default those that the spec names.
    max_drop, max_mean_drop: `1%` or `1pt`. The verdict is under `gate`; a failure raises nothing. It fails if a task of
    the bundle is neither scored nor named under `not_scored` in the spec. cross: also score every model on the other
    tasks' data. router: also score with the tasks that the bundle's router chooses.
    corrupt: `["gaussian_noise@3"]` also scores images with that corruption.
    reuse=False: compute all scores, and replace cached ones. offline, stream: as in `make_plan`.
    max_memory: bytes for the weights of the models in memory at a time.
    Raises UsageError, SourceError, DataError, IntegrityError if a file that a scored task reads is damaged.
    """
    from flexmerge_cli.evaluation.gate import parse_gate
    from flexmerge_cli.evaluation.running import score_request, scores

    request = score_request(
        str(bundle),
        Path(spec),
        plan=Path(plan) if plan is not None else None,
        device=device,
        reuse=reuse,
        parallel=parallel,
        allow_exec=allow_exec,
        access=_access(offline, stream, max_memory),
        max_memory=max_memory,
        cross=cross,
        corrupt=corrupt,
        router=router,
        gate=parse_gate(max_drop, max_mean_drop),
    )
    return scores(request)


def draw_curve(
    plan: Path | str,
    spec: Path | str,
    *,
    methods: str | Sequence[str] = "task_arithmetic",
    sizes: str | None = None,
    max_drop: str | None = None,
    max_mean_drop: str | None = None,
    choose: float | None = None,
    tune: str | None = None,
    tune_spec: Path | str | None = None,
    ensembles: bool = False,
    plane: str | None = None,
    reuse: bool = True,
    parallel: int = 1,
    device: str = "auto",
    threads: int | None = None,
    relocate: Mapping[str, str] | None = None,
    offline: bool = False,
    stream: bool = False,
    max_memory: int | None = None,
    allow_exec: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score a plan's tasks with every method at every size, without writing bundles, like `flexmerge curve --json`.

    methods: one or several; `all` is every method. sizes: `0.75x:8x:0.25x` or `1x,2x`; None: each method's own.
    max_drop, max_mean_drop: as in `evaluate`; a verdict per point. choose: the part of the fine-tuned score to keep, in
    (0, 2]; `chosen` in the document says which point does; if none does, nothing is raised. tune:
    `scale=0.5:2.5:0.25`, chosen on the data of tune_spec.
    ensembles: also score ensembles of the fine-tuned models that have the same labels. plane: `A,B`, two tasks that
    are also scored on the plane through the base and their fine-tuned models.
    options: steps, calibrate, calibration, method_for, fit,
    cluster, seed and dtype, as in `merge`. offline, stream: as in `make_plan`. max_memory: as in `evaluate`, and for
    what makes the points.
    Raises UsageError, SourceError, DataError, GateError if choose is given and the spec does not mention all tasks.
    """
    from flexmerge_cli.evaluation.curve_document import curve_document
    from flexmerge_cli.evaluation.gate import parse_gate

    return curve_document(
        Path(plan),
        Path(spec),
        methods=methods,
        sizes=sizes,
        words=options,
        gate=parse_gate(max_drop, max_mean_drop),
        target=choose,
        tune=tune,
        tune_spec_path=Path(tune_spec) if tune_spec is not None else None,
        ensembles=ensembles,
        plane=plane,
        allow_exec=allow_exec,
        relocate=relocate or {},
        access=_access(offline, stream, max_memory),
        reuse=reuse,
        parallel=parallel,
        device=device,
        threads=threads,
        max_memory=max_memory,
    )


def verify(path: Path | str, *, decode: bool = False) -> Verification:
    """Check every byte against the manifest, and with decode=True also every decoded tensor."""
    return _verify(locate(str(path)).path, decode=decode)


def export(
    bundle: Path | str,
    task: str | Sequence[str],
    output: Path | str,
    *,
    force: bool = False,
    link: bool = False,
    merged: bool = False,
) -> None:
    """Export a task as an ordinary checkpoint folder. From a bundle on the Hub, only its files are downloaded.

    task: a name, or a list of names, each of which gets a subfolder of `output`; all of them are written or none.
    merged: export a kept adapter as the full model that it produces, not as an adapter.
    Raises UsageError, SourceError, IntegrityError, MachineError.
    """
    from flexmerge_cli.bundle.export import export_task, export_tasks

    tasks = [task] if isinstance(task, str) else list(task)
    opened = locate(str(bundle), tasks=tasks).open()
    if isinstance(task, str):
        export_task(opened, task, Path(output), force=force, link=link, merged=merged)
    else:
        export_tasks(opened, tasks, Path(output), force=force, link=link, merged=merged)


def _access(offline: bool, stream: bool, max_memory: int | None, variant: str | None = None) -> Access:
    pool = StreamPool.within(max_memory) if stream else None
    return Access(offline=offline, stream=pool, variant=variant)
