"""Options that several commands share, and the functions that show results, messages and progress."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.errors import FlexmergeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Show neither progress nor messages.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also show how long each stage took.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Number of worker threads (default: one per core).")
]
MemoryOption = Annotated[
    str | None, typer.Option("--max-memory", help="Limit on the run's anonymous memory, e.g. 8GiB.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="Cast stored tensors to bf16, fp16 or fp32.")]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what the Hub cache holds, like HF_HUB_OFFLINE=1.")
]
RelocateOption = Annotated[
    list[str] | None, typer.Option("--relocate", help="OLD=NEW, for a plan whose sources have moved; repeatable.")
]
VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant", help="Prefer this weight variant where a source has it, e.g. fp16: model.fp16.safetensors."
    ),
]
StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream", help="Read the weights of hf://, s3://, gs:// and https:// sources over the network; store none."
    ),
]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="Merging method: auto, or NAME[:key=value,...]; see `flexmerge methods`.")
]
StepOption = Annotated[
    list[str] | None, typer.Option("--step", help="Apply this step before the method, e.g. dare:p=0.9; repeatable.")
]
CalibrateOption = Annotated[
    str | None, typer.Option("--calibrate", help="Apply this calibration after the method: svc.")
]
MethodForOption = Annotated[
    list[str] | None,
    typer.Option(
        "--method-for", help="PATTERN=METHOD: use this method for matching blocks; `keep` leaves them unmerged."
    ),
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
    typer.Option(
        "--size", help="Bundle size: 2.25x one model, 40% of all copies, or bytes on disk (600MiB, 6GB, 123456B)."
    ),
]
MergesOption = Annotated[int | None, typer.Option("--merges", help="Stop after N merges instead of at a size.")]
FitOption = Annotated[
    str | None,
    typer.Option("--fit", help="tight (default): undo merges while the size still fits; prefix: the paper's cut."),
]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", help="channels: group tasks by k-means in every tensor; requires --size Kx.")
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
    """How the run reaches its sources. Downloads are reported on stderr."""
    from flexmerge_cli.checkpoint.access import Access
    from flexmerge_cli.checkpoint.stream import StreamPool

    pool = StreamPool.within(max_memory) if stream else None
    return Access(offline=offline, variant=variant, stream=pool, on_message=lambda message: note(message, quiet=quiet))


def emit(value: Any, *, as_json: bool, show: Callable[[Any], None], written: Sequence[Path] = ()) -> None:
    """Print the result, after everything else: as ASCII JSON, which every encoding can hold, or with `show`.

    written: the outputs that took their places before, which an error about lost output names.
    """
    from flexmerge_cli.cli.terminal import OutputLost

    try:
        if as_json:
            print(json.dumps(value, indent=2))
        else:
            show(value)
        sys.stdout.flush()
    except OutputLost as lost:
        lost.hint = "the command itself succeeded; only its output is lost"
        if written:
            lost.message += f"; complete and in place: {', '.join(map(str, written))}"
            lost.unread = False  # whoever closed the pipe does not know that
        raise


def warn(messages: Iterable[str], *, quiet: bool = False) -> None:
    for message in () if quiet else messages:
        note(f"warning: {message}")


def note(message: str, *, quiet: bool = False) -> None:
    """Print a message on stderr. Further lines are indented, so that a line break in a name starts no new message."""
    from flexmerge_cli.report.text import visible

    first, *rest = visible(message).split(
        "\n"
    )  # here too, not only in the stream: rich interprets markup before it writes
    if not quiet:
        print(first, *(line if not line or line[0] == " " else f"  {line}" for line in rest), sep="\n", file=sys.stderr)


def tell(error: "FlexmergeError") -> None:
    """Print an error on stderr."""
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")


@contextmanager
def progress(*, quiet: bool, verbose: bool = False, counts: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar per stage if stderr is a terminal. With verbose, print the seconds of each stage.

    counts: progress counts items, not bytes.
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
    """Progress bars on stderr with these columns after the description. Finished bars disappear."""
    from rich.progress import Progress, TextColumn

    from flexmerge_cli.report.console import Console

    described = TextColumn("{task.description}", markup=False)
    # Results must go to stdout even while bars are shown; rich would redirect them to stderr.
    return Progress(described, *columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


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


def check_plan_place(path: Path, *, force: bool) -> None:
    """Check, before any work, that a plan can be written there and would replace nothing but a plan."""
    from flexmerge_cli.formats.plan_file import is_plan
    from flexmerge_cli.writing import check_file

    check_file(path, force=force, replaceable=is_plan, what="a plan of flexmerge")
