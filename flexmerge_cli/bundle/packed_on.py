"""Packed weights on a device of torch: their arrays lie there as they are stored, and rows are decoded there.

The sum of stored/packed.py, in the same order and to the same bits; but for factors, whose products a device may round
in another way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.engine.device import torch_dtype
from flexmerge_cli.residuals.coder import Matrix
from flexmerge_cli.residuals.look_up import unpack_on
from flexmerge_cli.stored.packed import Elements, JoinedRows, Packed

Place = Callable[[np.ndarray], Tensor]
"""Moves an array of numbers to the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodesOn:
    """Codes on the device; their values are table[codes] · scale."""

    codes: Tensor
    """Packed, uint8 [m, ⌈n·bits/8⌉]."""
    bits: int
    levels: np.ndarray
    """The levels, float32 [2^bits]."""
    table: Tensor
    """The levels on the device."""
    scale: Tensor
    """The scale of each row, float32 [m, 1], or of all, [1, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedOn:
    """A `stored.packed.Packed` whose parts [m, …] all lie on the device."""

    matrix: Matrix
    dtype: torch.dtype
    device: torch.device
    dense: Tensor | None
    masked: tuple[Tensor, Tensor, float, bool] | None
    """What is unified, [m, n]; the mask's bits, uint8 [⌈m·n/8⌉]; its factor; and whether it is signed."""
    codes: tuple[CodesOn, ...]
    factors: tuple[Tensor, Tensor] | None
    kept: tuple[Tensor, Tensor, Tensor] | None
    """Where each row begins, int64 [m + 1]; columns, int16 with the bits of uint16, or int32; and values."""

    has_product = False
    address = None

    @property
    def is_codes_alone(self) -> bool:
        others = (self.dense, self.masked, self.factors, self.kept)
        return bool(self.codes) and all(part is None for part in others)

    def decode(self, rows: slice | Tensor) -> Tensor:
        """Decode rows [k, n] in the task's dtype. rows: a slice with a step of 1 and both ends, or int64 [k] in [0,
        m)."""
        n = self.matrix[1]
        total = None if self.dense is None else self.dense[rows].to(torch.float32)
        if self.masked is not None:
            unified, mask, gamma, is_signed = self.masked
            assert total is not None
            at = self._numbers(rows)[:, None] * n + torch.arange(n, device=self.device)
            taken = (mask[at >> 3] >> (at & 7) & 1).bool()
            shift = gamma * unified[rows].to(torch.float32)
            total = torch.where(taken, total + shift, total - shift if is_signed else total)
        for part in self.codes:
            scale = part.scale[rows] if len(part.scale) == self.matrix[0] else part.scale
            found = unpack_on(part.codes[rows], n, part.bits, part.levels) * scale
            total = found if total is None else total + found
        if self.factors is not None:
            left, right = self.factors
            found = (left[rows].to(torch.float64) @ right.to(torch.float64)).to(torch.float32)
            total = found if total is None else total + found
        if total is None:
            total = torch.zeros(len(self._numbers(rows)), n, device=self.device)
        if self.kept is not None:
            total = self._with_kept(total, self._numbers(rows), self.kept)
        return total.to(self.dtype)

    def _numbers(self, rows: slice | Tensor) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=self.device) if isinstance(rows, slice) else rows

    def _with_kept(self, total: Tensor, rows: Tensor, kept: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        starts, columns, values = kept
        begin = starts[rows]
        counts = starts[rows + 1] - begin
        of_row = torch.repeat_interleave(torch.arange(len(rows), device=self.device), counts)
        before = torch.cumsum(counts, 0) - counts
        at = torch.arange(len(of_row), device=self.device) + (begin - before)[of_row]
        column = columns[at].to(torch.int64)
        column = column & 0xFFFF if columns.dtype is torch.int16 else column
        total = total + 0.0  # the others are a sum too: of -0 and 0
        total[of_row, column] += values[at].to(torch.float32)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedRowsOn:
    """A `stored.packed.JoinedRows` on the device."""

    shared: PackedOn
    own: PackedOn | None
    places: Tensor
    """int64 [m]: a row of `shared`, or -1 less the row of `own`."""

    has_product = False
    address = None
    is_codes_alone = False

    @property
    def matrix(self) -> Matrix:
        return len(self.places), self.shared.matrix[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.dtype

    @property
    def device(self) -> torch.device:
        return self.shared.device

    def decode(self, rows: slice | Tensor) -> Tensor:
        places = self.places[rows]
        is_shared = places >= 0
        whole = torch.empty(len(places), self.matrix[1], dtype=self.dtype, device=self.device)
        whole[is_shared] = self.shared.decode(places[is_shared])
        if self.own is not None:
            whole[~is_shared] = self.own.decode(-1 - places[~is_shared])
        return whole


def packed_on(packed: Packed | JoinedRows, device: torch.device, place: Place) -> PackedOn | JoinedRowsOn:
    """Move packed values to a device. place: moves an array, and returns one that tasks share only once."""
    if isinstance(packed, JoinedRows):
        shared, own = _on(packed.shared, device, place), None if packed.own is None else _on(packed.own, device, place)
        return JoinedRowsOn(shared=shared, own=own, places=place(packed.places).to(torch.int64))
    return _on(packed, device, place)


def _on(packed: Packed, device: torch.device, place: Place) -> PackedOn:
    m, n = packed.matrix

    def elements(part: Elements, rows: int = 1) -> Tensor:
        return place(part.bits.view(np.uint8)).view(torch_dtype(part.dtype)).reshape(rows, -1)

    masked, factors, kept = packed.masked, packed.factors, packed.kept
    of_columns = None if kept is None else kept.columns.view(np.int16 if kept.columns.dtype == np.uint16 else np.int32)
    return PackedOn(
        matrix=packed.matrix,
        dtype=torch_dtype(packed.dtype),
        device=device,
        dense=None if packed.dense is None else elements(packed.dense, m),
        masked=None
        if masked is None
        else (elements(masked.unified, m), place(masked.packed), float(masked.gamma), masked.is_signed),
        codes=tuple(
            CodesOn(
                codes=place(part.codes),
                bits=part.bits,
                levels=part.table,
                table=place(part.table),
                scale=place(part.scale),
            )
            for part in packed.codes
        ),
        factors=None if factors is None else (elements(factors[0], m), elements(factors[1], len(factors[1].bits) // n)),
        kept=None
        if kept is None or of_columns is None
        else (place(kept.starts), place(of_columns), elements(kept.values)[0]),
    )
