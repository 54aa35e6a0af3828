"""The file of coefficients that `flexmerge tune` writes: `flexmerge.coefficients/1`, canonical JSON.

    {"format": "flexmerge.coefficients/1", "method": "adamerging:granularity=block,…", "weights": {…}, "tasks": {…}, …}

`weights` are numbers by task, or by block and task, as `weighted_average` takes them. The rest says how they were
found, and with which base and fine-tuned models, by their fingerprints, and examples of each task.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Strict, ValidationError

from flexmerge_cli.errors import DataError, FlexmergeError, SourceError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.record import Count, Digest, Named, Record, Unsound, first_error
from flexmerge_cli.regular_file import read_file

FORMAT: Literal["flexmerge.coefficients/1"] = "flexmerge.coefficients/1"
MAX_BYTES = 16 << 20
Weight = Annotated[float, Strict()]  # true and "1" are no numbers
AGAIN = "flexmerge tune plan.json --spec calib.yaml -o coefficients.json"


class TunedTask(Record):
    """What a task's coefficients were found with."""

    weights: Digest
    """The fingerprint of its fine-tuned weights in the plan."""
    data: Digest
    n: Count


class Coefficients(Record):
    """The content of the file."""

    format: Literal["flexmerge.coefficients/1"] = FORMAT
    generator: str
    method: str
    versions: Named[str]
    base: Digest | None = None
    """The fingerprint of the base in the plan."""
    tasks: Named[TunedTask]
    weights: Named[Weight | Named[Weight]]

    def dump(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_coefficients(path: Path) -> bool:
    """Return whether `flexmerge tune` wrote a file."""
    try:
        return f'"format":"{FORMAT}"'.encode() in read_file(path, MAX_BYTES, "a file of coefficients")
    except (FlexmergeError, OSError):
        return False


class TunedWeights(dict[str, Any]):
    """The weights of a file, which remember the models that they were found with."""

    def __init__(self, path: Path, found: Coefficients) -> None:
        super().__init__(found.weights)
        self.path, self.found = path, found

    def require_same(self, base: str, tasks: Mapping[str, str]) -> None:
        """Raise DataError unless the models are those of a plan, given by the fingerprints of base and tasks."""
        tuned = {name: task.weights for name, task in self.found.tasks.items()}
        sides = [(f"task `{name}`", tuned.get(name), now) for name, now in tasks.items()]
        sides += [("the base", self.found.base or base, base)]
        problems = [
            f"{who}: not in the file" if then is None else f"{who}: tuned with weights {then}, the plan has {now}"
            for who, then, now in sides
            if then != now
        ]
        if problems:
            some = "\n  ".join(problems[:20])
            raise DataError(f"{self.path} was found with other models than the plan's:\n  {some}", hint=AGAIN)


def read_coefficients(path: Path) -> TunedWeights:
    """Read the weights of a file. Raises SourceError if there is none, DataError if it is unsound."""
    if not path.exists():
        raise SourceError(f"no coefficients at {path}", hint=AGAIN)
    data = read_file(path, MAX_BYTES, "a file of coefficients")
    try:
        return TunedWeights(path, Coefficients.model_validate(parse_json(data, is_ours=True)))
    except (ValidationError, Unsound) as error:
        reason: object = first_error(error) if isinstance(error, ValidationError) else error
    except ValueError as error:
        reason = error
    raise DataError(f"{path} is not a file of coefficients ({FORMAT}): {reason}", hint=AGAIN)
