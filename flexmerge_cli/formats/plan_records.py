"""Defines the records of plan.json one by one; plan_file.py says what they mean together. Pure."""

import math
from itertools import chain
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from flexmerge_cli.checkpoint.libraries import LibraryName
from flexmerge_cli.checkpoint.license import MAX_LICENSE
from flexmerge_cli.checkpoint.parts import are_parts
from flexmerge_cli.family.adapters import Adapters
from flexmerge_cli.family.classes import TensorClass
from flexmerge_cli.order.linkage import Linkage
from flexmerge_cli.order.order import Strategy
from flexmerge_cli.order.similarity import Similarity
from flexmerge_cli.record import Count, Digest, Items, Named, Record, Shape
from flexmerge_cli.request.plan import Statistics
from flexmerge_cli.residuals.coding_error import CodingError


def _of_weights(value: float) -> float:
    """Refuse a number that no weights can give: squares of float32 lie between 1e-90 and 1e77, and larger ones would
    overflow."""
    if abs(value) > 1e100:
        raise ValueError("a sum over float32 weights cannot be so large")
    return value if abs(value) > 1e-200 else 0.0


def _all_of_weights(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """Check numbers as `_of_weights` does, many at once. Rows may differ in length."""
    sizes = np.abs(np.fromiter(chain.from_iterable(matrix), np.float64))
    if (sizes > 1e100).any() or (sizes <= 1e-200).any():
        return tuple(tuple(map(_of_weights, row)) for row in matrix)
    return matrix


Measurement = Annotated[float, AfterValidator(_of_weights)]
Measurements = Annotated[Items[Items[float]], AfterValidator(_all_of_weights)]


def _stay_inside(parts: dict[str, str]) -> dict[str, str]:
    if not are_parts(parts):
        raise ValueError("weights of a subfolder lie outside it")
    return parts


Parts = Annotated[Named[str], AfterValidator(_stay_inside)]
"""For each subfolder with weights of its own, the stem of their file names."""


License = Annotated[str, Field(min_length=1, max_length=MAX_LICENSE)]


class SideFile(Record):
    """A config, tokenizer or other file beside a task's weights."""

    bytes: Count
    digest: Digest


class PlanBase(Record):
    source: str
    fingerprint: Digest
    files: Named[SideFile] = Field(default_factory=dict)
    """The files that kept adapters need of it besides its tensors, such as config and tokenizer."""
    names: Named[str] = Field(default_factory=dict)
    """Aligned name -> own name, where they differ: for an output layer that is tied and not stored."""
    library: LibraryName = "transformers"
    """The library that loads the model; omitted if it is transformers, or unknown."""
    license: License | None = None
    """The licence that its card names; omitted if unknown."""

    @model_serializer(mode="wrap")
    def _without_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        usual = {"library": "transformers", "license": None}
        return {name: value for name, value in fields.items() if name not in usual or value != usual[name]}


class CodedWeights(Record):
    """The squared error of the whole coded tensor, by bits: of the base's tensor, and of the average of all tasks."""

    base: Named[Measurement]
    average: Named[Measurement]


class CodingRecord(Record):
    """What residuals/coding_error.py measured for a tensor."""

    weights: CodedWeights
    residuals: Named[Measurement]
    """The part of a residual's energy that is lost, by bits."""


class PlanTensor(Record):
    """One tensor of the family."""

    name: str
    class_: TensorClass = Field(alias="class")
    reason: str
    """Why it is private, or the target of a tied one."""
    dtype: str
    """The dtype in the first task that has it, or in the base if only the base has it."""
    shape: Shape
    base_dtype: str | None
    dtypes: Items[str | None] | None
    shapes: Items[Shape | None] | None
    block: str | None
    digests: Items[Digest | None]
    base_digest: Digest | None
    same: Items[Count]
    is_base: Items[bool]
    """For each task, whether the base, cast to the task's dtype, has its bits."""
    gram: Measurements | None
    base_energy: Measurement
    agreement: Items[Items[Count]] | None
    finite: bool
    coding: CodingRecord | None = None
    """null if it was not measured, and for tensors that do not merge."""
    base_shape: Shape | None = None
    """The shape in the base, if it differs; recorded if adapters are kept."""

    @property
    def base_form(self) -> tuple[str, Shape] | None:
        """The dtype and shape in the base. Without kept adapters, the shape is right only for what merges or is in the
        base alone."""
        if self.base_dtype is None:
            return None
        return self.base_dtype, self.shape if self.base_shape is None else self.base_shape

    @property
    def coding_error(self) -> CodingError | None:
        """The coding errors. Raises ValueError if a number is missing."""
        return CodingError.from_dict(self.coding.model_dump()) if self.coding is not None else None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def present(self) -> tuple[int, ...]:
        """The tasks that have it."""
        return tuple(task for task, digest in enumerate(self.digests) if digest is not None)

    def dtype_of(self, task: int) -> str:
        return (self.dtypes[task] if self.dtypes else None) or self.dtype

    def shape_of(self, task: int) -> Shape:
        shape = self.shapes[task] if self.shapes else None
        return self.shape if shape is None else shape


class PlanBlock(Record):
    name: str
    tensors: Items[str]
    elements: Count


class PlanMerge(Record):
    block: str
    left: Items[Count]
    right: Items[Count]
    similarity: Measurement


class PlanSettings(Record):
    """What the classes, blocks and order were made with."""

    blocks: str
    rules: str | None
    """The text of a user's own rules.yaml."""
    linkage: Linkage
    strategy: Strategy
    similarity: Similarity
    seed: Count
    private: Items[str]
    merge_heads: bool
    statistics: Statistics = "gram"
    adapters: Adapters = "keep"
    assume_base: bool = False
    variant: str | None = None
    """The preferred variant of the weights that was taken, e.g. `fp16`."""
    ignore: Items[str] = ()
    """The patterns of files that were left out of the sources."""
    with_code: bool = False
    follow_links: bool = False

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out rarely used settings that were not set."""
        fields: dict[str, Any] = handler(self)
        optional = ("variant", "ignore", "with_code", "follow_links")
        return {name: value for name, value in fields.items() if value or name not in optional}
