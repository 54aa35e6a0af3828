"""The file of coefficients that `flexmerge tune` writes: `flexmerge.coefficients/1`, canonical JSON.

    {"format": "flexmerge.coefficients/1", "method": "adamerging:granularity=block,…", "weights": {…}, "tasks": {…}, …}

`weights` are numbers by task, or by block and task, as `weighted_average` takes them. The rest says how they were
found, and with which fine-tuned models and examples of each task.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from flexmerge_cli.errors import DataError, SourceError
from flexmerge_cli.json_file import parse_json
from flexmerge_cli.record import Count, Digest, Named, Record, Unsound, first_error
from flexmerge_cli.regular_file import read_file

FORMAT: Literal["flexmerge.coefficients/1"] = "flexmerge.coefficients/1"
MAX_BYTES = 16 << 20
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
    tasks: Named[TunedTask]
    weights: Named[float | dict[str, float]]

    def dump(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_coefficients(path: Path) -> bool:
    """Return whether a file starts as `flexmerge tune` writes it."""
    with path.open("rb") as file:
        return file.read(len(FORMAT) + 12) == f'{{"format":"{FORMAT}"'.encode()


def read_coefficients(path: Path) -> dict[str, Any]:
    """Read the weights of a file. Raises SourceError if there is none, DataError if it is unsound."""
    if not path.exists():
        raise SourceError(f"no coefficients at {path}", hint=AGAIN)
    data = read_file(path, MAX_BYTES, "a file of coefficients")
    try:
        return Coefficients.model_validate(parse_json(data, is_ours=True)).weights
    except (ValidationError, Unsound) as error:
        reason: object = first_error(error) if isinstance(error, ValidationError) else error
    except ValueError as error:
        reason = error
    raise DataError(f"{path} is not a file of coefficients ({FORMAT}): {reason}", hint=AGAIN)
