"""Declares the options of all commands, each once, in the panels in which the help shows them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flexmerge_cli.checkpoint.access import Access


def _panel(title: str) -> Callable[..., Any]:
    """Return a function that declares options of a panel: names, what stands for the value in the help (empty for a
    flag), and the help."""

    def declare(*words: str, **more: Any) -> Any:
        *names, metavar, text = words
        return typer.Option(*names, metavar=metavar or " ", help=text, rich_help_panel=title, **more)

    return declare


_sources, _stored, _sizes = _panel("Sources"), _panel("What is stored"), _panel("How much is stored")
_order, _scores, _gates = _panel("Merge order"), _panel("Scores"), _panel("Gates and choices")
_run, _output = _panel("How it runs"), _panel("Output")
option = _panel("Options")  # for an option of one command, declared in its file

# Sources.
PlanSource = Annotated[
    Path | None,
    typer.Argument(metavar="[RECIPE|PLAN]", help="A recipe.yaml, or a plan.json to derive a new plan from."),
]
PlanOrRecipe = Annotated[Path, typer.Argument(metavar="PLAN|RECIPE", help="A plan.json or a recipe.yaml.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")]
Inspected = Annotated[
    str, typer.Argument(help="A checkpoint (path or hf://...), a plan.json, or a bundle.", metavar="SOURCE")
]
Bundle = Annotated[str, typer.Argument(help="Folder of the bundle, or hf://org/name.", metavar="BUNDLE")]
BundleOrNone = Annotated[
    str | None, typer.Argument(help="Folder of the bundle, or hf://org/name.", metavar="[BUNDLE]", show_default=False)
]
Base = Annotated[str | None, _sources("--base", "MODEL", "The pre-trained model.")]
Tasks = Annotated[
    list[str] | None,
    _sources(
        "--tasks",
        "FOLDER…",
        "Fine-tunes: folders or hf://org/name with one in each subfolder, or the fine-tunes themselves.",
    ),
]
Task = Annotated[
    list[str] | None,
    _sources("--task", "NAME=MODEL", "One fine-tune; repeatable. Without NAME= it is named after its folder."),
]
Add = Annotated[
    list[str] | None, _sources("--add", "NAME=MODEL", "Add this fine-tune to the tasks of a plan.json; repeatable.")
]
Remove = Annotated[list[str] | None, _sources("--remove", "NAME", "Remove this task from a plan.json; repeatable.")]
Ignore = Annotated[
    list[str] | None,
    _sources("--ignore", "NAME", "Skip this subfolder of --tasks, or source files with matching names; repeatable."),
]
FollowLinks = Annotated[
    bool, _sources("--follow-links", "", "Follow links out of the sources, as DVC and git-annex make them.")
]
WithCode = Annotated[
    bool, _sources("--with-code", "", "Include the Python files of the sources, which loaders may run.")
]
Adapters = Annotated[
    str | None,
    _sources(
        "--adapters",
        "keep|merge|pool",
        "What to do with PEFT adapters: keep them unchanged beside the base (default), merge each into the "
        "base and treat it like any fine-tune, or pool them, which merges them with one another.",
    ),
]
AssumeBase = Annotated[bool, _sources("--assume-base", "", "Accept --base for adapters that name a different base.")]
Variant = Annotated[
    str | None,
    _sources(
        "--variant", "NAME", "Prefer this weight variant where a source has it, e.g. fp16: model.fp16.safetensors."
    ),
]
Relocate = Annotated[
    list[str] | None,
    _sources(
        "--relocate", "OLD=NEW", "Replace the beginning of the paths of a plan's sources that have moved; repeatable."
    ),
]
Offline = Annotated[bool, _sources("--offline", "", "Use only what the Hub cache holds, like HF_HUB_OFFLINE=1.")]
Stream = Annotated[
    bool,
    _sources(
        "--stream", "", "Read the weights of hf://, s3://, gs:// and https:// sources over the network; store none."
    ),
]

# The merge order.
Blocks = Annotated[
    str | None,
    _order(
        "--blocks",
        "UNIT|FILE",
        "Unit of merging: component, layer, tensor, model, or a rules.yaml. With --linkage average, `model` "
        "clusters whole models, to be merged at --size Kx.",
    ),
]
Linkage = Annotated[
    str | None, _order("--linkage", "NAME", "Similarity of groups: complete, average, single or centroid.")
]
Strategy = Annotated[
    str | None, _order("--strategy", "NAME", "Merge order: greedy, left-to-right, right-to-left or random.")
]
Similarity = Annotated[str | None, _order("--similarity", "NAME", "Similarity of tasks: cosine, euclidean or sign.")]
OrderSeed = Annotated[int | None, _order("--seed", "N", "Seed of --strategy random.", min=0)]
Private = Annotated[
    list[str] | None, _order("--private", "PATTERN", "Never merge tensors whose names match this pattern; repeatable.")
]
MergeHeads = Annotated[bool, _order("--merge-heads", "", "Merge task heads of equal shape.")]
StatisticsWord = Annotated[
    str | None,
    _order("--statistics", "all|gram", "all (default), or gram, which skips the statistics that --method auto needs."),
]

# What is stored, and how much.
Method = Annotated[
    str | None,
    _stored(
        "--method",
        "NAME",
        "Merging method: auto, a preset such as residual-2bit, or NAME[:key=value,...]; see `flexmerge methods`.",
    ),
]
CurveMethods = Annotated[
    list[str] | None,
    _stored(
        "--method",
        "NAME",
        "A method, such as auto or low_bit:bits=2, or all; repeatable. Default: task_arithmetic.",
    ),
]
AllMethods = Annotated[bool, _output("--all-methods", "", "List what every method would store.")]
Step = Annotated[
    list[str] | None, _stored("--step", "NAME", "Apply this step before the method, e.g. dare:p=0.9; repeatable.")
]
Calibrate = Annotated[str | None, _stored("--calibrate", "NAME", "Apply this calibration after the method: svc.")]
Calibration = Annotated[
    Path | None,
    _stored("--calibration", "FOLDER", "Output of `calibrate`, for regmean, fisher, and auto."),
]
MethodFor = Annotated[
    list[str] | None,
    _stored(
        "--method-for",
        "PATTERN=METHOD",
        "Use this method for matching blocks; `keep` leaves them unmerged; repeatable.",
    ),
]
Servable = Annotated[
    str | None,
    _stored(
        "--servable",
        "lora:rank=N",
        "Instead of a method: store one base and low-rank residuals, which engines serve as adapters.",
    ),
]
Dtype = Annotated[str | None, _stored("--dtype", "bf16|fp16|fp32", "Cast stored tensors.")]
Layout = Annotated[
    str | None,
    _stored(
        "--layout",
        "links|pointer",
        "How tasks/NAME refers to weights that need no decoding: by links (default) or by an index of files.",
    ),
]
Size = Annotated[
    str | None,
    _sizes(
        "--size", "SIZE", "Bundle size: 2.25x one model, 40% of all copies, or bytes on disk (600MiB, 6GB, 123456B)."
    ),
]
Sizes = Annotated[
    str | None,
    _sizes(
        "--sizes",
        "SIZES",
        "Several sizes: 1x,2x,600MiB or 0.75x:8x:0.25x (from, to, step). `merge` writes each to FOLDER/SIZE; `curve` "
        "draws each, by default sizes that suit each method.",
    ),
]
Merges = Annotated[int | None, _sizes("--merges", "N", "Stop after N merges instead of at a size.")]
Fit = Annotated[
    str | None,
    _sizes(
        "--fit",
        "tight|prefix",
        "tight (default): undo merges while the size still fits; prefix: undo none, as in the paper.",
    ),
]
Cluster = Annotated[
    str | None, _sizes("--cluster", "channels", "Group tasks by k-means in every tensor; requires a size of Kx.")
]
ClusterSeed = Annotated[
    int | None, _sizes("--seed", "N", "Seed of the k-means initialisation; requires --cluster.", min=0)
]
MaxDistance = Annotated[
    float | None, _sizes("--max-distance", "NUMBER", "Publish only if no task's distance is larger.", min=0)
]

# Scores.
Spec = Annotated[Path | None, _scores("--spec", "FILE", "eval.yaml: the examples of each task.")]
ComparedPlan = Annotated[
    Path | None, _scores("--plan", "FILE", "Plan whose sources to compare with, or to score with --sources.")
]
ScoreSources = Annotated[
    bool, _scores("--sources", "", "Score the fine-tuned models and the base, which normalised scores are relative to.")
]
Cross = Annotated[bool, _scores("--cross", "", "Also score every model on the other tasks' data, with its own head.")]
Ensembles = Annotated[
    bool, _scores("--ensembles", "", "Also score ensembles of the fine-tuned models that have the same labels.")
]
Plane = Annotated[
    str | None, _scores("--plane", "TASK,TASK", "Also score two tasks on the plane of the base and their models.")
]
Corrupt = Annotated[
    list[str] | None,
    _scores("--corrupt", "NAME@SEVERITY", "Also score images with this corruption, e.g. gaussian_noise@3; repeatable."),
]
CalibrationStatistics = Annotated[
    str | None,
    _stored("--statistics", "NAMES", "What to measure: some of inputs,fisher,outputs. Default: inputs,fisher."),
]
Through = Annotated[
    str | None,
    _stored("--through", "METHOD", "Measure inputs through a merge by this method, block by block (RegMean++)."),
]
Examples = Annotated[int, _scores("--examples", "N", "How many examples of each task to use.", min=1)]
Router = Annotated[bool, _scores("--router", "", "Also score with the tasks that the bundle's router chooses.")]
Init = Annotated[bool, _scores("--init", "", "Write a starter spec for a bundle to -o.")]
NoReuse = Annotated[bool, _scores("--no-reuse", "", "Compute every score anew, even if it is cached.")]
AllowExec = Annotated[bool, _scores("--allow-exec", "", "Run the code that the spec names: kinds python and command.")]
MaxDrop = Annotated[
    str | None,
    _gates(
        "--max-drop",
        "LIMIT",
        "How much each task may lose: 1% of its fine-tuned score, or 1pt. Exit with 6 if one loses more.",
    ),
]
MaxMeanDrop = Annotated[
    str | None,
    _gates("--max-mean-drop", "LIMIT", "How much the mean over tasks may lose. Exit with 6 if it loses more."),
]
Choose = Annotated[
    float | None,
    _gates(
        "--choose",
        "PART",
        "Find the smallest size that keeps this fraction of the fine-tuned score, e.g. 0.99. Exit with 6 if none does.",
    ),
]
Tune = Annotated[
    str | None,
    _gates("--tune", "NAME=VALUES", "Try these values, e.g. scale=0.5:2.5:0.25, and take the best on --tune-spec."),
]
TuneSpec = Annotated[
    Path | None,
    _gates("--tune-spec", "FILE", "Data to choose and tune on; --choose without it uses one half of the data."),
]

# How it runs.
Device = Annotated[str, _run("--device", "DEVICE", "Where to compute: auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, _run("--threads", "N", "Number of worker threads. Default: one per core.", min=1)]
Parallel = Annotated[
    int, _run("--parallel", "N", "Number of tasks, or of methods, to score at once, each in its own process.", min=1)
]
MaxMemory = Annotated[
    str | None,
    _run(
        "--max-memory",
        "BYTES",
        "Limit on anonymous memory, e.g. 8GiB. Where models run, it covers their weights, not their activations.",
    ),
]
Part = Annotated[
    str | None,
    _run(
        "--part",
        "I/N",
        "Do one of N parts of the work, e.g. 3/16, while other processes do the others; see --join.",
    ),
]
Workers = Annotated[
    str | None,
    _run("--workers", "ray[:ADDRESS]", "Have a Ray cluster do the work in parts; this process joins them."),
]
Join = Annotated[
    bool, _run("--join", "", "Join the parts that the same command wrote with --part, and publish the bundle.")
]
JoinParts = Annotated[
    list[Path] | None, _run("--join", "PART…", "Join these parts, which `plan --part` wrote, into the plan.")
]
DryRun = Annotated[bool, _run("--dry-run", "", "Report what would be done. Write nothing and read no weights.")]

# Output.
PlanOutput = Annotated[Path | None, _output("-o", "--output", "FILE", "Where to write plan.json.")]
BundlePlace = Annotated[
    str, _output("-o", "--output", "FOLDER", "Folder, or address such as s3://bucket/folder, to write the bundle to.")
]
BundleOutput = Annotated[Path, _output("-o", "--output", "FOLDER", "Folder to write the bundle to.")]
CalibrationOutput = Annotated[Path | None, _output("-o", "--output", "FOLDER", "Folder to write the calibration to.")]
ExportOutput = Annotated[
    Path, _output("-o", "--output", "FOLDER", "Folder to write; several tasks get one subfolder each.")
]
SpecOutput = Annotated[Path | None, _output("-o", "--output", "FILE", "Where --init writes the spec, e.g. eval.yaml.")]
KeptPlan = Annotated[Path | None, _output("--plan", "FILE", "Save the recipe's plan here and reuse it.")]
Csv = Annotated[Path | None, _output("--csv", "FILE", "Write a table with one score per row.")]
Html = Annotated[Path | None, _output("--html", "FILE", "Write a self-contained HTML report.")]
NoCard = Annotated[bool, _output("--no-card", "", "Write no README.md, which explains the bundle to people.")]
CardScores = Annotated[
    Path | None, _output("--scores", "FILE", "Output of `eval bundle/ --json`, for the table of tasks in README.md.")
]
Png = Annotated[Path | None, _output("--png", "FILE", "Write a picture of the curve.")]
Force = Annotated[bool, _output("--force", "", "Replace an existing output.")]
Json = Annotated[bool, _output("--json", "", "Print one JSON document and nothing else.")]
Quiet = Annotated[bool, _output("-q", "--quiet", "", "Print nothing but errors, and with --json the result.")]
Verbose = Annotated[
    bool, _output("-v", "--verbose", "", "Show how long each stage took, and print long tables in full.")
]


def memory_of(text: str | None) -> int | None:
    """Return --max-memory in bytes."""
    from flexmerge_cli.request.size import parse_bytes

    return parse_bytes(text) if text else None


def access_of(
    *,
    offline: bool,
    quiet: bool,
    variant: str | None = None,
    stream: bool = False,
    max_memory: int | None = None,
) -> "Access":
    """Return how the run reaches its sources. Downloads are reported on stderr."""
    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.checkpoint.stream import StreamPool
    from flexmerge_cli.cli.output import note

    pool = StreamPool.within(max_memory) if stream else None
    return Access(offline=offline, variant=variant, stream=pool, on_message=lambda message: note(message, quiet=quiet))


def relocations(items: list[str] | None) -> dict[str, str]:
    """Parse --relocate OLD=NEW into {OLD: NEW}. Raises UsageError."""
    from flexmerge_cli.errors import UsageError

    pairs = {}
    for item in items or ():
        old, equals, new = item.partition("=")
        if not equals or not old or not new:
            raise UsageError(
                f"--relocate {item} is not of the form OLD=NEW", hint="for example --relocate /old/place=/new/place"
            )
        pairs[old] = new
    return pairs


def check_part_place(path: Path, *, force: bool) -> None:
    """Check, before any work, that a part of a plan can be written there and would replace nothing but one."""
    from flexmerge_cli.formats.plan_part import is_part
    from flexmerge_cli.writing import check_file

    check_file(path, force=force, replaceable=is_part, what="a part of a plan")


def check_plan_place(path: Path, *, force: bool) -> None:
    """Check, before any work, that a plan can be written there and would replace nothing but a plan."""
    from flexmerge_cli.formats.plan_file import is_plan
    from flexmerge_cli.writing import check_file

    check_file(path, force=force, replaceable=is_plan, what="a plan of flexmerge")
