"""Decodes a tensor of a masked group: base + gamma · mask · unified, with one bit of mask per task and element.

The mask of a superposed group is drawn instead of stored, and unified is subtracted where it is not set.
"""

import json
import math
from dataclasses import dataclass

import numpy as np

from flexmerge_cli.checkpoint.dtypes import FLOATING, ITEM_BYTES, promote
from flexmerge_cli.checkpoint.tensor import StoredTensor
from flexmerge_cli.errors import DataError
from flexmerge_cli.methods.call import Call
from flexmerge_cli.residuals import mask as masks
from flexmerge_cli.residuals.coder import Matrix, MatrixView
from flexmerge_cli.stored.decoding import ALL, Described, Packable, Read, RouteParts
from flexmerge_cli.stored.form import Array, GroupForm, GroupLayout, GroupTensor
from flexmerge_cli.stored.packed import Elements, Masked, Packed
from flexmerge_cli.stored.summary import Summary


@dataclass(frozen=True, slots=True)
class MaskedTensor(Packable):
    """Decodes one task's tensor; `<unit>@gamma.<task>` exists only if the method rescales."""

    of: Described
    seed: int | None = None
    """The seed with which a signed mask is drawn; None if the mask is stored."""

    def fits(self, parts: RouteParts) -> bool:
        base, unified, mask, gamma = self._parts(parts)
        count = math.prod(self.of.shape)
        return (
            {base.dtype, unified.dtype, self.of.dtype} <= set(FLOATING)
            and (mask is None or (mask.dtype, mask.shape) == ("U8", (masks.packed_bytes(count),)))
            and (base.num_elements, unified.num_elements) == (count, count)
            and (gamma is None or (gamma.dtype, gamma.num_elements) == ("F32", 1))
        )

    def decode(self, parts: RouteParts, read: Read) -> np.ndarray:
        return self.packed(parts, read).decode().reshape(self.of.shape)

    @property
    def matrix(self) -> Matrix:
        return MatrixView.FIRST_AXIS.matrix(self.of.shape)

    def pieces(self, parts: RouteParts) -> dict[str, tuple[StoredTensor, int]]:
        base, unified, mask, gamma = self._parts(parts)
        if mask is None:  # what is drawn takes memory of its own, and lies in no file
            name, size = f"{self.of.tensor}@mask.{self.of.task}", masks.packed_bytes(unified.num_elements)
            mask = StoredTensor(name=name, dtype="U8", shape=(size,), path=parts.path / name, offset=0)
        roles = "base", "unified", f"mask.{self.of.task}", f"gamma.{self.of.task}"
        found = zip(roles, (base, unified, mask, gamma))
        return {role: (part, part.num_bytes) for role, part in found if part is not None}

    def packed(self, parts: RouteParts, read: Read) -> Packed:
        """Return the tensor in its stored bytes. Raises DataError if they cannot be decoded."""
        base, unified, mask, gamma = self._parts(parts)
        factor = np.float32(1.0) if gamma is None else read(gamma, ALL)[0]
        if mask is None:
            assert self.seed is not None
            packed = masks.pack(masks.drawn(self.seed, self.of.task, self.of.tensor, 0, unified.num_elements))
        else:
            packed = read(mask, ALL)
            try:
                masks.check(packed, unified.num_elements)
            except ValueError as error:
                raise DataError(f"{parts.path}: `{mask.name}`: {error}", hint="fetch the bundle again") from None
        return Packed(
            matrix=self.matrix,
            dtype=self.of.dtype,
            dense=Elements(read(base, ALL), base.dtype),
            masked=Masked(Elements(read(unified, ALL), unified.dtype), packed, factor, self.seed is not None),
        )

    def _parts(self, parts: RouteParts) -> tuple[StoredTensor, StoredTensor, StoredTensor | None, StoredTensor | None]:
        name, task = self.of.tensor, self.of.task
        gamma = parts.get(f"{self.of.unit}@gamma.{task}")
        mask = parts[f"{name}@mask.{task}"] if self.seed is None else None
        return parts[f"{name}@base"], parts[f"{name}@unified"], mask, gamma


def _layout(group: GroupTensor) -> GroupLayout | None:
    mask = Array(role="mask", dtype="U8", shape=(masks.packed_bytes(math.prod(group.shape)),))
    return _shared_layout(group, (mask,))


def _shared_layout(group: GroupTensor, of_task: tuple[Array, ...]) -> GroupLayout | None:
    """Lay out base and unified delta. of_task: what each task stores for itself."""
    unified = Array(role="unified", dtype=promote(group.dtypes), shape=group.shape)
    own = tuple(((place,), of_task) for place in range(len(group.dtypes)))
    found = GroupLayout(centre=(unified,), base=True, own=own)
    base_bytes = math.prod(group.shape) * ITEM_BYTES[group.base_dtype]
    return None if group.copies_bytes <= found.num_bytes + base_bytes else found


def _factors(call: Call) -> tuple[Array, ...]:
    return () if call.gain is None else (Array(role="gamma", dtype="F32", shape=(1,)),)


def _summary(call: Call) -> Summary:
    has_factors = call.gain is not None
    return Summary(
        parts="unified delta and base; per task a mask" + (", and a factor per block" if has_factors else ""),
        num_bytes="2·s·n + k·⌈n/8⌉" + ("; and 4·k per block" if has_factors else ""),
    )


MASKED = GroupForm(
    word="masked",
    product="masks",
    layout=_layout,
    summary=_summary,
    decoder=lambda of, _parts: MaskedTensor(of),
    writer="flexmerge_cli.engine.writers.masked:MASKS",
    of_unit=_factors,
)


def _superposed(of: Described, parts: RouteParts) -> MaskedTensor:
    seed = json.loads(of.method[1]).get("seed") if of.method is not None else None
    if type(seed) is not int or seed < 0:
        raise DataError(
            f"{parts.path}: `{of.tensor}` of `{of.task}` is superposed, and its method has no seed",
            hint="fetch the bundle again",
        )
    return MaskedTensor(of, seed)


SUPERPOSED = GroupForm(
    word="superposed",
    product="superposition",
    layout=lambda group: _shared_layout(group, ()),
    summary=lambda _call: Summary(parts="superposed task vectors and base", num_bytes="2·s·n"),
    decoder=_superposed,
    writer="flexmerge_cli.engine.writers.masked:MASKS",
)
