"""Options that several commands have, and how results, messages and progress are shown."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.errors import FlexmergeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress and no messages.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Tell more, and where the time went.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: the cores.")]
MemoryOption = Annotated[str | None, typer.Option("--max-memory", help="Anonymous memory of the run, e.g. 8GiB.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Cast what is stored: bf16, fp16 or fp32.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Of the Hub use what its cache holds, as with HF_HUB_OFFLINE=1.")
]
RelocateOption = Annotated[
    list[str] | None, typer.Option("--relocate", help="OLD=NEW for sources of a plan that moved.")
]
VariantOption = Annotated[
    str | None,
    typer.Option("--variant", help="Weights of this variant where a source has it, e.g. fp16: model.fp16.safetensors."),
]
StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream", help="Read weights of hf://, s3://, gs:// and https:// sources where they are; store none of them."
    ),
]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="auto, or NAME[:key=value,...]: see `flexmerge methods`.")
]
StepOption = Annotated[list[str] | None, typer.Option("--step", help="Before the method, e.g. dare:p=0.9; repeatable.")]
CalibrateOption = Annotated[str | None, typer.Option("--calibrate", help="After the method: svc.")]
MethodForOption = Annotated[
    list[str] | None,
    typer.Option("--method-for", help="PATTERN=METHOD for blocks; `keep` merges nothing there."),
]
SpecOption = Annotated[Path | None, typer.Option("--spec", help="eval.yaml: the data to score each task on.")]
AllowExecOption = Annotated[
    bool, typer.Option("--allow-exec", help="Run the code that the spec names: kinds python and command.")
]
NoReuseOption = Annotated[
    bool, typer.Option("--no-reuse", help="Compute every score anew, also where weights and data are known.")
]
CsvOption = Annotated[Path | None, typer.Option("--csv", help="A table with one score per row.")]
MaxDropOption = Annotated[
    str | None,
    typer.Option("--max-drop", help="Gate: how much each task may lose, 1% of its fine-tuned score or 1pt; exit 6."),
]
MaxMeanDropOption = Annotated[
    str | None, typer.Option("--max-mean-drop", help="Gate: how much the mean over tasks may lose.")
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="2.25x of one model, 40% of all copies, or bytes on disk: 600MiB, 6GB, 123456B."),
]
MergesOption = Annotated[int | None, typer.Option("--merges", help="Cut after N merges, instead of at a size.")]
FitOption = Annotated[
    str | None, typer.Option("--fit", help="tight (default): undo merges that still fit; prefix: the paper's cut.")
]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", help="channels: group tasks by k-means in every tensor; goes with --size Kx.")
]


def memory_of(text: str | None) -> int | None:
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
    """How sources are had; what is fetched is told on stderr."""
    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.checkpoint.stream import StreamPool

    pool = StreamPool.within(max_memory) if stream else None
    return Access(offline=offline, variant=variant, stream=pool, on_message=lambda message: note(message, quiet=quiet))


def emit(value: Any, *, as_json: bool, show: Callable[[Any], None]) -> None:
    """A result, when all else is done: JSON in ASCII, which any encoding and terminal takes, or what `show` prints."""
    from flexmerge_cli.cli.terminal import OutputLost

    try:
        if as_json:
            print(json.dumps(value, indent=2))
        else:
            show(value)
        sys.stdout.flush()
    except OutputLost as lost:
        lost.hint = "the command did what was asked of it; only what it had to say is lost"
        raise


def warn(messages: Iterable[str], *, quiet: bool = False) -> None:
    for message in () if quiet else messages:
        note(f"warning: {message}")


def note(message: str, *, quiet: bool = False) -> None:
    """On stderr. Further lines are indented: a line break in a name must not begin a message of its own."""
    from flexmerge_cli.report.text import visible

    first, *rest = visible(message).split("\n")  # here, and not only in the stream: rich obeys before it hands on
    if not quiet:
        print(first, *(line if not line or line[0] == " " else f"  {line}" for line in rest), sep="\n", file=sys.stderr)


def tell(error: "FlexmergeError") -> None:
    """An error, on stderr."""
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")


@contextmanager
def progress(*, quiet: bool, verbose: bool = False, counts: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on a terminal's stderr; nothing elsewhere. With verbose, the seconds of each stage.

    counts: what is done are things, not bytes.
    """
    started: dict[str, float] = {}

    def timed(what: str) -> None:
        started.setdefault(what, time.perf_counter())

    if quiet or not sys.stderr.isatty():
        yield lambda what, _done, _total: timed(what)
    else:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [MofNCompleteColumn()] if counts else [DownloadColumn(), TransferSpeedColumn()]
        with bars_on_stderr(BarColumn(), *columns, TimeRemainingColumn()) as bars:
            shown: dict[str, Any] = {}

            def update(what: str, done: int, total: int) -> None:
                timed(what)
                if what not in shown:
                    shown[what] = bars.add_task(what, total=total)
                bars.update(shown[what], completed=done)

            yield update
    if verbose and started:
        ends = [*list(started.values())[1:], time.perf_counter()]
        for (what, start), end in zip(started.items(), ends):
            print(f"{end - start:8.2f} s  {what}", file=sys.stderr)


def bars_on_stderr(*columns: "ProgressColumn") -> "Progress":
    """Bars with these columns after their descriptions; they vanish when they end."""
    from rich.progress import Progress, TextColumn

    from flexmerge_cli.report.console import Console

    described = TextColumn("{task.description}", markup=False)
    # Results go to stdout even while bars are shown: rich would send them to stderr with the bars.
    return Progress(described, *columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def relocations(items: list[str] | None) -> dict[str, str]:
    """OLD -> NEW of --relocate. Raises UsageError."""
    from flexmerge_cli.errors import UsageError

    pairs = {}
    for item in items or ():
        old, equals, new = item.partition("=")
        if not equals or not old or not new:
            raise UsageError(f"--relocate {item} is not OLD=NEW", hint="--relocate /old/place=/new/place")
        pairs[old] = new
    return pairs


def check_plan_place(path: Path, *, force: bool) -> None:
    """Before any work: a plan can be written there, and replaces nothing but a plan."""
    from flexmerge_cli.formats.plan_file import is_plan
    from flexmerge_cli.writing import check_file

    check_file(path, force=force, replaceable=is_plan, what="a plan of flexmerge")
