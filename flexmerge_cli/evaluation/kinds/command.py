"""Scores `command`: a program of the user scores a task. Runs only with --allow-exec.

command    a list of arguments, no shell; `{checkpoint}` is the task's model as a folder (config, tokenizer,
           model.safetensors), `{task}` its name. Runs in the folder of the spec
timeout_s  the seconds after which it is stopped; by default it is not
The last line of its output that is JSON is the score: a number, or a value as in outside.py. Its stderr is shown.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from flexmerge_cli.errors import DataError
from flexmerge_cli.evaluation.kinds.kind import Examples, Kind, Place, Run
from flexmerge_cli.evaluation.kinds.outside import scored_of
from flexmerge_cli.evaluation.materialise import materialised
from flexmerge_cli.evaluation.scored import Scored, TaskModel
from flexmerge_cli.evaluation.task_spec import TaskSpec

MAX_SHOWN = 800  # characters shown of the end of a failed program's output


class Command(TaskSpec):
    kind: Literal["command"]
    command: tuple[str, ...] = Field(min_length=1)
    timeout_s: float | None = Field(default=None, gt=0)


def prepare(task: Command, place: Place) -> Examples:
    program = task.command[0]
    if shutil.which(program) is None and shutil.which(program, path=str(place.folder)) is None:
        raise place.error("command", f"no program `{program}`", hint="check the name, or give its whole path")
    if not any("{checkpoint}" in argument for argument in task.command):
        raise place.error("command", "no argument is `{checkpoint}`", hint='["python", "score.py", "{checkpoint}"]')
    split = task.data_spec.split if task.data_spec is not None else None
    return Examples(items=place.folder, n=0, digest="", split=split, metrics=task.metrics)


def score(model: TaskModel, task: Command, examples: Examples, run: Run) -> Sequence[Scored]:
    folder, who = examples.items, f"task `{model.task}`: {task.command[0]}"
    with materialised(model) as checkpoint:
        filled = [a.replace("{checkpoint}", str(checkpoint)).replace("{task}", model.task) for a in task.command]
        program = shutil.which(filled[0]) or shutil.which(filled[0], path=str(folder)) or filled[0]
        try:
            done = subprocess.run(
                [program, *filled[1:]],
                cwd=folder,
                capture_output=True,
                timeout=task.timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise DataError(f"{who} took longer than {task.timeout_s:g} s", hint="increase timeout_s") from None
    said = done.stderr.decode(errors="replace").strip()[-MAX_SHOWN:]
    if done.returncode != 0:
        raise DataError(f"{who} exited with {done.returncode}\n  {said}", hint="run it manually on an exported task")
    return [scored_of(_last_json(done.stdout.decode(errors="replace"), who), who, next(iter(task.metrics), None))]


def _last_json(text: str, who: str) -> Any:
    """Parse the whole output, or the last line of it that is JSON."""
    for piece in (text, *reversed(text.splitlines())):
        try:
            return json.loads(piece)
        except (ValueError, RecursionError):
            continue
    raise DataError(f"{who} printed no JSON: {text.strip()[-200:]!r}", hint='print {"value": 0.9, "n": 100}')


KIND = Kind(name="command", schema=Command, metrics=(), prepare=prepare, score=score, runs_code=True, cached=False)
