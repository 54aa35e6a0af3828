"""Defines the format `flexmerge.plan-part/1`: what one of several processes measured, sealed like a plan (sealed.py).

part, parts  the file is part `part` of `parts`
request      what the plan is to be made of; the same in all parts of a plan
arithmetic   what the last bits of sums depend on: library, kind of device
headers      maps each task, and "" for the base, to the digest of its tensors' names, dtypes and shapes
measures     one for each item of this part, in the order of the pass; null for a number that is not finite
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from flexmerge_cli.formats.plan_records import Measurement, PlanSettings
from flexmerge_cli.formats.sealed import is_sealed, read_sealed
from flexmerge_cli.record import Count, Digest, Items, Named, Record, require_few
from flexmerge_cli.request.part import MAX_PARTS

FORMAT = "flexmerge.plan-part/1"
MAX_PART_BYTES = 1 << 30

Number = Measurement | None
"""A number; None if it is not finite."""
Numbers = Items[Number]
Codes = Annotated[dict[int, Number], BeforeValidator(require_few)]


class PartRequest(Record):
    """What all parts of a plan are made of; paths are absolute."""

    base: str
    tasks: Named[str]
    blocks: str
    """As in `settings`, but the path of a user's own rules.yaml."""
    settings: PlanSettings


class PartCoding(Record):
    base: Codes
    average: Codes
    ratio: Codes


class PartMeasure(Record):
    """What the pass found for one item."""

    tensor: str
    digests: Items[Digest]
    base_digest: Digest | None
    same: Items[Count]
    is_base: Items[bool]
    gram: Items[Numbers] | None
    agreement: Items[Items[Count]] | None
    base_energy: Number
    not_finite: Items[tuple[int, Count]]
    coding: PartCoding | None


class PlanPart(Record):
    """The contents of one part's file."""

    format: Literal["flexmerge.plan-part/1"]
    generator: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    part: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    parts: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    request: PartRequest
    arithmetic: str
    headers: Named[Digest]
    measures: Items[PartMeasure]


def is_part(path: Path) -> bool:
    """Return whether a file is, or once was, a part of a plan, so that a new one may replace it."""
    return is_sealed(path, FORMAT, MAX_PART_BYTES)


def read_part(path: Path) -> PlanPart:
    """Read a part. Raises UsageError if the file is not one, was edited, or is inconsistent."""
    again = "make it again with `flexmerge plan --part`"
    return read_sealed(PlanPart, path, FORMAT, "part of a plan", again, MAX_PART_BYTES)
