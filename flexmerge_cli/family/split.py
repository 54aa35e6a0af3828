"""Describes a tensor that is split into equal parts along one axis, which merge apart, such as the heads of an
attention.

Each part is a tensor of its own, `NAME@part0`, `NAME@part1`, …, and no tensor has the name of the whole. Readers of a
model join the parts again. Names and shapes only.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.record import Record, Shape

MAX_PARTS = 4096
PART = re.compile(r"(.*)@part(0|[1-9][0-9]*)", re.DOTALL)


class Split(Record):
    """One split tensor."""

    tensor: str
    """The aligned name of the whole."""
    dim: Literal[0, 1]
    parts: Annotated[int, Field(ge=2, le=MAX_PARTS)]

    @property
    def names(self) -> tuple[str, ...]:
        """The aligned names of the parts, in their order."""
        return tuple(f"{self.tensor}@part{place}" for place in range(self.parts))

    def whole(self, shape: Shape) -> Shape:
        """Return the shape of the whole, from that of a part."""
        return (*shape[: self.dim], shape[self.dim] * self.parts, *shape[self.dim + 1 :])

    def take(self, whole: StoredTensor, name: str) -> StoredTensor:
        """Return the part with this name, of the stored whole."""
        place = whole_of(name)[1]
        assert place is not None
        return whole.section(self.dim, self.parts, place)


def whole_of(name: str) -> tuple[str, int | None]:
    """Return the whole and the place of a part. Any other name is itself the whole, without a place."""
    found = PART.fullmatch(name) if "@part" in name else None
    return (name, None) if found is None else (found[1], int(found[2]))


def check_splits(splits: Iterable[Split], forms: Mapping[str, Mapping[Any, Any]]) -> None:
    """Raise ValueError unless the parts of the splits are present and of one form, and no other names are those of
    parts.

    forms: name -> task -> (dtype, shape), for every tensor that is stored.
    """
    expected: set[str] = set()
    for split in splits:
        if split.tensor in forms or whole_of(split.tensor)[1] is not None:
            raise ValueError(f"`{split.tensor}` is split, and also a tensor or a part of one")
        first = forms.get(split.names[0], {})
        if not first or any(len(shape) <= split.dim for _, shape in first.values()):
            raise ValueError(f"the parts of `{split.tensor}` are missing, or have no axis {split.dim}")
        if split.names[0] in expected or any(forms.get(name) != first for name in split.names):
            raise ValueError(f"the parts of `{split.tensor}` are not of one form, each once")
        expected |= set(split.names)
    if expected != {name for name in forms if whole_of(name)[1] is not None}:
        raise ValueError("there are parts of a tensor that is not split")
