"""What was asked of `merge`, as its bundle records it, with the command that asks it again. Pure.

Only what decides the bundle's bytes is in it: no places of files, no threads, no device. A method from a file is named
by the path that was typed, or, if that is absolute, by its last part; the digest of what ran is in `methods`.
"""

import json
import shlex
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from flexmerge_cli.record import Count, Record
from flexmerge_cli.request.merge import Auto, Clusters, Cut, MergeRequest

PROGRAM = ["flexmerge", "merge", "plan.json"]

# What was asked must not change how large a bundle is: one of exact copies has to fit wherever it fits without `auto`.
PADDED_BYTES = 512


class Request(Record):
    """Options of `merge` in the words of the command line; what was not asked is not there."""

    method: str | None = None
    steps: tuple[str, ...] | None = None
    calibrate: str | None = None
    method_for: tuple[str, ...] | None = None
    """`PATTERN=METHOD`."""
    size: str | None = None
    merges: Count | None = None
    fit: Literal["tight", "prefix"] | None = None
    """How a cut is fitted to its size."""
    cluster: Literal["channels"] | None = None
    seed: Count | None = None
    """What `cluster` draws from."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_distance: float | None = None
    layout: Literal["pointer"] | None = None
    command: str = Field(max_length=1 << 20)
    """Makes the bundle again, where the plan is `plan.json`."""
    padding: str = Field(default="", pattern="^ *$")
    """Spaces up to a multiple of PADDED_BYTES."""

    @field_validator("command")
    @classmethod
    def _is_one_command(cls, value: str) -> str:
        """It may come from a stranger, and is there to be copied to a shell."""
        words = shlex.split(value)
        if shlex.join(words) != value or words[:3] != PROGRAM:
            raise ValueError("is not a command of `flexmerge merge plan.json`")
        return value

    def dump(self) -> dict[str, Any]:
        """Return it for JSON, without padding."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"padding"})

    def padded(self) -> dict[str, Any]:
        fields = self.dump() | {"padding": ""}
        length = len(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode())
        return fields | {"padding": " " * (-length % PADDED_BYTES)}


def recorded(request: MergeRequest) -> Request:
    """The same for all requests that ask the same, whoever asked."""
    choice = request.choice
    if isinstance(choice, Cut | Auto | Clusters) and choice.size is not None:
        number = f"{Decimal(repr(choice.size.value)).normalize():f}"
        size = replace(choice.size, text=f"{number}{choice.size.unit}")
        request = replace(request, choice=replace(choice, size=size))
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
    return Request(**fields, command=shlex.join([*PROGRAM, *words, "-o", "bundle/"]))


def _without_folder(word: str) -> str:
    """`[PATTERN=]/a/b/my.py#NAME…` as my.py#NAME…; any other word as it is."""
    pattern, equals, name = word.partition("=") if "=" in word.partition("#")[0] else ("", "", word)
    file, hash_, rest = name.partition("#")
    return f"{pattern}{equals}{Path(file).name}{hash_}{rest}" if hash_ and Path(file).is_absolute() else word
