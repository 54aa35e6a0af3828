"""Makes a plan from parts: independent processes measure some tensors each, and one process joins the results.

The pass measures each tensor by itself, so the plan has the same bytes as one made by one process. The join opens the
sources for their headers and the files beside the weights; it also reads a few of the weight matrices, like `low_rank`
in fields.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import ValidationError

from flexmerge_cli.checkpoint.access import Access
from flexmerge_cli.checkpoint.checkpoint import Checkpoint
from flexmerge_cli.checkpoint.place import is_remote
from flexmerge_cli.engine.survey_item import Measure, SurveyItem, models_of
from flexmerge_cli.errors import DataError, UsageError
from flexmerge_cli.family.family import Family
from flexmerge_cli.formats.plan_file import Plan
from flexmerge_cli.formats.plan_part import FORMAT, PartCoding, PartMeasure, PartRequest, PlanPart, read_part
from flexmerge_cli.formats.sealed import sealed
from flexmerge_cli.planning.fields import SETTINGS_OF_ACCESS, SETTINGS_OF_REQUEST, requested_settings
from flexmerge_cli.planning.make import make_plan, measured_alone, opened
from flexmerge_cli.planning.measuring import OnProgress, silent
from flexmerge_cli.record import NO_SHA256, Unsound, first_error
from flexmerge_cli.request.part import Share
from flexmerge_cli.request.plan import OrderSettings, PlanRequest
from flexmerge_cli.residuals.coding_error import CodingError
from flexmerge_cli.text import expanded
from flexmerge_cli.version import GENERATOR


def make_part(
    request: PlanRequest,
    part: Share,
    *,
    device: str = "auto",
    threads: int | None = None,
    max_memory: int | None = None,
    on_progress: OnProgress = silent,
    on_open: Callable[[Family], None] = lambda _family: None,
) -> PlanPart:
    """Measure the tensors of one part. on_open and the errors are as in make_plan."""
    from flexmerge_cli.engine.device import arithmetic

    made_with = arithmetic(device)
    asked = opened(request, on_open=on_open, on_progress=on_progress)
    items = [asked.items[place] for place in _places(asked.items, part)]
    measures = measured_alone(
        items, asked.request, device=device, threads=threads, max_memory=max_memory, on_progress=on_progress
    )
    found = {
        "format": FORMAT,
        "generator": GENERATOR,
        "sha256": NO_SHA256,
        "part": part.number,
        "parts": part.count,
        "request": _record(request).model_dump(mode="json"),
        "arithmetic": made_with,
        "headers": _headers(asked.family),
        "measures": [_written(item, found).model_dump(mode="json") for item, found in zip(items, measures)],
    }
    return sealed(PlanPart, found)


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of one plan, in order."""

    paths: tuple[Path, ...]
    parts: tuple[PlanPart, ...]
    access: Access

    @staticmethod
    def read(paths: Sequence[Path], access: Access) -> "Parts":
        """Read the parts. Raises UsageError, naming the files, unless they are all the parts of one plan."""
        found: dict[int, tuple[Path, PlanPart]] = {}
        first: tuple[Path, PlanPart] | None = None
        for path in paths:
            part = read_part(path)
            if part.generator != GENERATOR:
                raise UsageError(
                    f"{path} was made by {part.generator}, and this is {GENERATOR}", hint="make the parts again"
                )
            first = first or (path, part)
            for what, left, right in _differences(first[1], part):
                raise UsageError(
                    f"{path} and {first[0]} are not parts of one plan: {what} {right} here, {left} there",
                    hint="make all parts with the same command",
                )
            if part.part in found:
                raise UsageError(
                    f"{found[part.part][0]} and {path} are both part {part.part}/{part.parts}", hint="leave one out"
                )
            found[part.part] = path, part
        count = first[1].parts if first is not None else 1
        missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in found]
        if missing:
            raise UsageError(
                f"the plan lacks {len(missing)} of {count} parts: {', '.join(missing[:20])}",
                hint=f"flexmerge plan … --part {missing[0]} -o part.json",
            )
        ordered = [found[number] for number in sorted(found)]
        return Parts(tuple(path for path, _ in ordered), tuple(part for _, part in ordered), access)

    @property
    def request(self) -> PlanRequest:
        """The request that the parts were made for."""
        asked = self.parts[0].request
        settings = dict(asked.settings)
        order = {each.name: settings[each.name] for each in fields(OrderSettings)} | {"blocks": asked.blocks}
        return PlanRequest(
            base=asked.base,
            tasks=asked.tasks,
            order=OrderSettings(**order),
            access=replace(self.access, **{name: settings[name] for name in SETTINGS_OF_ACCESS}),
            **{name: settings[name] for name in SETTINGS_OF_REQUEST},
        )

    def join(self, **run: Any) -> Plan:
        """Make the plan. run: as in make_plan. Raises DataError if the sources have changed since the parts were made,
        or what the parts hold cannot be measurements."""
        try:
            return make_plan(self.request, measured=self._measures, **run)
        except (ValidationError, Unsound) as error:
            reason = first_error(error) if isinstance(error, ValidationError) else error
            raise DataError(f"the parts make no sound plan: {reason}", hint="make the parts again") from None

    def _measures(self, family: Family, items: Sequence[SurveyItem]) -> list[Measure]:
        now, then = _headers(family), self.parts[0].headers
        changed = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        if changed:
            who = f"task `{changed[0]}`" if changed[0] else "the base"
            raise DataError(f"{who} has other tensors than when {self.paths[0]} was made", hint="make the parts again")
        found: dict[int, Measure] = {}
        for path, part in zip(self.paths, self.parts):
            places = _places(items, Share(part.part, part.parts))
            if [items[place].name for place in places] != [measure.tensor for measure in part.measures]:
                raise DataError(f"{path} holds other tensors than its part has", hint="make it again")
            found |= {place: _read(items[place], one, path) for place, one in zip(places, part.measures)}
        return [found[place] for place in range(len(items))]


def _differences(left: PlanPart, right: PlanPart) -> list[tuple[str, object, object]]:
    """Return (what, left value, right value) for everything in which two parts of one plan must agree."""
    requests = left.request, right.request
    pairs: list[tuple[str, object, object]] = [
        ("the number of parts is", left.parts, right.parts),
        ("it was made with", left.arithmetic, right.arithmetic),
    ]
    one, other = (dict(part.settings) | {"base": part.base, "blocks": part.blocks} for part in requests)
    pairs += [(f"--{name.replace('_', '-')} is", one[name], other[name]) for name in one]
    for task in sorted({*left.request.tasks, *right.request.tasks}):
        here, there = (part.tasks.get(task, "missing") for part in requests)
        pairs.append((f"task `{task}` is", here, there))
    for name in sorted({*left.headers, *right.headers}):
        who = f"task `{name}`" if name else "the base"
        pairs.append((f"the digest of the tensors of {who} is", left.headers.get(name), right.headers.get(name)))
    return [(what, one, other) for what, one, other in pairs if one != other]


def _record(request: PlanRequest) -> PartRequest:
    def whole(source: str) -> str:
        return source if is_remote(source) else str((request.relative_to / expanded(source)).absolute())

    blocks = request.order.blocks
    return PartRequest(
        base=whole(request.base),
        tasks={name: whole(source) for name, source in sorted(request.tasks.items())},
        blocks=str(Path(blocks).absolute()) if Path(blocks).is_file() else blocks,
        settings=requested_settings(request),
    )


def _headers(family: Family) -> dict[str, str]:
    """Return the digest of the names, dtypes and shapes of each model's tensors; the base has the key ""."""

    def digest(model: Checkpoint) -> str:
        lines = (f"{name} {tensor.dtype} {tensor.shape}" for name, tensor in sorted(model.tensors.items()))
        return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())

    return {name: digest(model) for name, model in family.models.items()} | {"": digest(family.base)}


def _places(items: Sequence[SurveyItem], part: Share) -> list[int]:
    return part.places([sum(tensor.num_bytes for tensor in models_of(item)) for item in items])


def _finite(array: np.ndarray) -> list[list[float | None]]:
    """Return the rows of a matrix, with None for values that are not finite."""
    return [[value if np.isfinite(value) else None for value in row] for row in array.tolist()]


def _written(item: SurveyItem, found: Measure) -> PartMeasure:
    def codes(of: Mapping[int, float]) -> dict[int, float | None]:
        return {bits: value if np.isfinite(value) else None for bits, value in of.items()}

    coding = found.coding
    return PartMeasure(
        tensor=item.name,
        digests=tuple(found.digests),
        base_digest=found.base_digest,
        same=tuple(found.same),
        is_base=tuple(found.is_base),
        gram=None if found.gram is None else tuple(map(tuple, _finite(found.gram))),
        agreement=None if found.agreement is None else tuple(map(tuple, found.agreement.tolist())),
        base_energy=found.base_energy if np.isfinite(found.base_energy) else None,
        not_finite=tuple(found.not_finite),
        coding=None
        if coding is None
        else PartCoding(base=codes(coding.base), average=codes(coding.average), ratio=codes(coding.ratio)),
    )


def _read(item: SurveyItem, measure: PartMeasure, path: Path) -> Measure:
    """Read a measure. Raises DataError unless it is one that the item's tensors may have."""
    count = len(item.tasks)
    square = [len(row) for matrix in (measure.gram, measure.agreement) for row in matrix or ()]
    rows = [len(matrix) for matrix in (measure.gram, measure.agreement) if matrix is not None]
    lists = (measure.digests, measure.same, measure.is_base)
    if {count} < {count, *map(len, lists), *square, *rows} or (measure.gram is not None) != item.gram:
        raise DataError(f"{path} does not have `{measure.tensor}` of {count} tasks", hint="make it again")

    def codes(of: Mapping[int, float | None]) -> dict[int, float]:
        return {bits: np.nan if value is None else value for bits, value in of.items()}

    coding = measure.coding
    gram = None if measure.gram is None else np.array(measure.gram, np.float64)
    agreement = None if measure.agreement is None else np.array(measure.agreement, np.int64)
    is_sound = all(first <= place and measure.same[first] == first for place, first in enumerate(measure.same))
    for matrix in (gram, agreement):
        is_sound &= matrix is None or np.array_equal(matrix, matrix.T, equal_nan=True)
    is_sound &= gram is None or bool(measure.not_finite) or bool(np.isfinite(gram).all())
    read = dict(enumerate(tensor for _, tensor in item.tasks)) | ({} if item.base is None else {-1: item.base})
    is_sound &= all(place in read and at < read[place].num_elements for place, at in measure.not_finite)
    if not is_sound:
        raise DataError(f"{path} has measurements of `{measure.tensor}` that no weights have", hint="make it again")
    return Measure(
        digests=list(measure.digests),
        base_digest=measure.base_digest,
        same=list(measure.same),
        is_base=list(measure.is_base),
        gram=gram,
        agreement=agreement,
        base_energy=np.nan if measure.base_energy is None else measure.base_energy,
        not_finite=list(measure.not_finite),
        coding=None
        if coding is None
        else CodingError(base=codes(coding.base), average=codes(coding.average), ratio=codes(coding.ratio)),
    )
