"""Defines kinds of tasks: their keys in a spec, how examples are prepared, and how a model is scored on them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.errors import UsageError
from flexmerge_cli.evaluation.generation import EXTRA
from flexmerge_cli.evaluation.loading import require
from flexmerge_cli.evaluation.metrics import METRICS
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec
from flexmerge_cli.yaml_file import Document

AGREEMENT = "agreement"
"""The metric that needs no labels: a model beside the task's own fine-tuned one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a task is defined: in which file, and beside which side files."""

    document: Document
    task: str
    side: Path
    """The folder of the task's config, tokenizer, processor."""
    access: Access = ONLINE
    section: str = "tasks"
    """The key of the spec that has the task: `tasks` or `unseen`."""

    @property
    def folder(self) -> Path:
        """The folder that paths in the spec are relative to."""
        return self.document.path.absolute().parent

    def error(self, key: str, message: str, *, hint: str) -> UsageError:
        """Make an error at a key, dotted, below the task. If the spec lacks the key, the line is that of `data`, if
        present."""
        place: tuple[str, ...] = (self.section, self.task, *filter(None, key.split(".")))
        data = (self.section, self.task, "data")
        is_near_data = key.startswith("columns") and place[:3] not in self.document.lines
        return self.document.error(place, message, hint=hint, line_of=data if is_near_data else place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A task's data, checked and ready. Only the kind knows the type of `items`."""

    items: Any
    n: int
    digest: str
    """The digest of the data as read."""
    split: str | None = None
    metrics: tuple[str, ...]
    rest: Callable[[], str] = field(default=lambda: "")
    """Returns a digest of everything else that scores depend on. Called after all checks, since it may read weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The settings of a computation."""

    device: str = "cpu"
    dtype: str | None = None
    """The dtype that the model computes in. None: the stored dtype."""
    batch_size: int = 32
    on_example: Callable[[int, int], None] = field(default=lambda _done, _total: None)
    on_built: Callable[[Any, Mapping[str, str]], None] = field(default=lambda _model, _names: None)
    """Gets the task's model before it runs, and the name in its state -> own name of each of its tensors."""

    def batches(self, n: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each batch, and report progress."""
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            yield start, stop
            self.on_example(stop, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of task."""

    name: str
    schema: type[TaskSpec]
    metrics: tuple[str, ...]
    """The supported metrics, `recall@k` for any k. The first is the default."""
    prepare: Callable[[Any, Place], Examples]
    """Reads and checks the data against the spec and the side files. Reads no weights. Raises UsageError, DataError."""
    score: Callable[[TaskModel, Any, Examples, Run], Sequence[Scored]]
    """Maps (model, task of the spec, examples, run) to one Scored per metric. For `agreement` it leaves labels
    empty."""
    batch_size: int = 32
    """The batch size, unless the spec gives one."""
    runs_code: bool = False
    """Whether the spec names code, which needs --allow-exec."""
    code_keys: tuple[str, ...] = ()
    """Keys that need --allow-exec even if the kind itself does not."""
    cached: bool = True
    """Whether a score depends only on weights, data, side files and settings."""


def chosen_metrics(
    task: TaskSpec, place: Place, known: Sequence[str], *, num_classes: int | None = None
) -> tuple[str, ...]:
    """Return the metrics of a task, checked against those of its kind. Raises UsageError."""
    names = task.metrics or (known[0],)
    for name in names:
        family = "recall@k" if name.startswith("recall@") else name
        if family not in known or (family == "recall@k" and not _is_metric(name)):
            raise place.error("metric", f"{task.kind} has no metric `{name}`", hint=f"one of: {', '.join(known)}")
        if family != "recall@k" and name in METRICS and METRICS[name].only_two_classes and (num_classes or 2) != 2:
            raise place.error(
                "metric", f"`{name}` requires two classes, but the model has {num_classes}", hint=f"{name}_macro"
            )
        if name in METRICS:
            require(*METRICS[name].needs, extra=EXTRA)
    if len(set(names)) < len(names):
        raise place.error("metric", "a metric occurs twice", hint="remove one")
    if AGREEMENT in names and len(names) > 1:
        raise place.error(
            "metric", "`agreement` cannot be combined with other metrics", hint="make it a task of its own"
        )
    return tuple(names)


def _is_metric(name: str) -> bool:
    try:
        METRICS[name]
    except KeyError:
        return False
    return True
