"""Records a kept adapter in plan and manifest: where in its weight file the factors of each tensor lie. Pure.

changes   {aligned name: {digest, and some of: value; left, right, scale; vector, axis}}; other tensors are the base's.
          θ̂ = value, or the base's bits; + scale · left · right, or · vector along the axis; float32, rounded once.
          left [m, r], right [r, n] of the tensor viewed as [first axis, the rest]; vector [1, length of the axis].
          A sum over r is taken in float64, term by term, then multiplied by scale and rounded: no library's matrix
          product gives the same bits
places    {offset, dtype, shape, strides}: arrays in the weight file, which is the adapter's own, bit by bit
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flexmerge_cli.checkpoint.change import Change, LowRankChange, Scaled
from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.record import Digest, Items, Record

Count = Annotated[int, Field(ge=0, lt=1 << 48)]


class ArrayPlace(Record):
    """An array in the adapter's weight file."""

    offset: Count
    dtype: str
    shape: Items[Count] = Field(max_length=8)
    strides: Items[Count] | None = None
    """The strides in elements; None if row-major."""

    @staticmethod
    def of(tensor: StoredTensor) -> "ArrayPlace":
        return ArrayPlace(offset=tensor.offset, dtype=tensor.dtype, shape=tensor.shape, strides=tensor.strides)

    def stored(self, path: Path) -> StoredTensor:
        fields = {"dtype": self.dtype, "shape": self.shape, "offset": self.offset, "strides": self.strides}
        return StoredTensor(name="", path=path, **fields)  # type: ignore[arg-type]

    def check(self, num_bytes: int) -> None:
        """Raise ValueError unless the array lies within a file of num_bytes."""
        if self.dtype not in ITEM_BYTES or (self.strides is not None and len(self.strides) != len(self.shape)):
            raise ValueError("an array of an adapter has an invalid form")
        elements = math.prod(self.shape)
        reach = elements
        if self.strides is not None and elements:
            reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) + 1
        if self.offset + max(reach, elements) * ITEM_BYTES[self.dtype] > num_bytes:
            raise ValueError("an array of an adapter lies outside its file")


class ChangeRecord(Record):
    """What an adapter makes of one tensor."""

    digest: Digest
    """The digest of the result."""
    value: ArrayPlace | None = None
    """The whole tensor, if the adapter holds it."""
    left: ArrayPlace | None = None
    right: ArrayPlace | None = None
    scale: float | None = None
    vector: ArrayPlace | None = None
    axis: Literal[0, 1] | None = None

    @staticmethod
    def of(tensor: StoredTensor, weights: Path, digest: str) -> "ChangeRecord":
        """Record a tensor's change. weights: the adapter's file; a tensor that lies in it is whole."""
        value = ArrayPlace.of(tensor) if tensor.path == weights else None
        match tensor.change:
            case LowRankChange(left=left, right=right, scale=scale):
                return ChangeRecord(
                    digest=digest, value=value, left=ArrayPlace.of(left), right=ArrayPlace.of(right), scale=scale
                )
            case Scaled(vector=vector, axis=axis):
                along: Literal[0, 1] = 1 if axis else 0
                return ChangeRecord(digest=digest, value=value, vector=ArrayPlace.of(vector), axis=along)
        return ChangeRecord(digest=digest, value=value)

    def tensor(self, base: StoredTensor | None, weights: Path) -> StoredTensor:
        """Return the tensor that is read. base: where the base's bits lie, if they are needed."""
        change: Change | None = None
        if self.left is not None and self.right is not None:
            change = LowRankChange(
                left=self.left.stored(weights), right=self.right.stored(weights), scale=float(self.scale or 0.0)
            )
        elif self.vector is not None:
            change = Scaled(vector=self.vector.stored(weights), axis=int(self.axis or 0))
        source = base if self.value is None else self.value.stored(weights)
        assert source is not None
        return replace(source, change=change)

    def check(self, dtype: str, shape: tuple[int, ...], num_bytes: int) -> None:
        """Raise ValueError unless it makes a tensor of this dtype and shape from a file of num_bytes."""
        places = [place for place in (self.value, self.left, self.right, self.vector) if place is not None]
        for place in places:
            place.check(num_bytes)
        kinds = ((self.left, self.right, self.scale), (self.vector, self.axis))
        given = [any(item is not None for item in kind) for kind in kinds]
        whole = [all(item is not None for item in kind) for kind in kinds]
        if given != whole or sum(given) > 1 or not (any(given) or self.value is not None):
            raise ValueError("a change of an adapter is incomplete")
        if self.value is not None and (self.value.dtype, self.value.shape) != (dtype, shape):
            raise ValueError("a tensor of an adapter differs from its recorded form")
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        fits = dtype in FLOATING and rows * columns > 0 if any(given) else True
        if self.left is not None and self.right is not None:
            fits = fits and len(self.left.shape) == len(self.right.shape) == 2
            fits = fits and (self.left.shape[0], self.right.shape[1]) == (rows, columns)
            fits = fits and self.left.shape[1] == self.right.shape[0] and self.left.dtype in FLOATING
            fits = fits and self.right.dtype in FLOATING
        if self.vector is not None and self.axis is not None:
            length = shape[self.axis] if self.axis < len(shape) else 0
            fits = fits and self.vector.shape == (1, length) and self.vector.dtype in FLOATING
        if not fits:
            raise ValueError("the factors of an adapter do not fit their tensor")

    def dump(self) -> dict[str, Any]:
        """Return it for JSON, without absent fields."""
        return self.model_dump(mode="json", exclude_none=True)
