"""Reads eval.yaml, `flexmerge.eval-spec/1`: what to score each task on. Paths are relative to the file.

version  1
tasks    {name: {kind, data, …}}; keys of all kinds in task_spec.py, of each kind in kinds/
limit, batch_size, dtype, seed, device   defaults for all tasks
base     the base, scored with each task's own head
unseen   {name: {kind, data, head, gate, …}}: data of tasks that were not merged, each scored with the models of `head`
corrupt  `gaussian_noise@3`, or a list: tasks of images are scored on corrupted data, too
not_scored  [tasks] of the bundle that are left out on purpose: a gate fails if one is neither scored nor named here
Only code that `python` and `command` name is run, and only with --allow-exec. Readers refuse unknown keys; if the
meaning of a key changes, the version becomes 2.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny

from flexmerge_cli.bundle.manifest_file import sha256_of
from flexmerge_cli.checkpoint.access import ONLINE, Access
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.errors import SourceError, UsageError
from flexmerge_cli.evaluation.kinds.corruption import Corruption, parse_corruptions
from flexmerge_cli.evaluation.kinds.images import ImageTask
from flexmerge_cli.evaluation.kinds.kind import Kind, Place
from flexmerge_cli.evaluation.kinds.registry import KINDS, kind_of
from flexmerge_cli.evaluation.task_spec import Dtype, TaskSpec
from flexmerge_cli.family.family import TASK_NAME
from flexmerge_cli.record import Record
from flexmerge_cli.yaml_file import Document, read_document

COMMON = ("limit", "batch_size", "dtype", "seed", "device")


class EvalSpec(Record):
    """A checked spec."""

    version: Literal[1]
    tasks: dict[str, SerializeAsAny[TaskSpec]] = Field(min_length=1)
    base: str | None = None
    limit: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    seed: int | None = Field(default=None, ge=0)
    device: str | None = None
    not_scored: tuple[str, ...] = ()
    unseen: dict[str, SerializeAsAny[TaskSpec]] = Field(default_factory=dict)
    corrupt: str | tuple[str, ...] = ()
    _document: Document = PrivateAttr()
    _of: tuple[str, ...] = PrivateAttr(default=())
    _sha256: str = PrivateAttr(default="")

    @property
    def document(self) -> Document:
        return self._document

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Tasks of the bundle that the spec neither scores nor names under `not_scored`."""
        return tuple(task for task in self._of if task not in self.tasks and task not in self.not_scored)

    @property
    def record(self) -> dict[str, Any]:
        """The fields that identify the spec in a document."""
        return {"path": str(self._document.path), "sha256": self._sha256, "not_scored": list(self.not_scored)}

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return self._sha256

    @property
    def folder(self) -> Path:
        """The folder that its paths are relative to."""
        return self.document.path.absolute().parent

    def only(self, *tasks: str) -> "EvalSpec":
        """Restrict the spec to some of its tasks, and to the unseen ones that are scored with their heads."""
        unseen = {name: entry for name, entry in self.unseen.items() if entry.head in tasks}
        return self.model_copy(update={"tasks": {task: self.tasks[task] for task in tasks}, "unseen": unseen})

    def entry(self, name: str) -> TaskSpec:
        """Return a task, an unseen one, or one of `corrupted_of`, by its name."""
        task, _, corruption = name.partition(" ")
        found = self.tasks[task] if task in self.tasks else self.unseen[task]
        return found.model_copy(update={"corrupt": corruption}) if corruption else found

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """The corruptions that all image tasks are scored with, besides their clean data."""
        return parse_corruptions([self.corrupt] if isinstance(self.corrupt, str) else self.corrupt)

    def corrupted_of(self, task: str) -> dict[str, Corruption]:
        """Return the names, for `entry`, of a task with each corruption; none if its inputs are not images."""
        is_image = isinstance(self.tasks[task], ImageTask)
        return {f"{task} {corruption}": corruption for corruption in self.corruptions} if is_image else {}

    def with_corruptions(self, words: Sequence[str]) -> "EvalSpec":
        """Return the spec with these corruptions instead of its own. Raises UsageError."""
        found = self.model_copy(update={"corrupt": tuple(words)})
        if found.corruptions and not any(map(found.corrupted_of, found.tasks)):
            raise UsageError(
                "`corrupt` is for image classification, of which the spec has no task", hint="leave out `corrupt`"
            )
        return found

    def others_of(self, task: str) -> list[str]:
        """Return the names, for `entry`, of further data that the models of a task are scored on."""
        return [*self.unseen_of(task), *self.corrupted_of(task)]

    def unseen_of(self, task: str) -> list[str]:
        """Return the names of the unseen tasks that the models of a task are scored on."""
        return [name for name, entry in self.unseen.items() if entry.head == task]

    def kind(self, task: str) -> Kind:
        kind = kind_of(self.entry(task).kind)
        assert kind is not None  # checked when the spec was read
        return kind

    def place(self, task: str, side: Path, access: Access = ONLINE) -> Place:
        """Return where the task is defined. side: folder of its config, tokenizer, processor."""
        task = task.partition(" ")[0]
        section = "tasks" if task in self.tasks else "unseen"
        return Place(document=self.document, task=task, side=side, access=access, section=section)

    def settled(self, task: str) -> TaskSpec:
        """Return the task's own keys, with defaults from the spec."""
        own = self.entry(task)
        return own.model_copy(update={key: getattr(self, key) for key in COMMON if getattr(own, key) is None})


class _Outer(EvalSpec):
    """The file before its tasks are checked, each by its kind."""

    tasks: dict[str, Any] = Field(min_length=1)
    unseen: dict[str, Any] = Field(default_factory=dict)


def read_spec(
    path: Path, tasks: tuple[str, ...], *, unscorable: tuple[str, ...] = (), allow_exec: bool = False
) -> EvalSpec:
    """Read a spec. Checks its form, its tasks, and that checkpoints exist; the kinds check the data.

    unscorable: further tasks of the bundle that the command cannot score; the spec may name them under `not_scored`.
    Raises UsageError with file, line and key, SourceError.
    """
    document = read_document(path, "spec")
    sha256 = sha256_of(path)
    outer = document.check(_Outer)
    found = {name: _task(document, ("tasks", name), value, allow_exec) for name, value in outer.tasks.items()}
    unseen = {name: _task(document, ("unseen", name), value, allow_exec) for name, value in outer.unseen.items()}
    fields = {name: getattr(outer, name) for name in EvalSpec.model_fields if name not in ("tasks", "unseen")}
    spec = EvalSpec.model_construct(tasks=found, unseen=unseen, **fields)
    spec._document, spec._of, spec._sha256 = document, (*tasks, *unscorable), sha256
    unknown = [name for name in found if name not in tasks]
    if unknown:
        raise document.error(
            ("tasks", unknown[0]), f"no such task: {', '.join(unknown)}", hint=f"there are: {', '.join(tasks)}"
        )
    _check_not_scored(spec)
    _check_unseen(spec)
    try:
        spec.with_corruptions([spec.corrupt] if isinstance(spec.corrupt, str) else spec.corrupt)
    except UsageError as error:
        raise document.error(("corrupt",), error.message, hint=str(error.hint)) from None
    for name, task in found.items():
        _check_there(spec, ("tasks", name, "checkpoint"), task.checkpoint)
    _check_there(spec, ("base",), spec.base)
    return spec


def _task(document: Document, place: tuple[str, str], value: Any, allow_exec: bool) -> TaskSpec:
    if not isinstance(value, Mapping):
        raise document.error(place, "a task must be a mapping", hint="kind: image-classification, data: test.npz")
    written = value.get("kind")
    if written is None:
        raise document.error(place, "no `kind` given", hint=f"one of: {', '.join(KINDS)}")
    kind = kind_of(written) if isinstance(written, str) else None
    if kind is None:
        near = difflib.get_close_matches(str(written)[:64], KINDS, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(KINDS)}"
        raise document.error((*place, "kind"), f"unknown kind `{written}`", hint=hint)
    key = "kind" if kind.runs_code else next((key for key in kind.code_keys if key in value), None)
    if key is not None and not allow_exec:
        said = f"`{written}` runs code that the spec names" if key == "kind" else "it can name code, which would be run"
        raise document.error((*place, key), said, hint="review the code, and then add --allow-exec")
    return document.check(kind.schema, place)


def _check_not_scored(spec: EvalSpec) -> None:
    for place, name in enumerate(spec.not_scored):
        key = ("not_scored", place)
        if name in spec.tasks:
            raise spec.document.error(
                key, f"`{name}` is scored as well", hint="remove it from `tasks` or from `not_scored`"
            )
        if name not in spec._of:
            near = difflib.get_close_matches(name, spec._of, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(spec._of)}"
            raise spec.document.error(key, f"no such task: {name}", hint=hint)
        if name in spec.not_scored[:place]:
            raise spec.document.error(key, f"`{name}` occurs twice", hint="remove one")


def _check_unseen(spec: EvalSpec) -> None:
    for name, task in spec.tasks.items():
        key = next((key for key in ("head", "gate") if getattr(task, key) is not None), None)
        if key is not None:
            raise spec.document.error(("tasks", name, key), f"`{key}` is a key of `unseen`", hint="remove it")
    for name, task in spec.unseen.items():
        place = ("unseen", name)
        if not TASK_NAME.fullmatch(name):
            raise spec.document.error(place, "not a name", hint="use letters, digits, `.`, `_` and `-`")
        if name in spec._of:
            raise spec.document.error(place, f"`{name}` is a task that was merged", hint="score it under `tasks`")
        if task.checkpoint is not None:
            raise spec.document.error(
                (*place, "checkpoint"), "unseen data are scored with the models of `head`", hint="remove it"
            )
        if task.head not in spec.tasks:
            said = "no `head` given" if task.head is None else f"`tasks` has no `{task.head}`"
            hint = f"head: one of {', '.join(spec.tasks)}, whose models are scored on these data"
            raise spec.document.error((*place, "head"), said, hint=hint)


def _check_there(spec: EvalSpec, place: tuple[str, ...], source: str | None) -> None:
    if source is not None and not is_remote(source) and not (spec.folder / source).exists():
        said = spec.document.error(place, f"no checkpoint at {spec.folder / source}", hint="check the path")
        raise SourceError(said.message, hint=said.hint)
