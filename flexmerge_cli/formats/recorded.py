"""Records what was asked of `merge` in its bundle, with the command that asks it again. Pure.

Only what decides the bundle's bytes is in it: no paths of files, no threads, no device. A method from a file is named
by the path that was typed or, if that is absolute, by its last part; the digest of what ran is in `methods`.
"""

import json
import shlex
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from flexmerge_cli.errors import UsageError
from flexmerge_cli.record import Items
from flexmerge_cli.request.choices import Auto, Clusters, Cut, MergeWords, Servable
from flexmerge_cli.request.merge import MergeRequest

PROGRAM = ["flexmerge", "merge", "plan.json"]

# The request must not change how large a bundle is: a bundle of exact copies must fit wherever it fits without `auto`.
PADDED_BYTES = 512

MAX_COMMAND = 1 << 20
"""The most characters of a command."""


class Request(MergeWords):
    """What was asked, and the command that asks it again; options that were not given are absent."""

    method_for: Items[str] | None = None
    """Each is `PATTERN=METHOD`."""
    layout: Literal["pointer"] | None = None
    calibration: Literal["calibration/"] | None = None
    """Given, wherever it lay; which one the manifest tells."""
    command: str = Field(max_length=MAX_COMMAND)
    """The command that makes the bundle again from the plan, here called `plan.json`."""
    padding: str = Field(default="", pattern="^ *$")
    """Spaces up to a multiple of PADDED_BYTES."""

    @field_validator("command")
    @classmethod
    def _is_one_command(cls, value: str) -> str:
        """Check a command that may come from a stranger, and that people will copy to a shell."""
        words = shlex.split(value)
        if shlex.join(words) != value or words[:3] != PROGRAM:
            raise ValueError("is not a command of `flexmerge merge plan.json`")
        return value

    @property
    def is_by_distance(self) -> bool:
        """Whether a distance decides what is stored, and no size."""
        return self.max_distance is not None and self.size is None

    def dump(self) -> dict[str, Any]:
        """Return it for JSON, without padding."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"padding"})

    def padded(self) -> dict[str, Any]:
        fields = self.dump() | {"padding": ""}
        length = len(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode())
        return fields | {"padding": " " * (-length % PADDED_BYTES)}


def recorded(request: MergeRequest) -> Request:
    """Record a request. All requests that ask the same give the same record, whoever asked.

    Raises UsageError if its command is too long to be recorded, as weights of very many blocks and tasks make it.
    """
    choice = request.choice
    if isinstance(choice, Cut | Auto | Clusters | Servable) and choice.size is not None:
        number = f"{Decimal(repr(choice.size.value)).normalize():f}"
        size = replace(choice.size, text=f"{number}{choice.size.unit}")
        request = replace(request, choice=replace(choice, size=size))
    if request.calibration is not None:
        request = replace(request, calibration="calibration/")
    words = [_without_folder(word) for word in request.words()]
    options: dict[str, list[str]] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        options.setdefault(option.removeprefix("--").replace("-", "_"), []).append(value)
    several = {"steps": options.pop("step", None), "method_for": options.pop("method_for", None)}
    fields: dict[str, Any] = {name: value for name, (value,) in options.items()} | several
    if isinstance(choice, Cut) and choice.size is not None:
        fields["fit"] = choice.fit.value
    if isinstance(choice, Clusters):
        fields["seed"] = choice.seed
    command = shlex.join([*PROGRAM, *words, "-o", "bundle/"])
    if len(command) > MAX_COMMAND:
        raise UsageError(
            f"the command that a bundle records would have {len(command):,} characters, more than {MAX_COMMAND:,}",
            hint="take weights of tasks instead of blocks: flexmerge tune --method adamerging:granularity=task",
        )
    return Request(**fields, command=command)


def _without_folder(word: str) -> str:
    """Return `[PATTERN=]/a/b/my.py#NAME…` with my.py#NAME… alone as the file; any other word as it is."""
    pattern, equals, name = word.partition("=") if "=" in word.partition("#")[0] else ("", "", word)
    file, hash_, rest = name.partition("#")
    return f"{pattern}{equals}{Path(file).name}{hash_}{rest}" if hash_ and Path(file).is_absolute() else word
