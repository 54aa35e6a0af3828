"""Scores `python:module:function`: a function of the user scores a task. Runs only with --allow-exec.

kind     python:module:function; the module lies beside the spec, or is installed
options  keyword arguments of the function
The function is called as `function(weights, folder, **options)`: weights, a mapping of the task's own names to
tensors, read-only; folder holds its config, tokenizer and processor. It returns a number, or a value as in outside.py.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from flexmerge_cli.errors import DataError, FlexmergeError
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run
from flexmerge_cli.evaluation.kinds.outside import scored_of
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

NAME = re.compile(r"python:([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


MAX_SHOWN = 500  # characters shown of an error of the function


class Python(TaskSpec):
    options: dict[str, Any] = Field(default_factory=dict)


def prepare(task: Python, place: Place) -> Examples:
    match = NAME.fullmatch(task.kind)
    if match is None:
        raise place.error("kind", f"`{task.kind}` names no function", hint="python:module:function")
    module, name = match.groups()
    with _beside(place.folder):
        try:
            found = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise place.error("kind", f"module `{module}`: {error}", hint="put it beside the spec") from None
        except AttributeError:
            raise place.error("kind", f"module `{module}` has no `{name}`", hint="check the name") from None
        except Exception as error:
            raise place.error(
                "kind", f"module `{module}`: {type(error).__name__}: {error}", hint="fix the module"
            ) from None
    return Examples(items=(found, place.folder), n=0, digest="", split=_split(task), metrics=task.metrics)


def score(model: TaskModel, task: Python, examples: Examples, run: Run) -> Sequence[Scored]:
    function, folder = examples.items
    with _beside(folder):
        try:
            answer = function(model.weights, model.folder, **task.options)
        except FlexmergeError:
            raise
        except Exception as error:
            said = f"task `{model.task}`: {task.kind} failed: {type(error).__name__}: {str(error)[:MAX_SHOWN]}"
            raise DataError(said, hint="run with --debug to see where") from error
    return [scored_of(answer, f"task `{model.task}`: {task.kind}", next(iter(task.metrics), None))]


def _split(task: TaskSpec) -> str | None:
    return task.data_spec.split if task.data_spec is not None else None


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Give modules beside the spec precedence."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


KIND = Kind(name="python", schema=Python, metrics=(), prepare=prepare, score=score, runs_code=True, cached=False)
