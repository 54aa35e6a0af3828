"""A method applied to a family in memory, slowly and in the plainest order: what the engine must agree with.

Groups of one and tensors that are bit-identical in a group are copied; masked pairs are copies. Statistics see ranges
of at most `chunk` elements in order of tensor name and index, and so do methods whose scope allows it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmerge_cli.methods.call import Call
from flexmerge_cli.methods.method import Centre, Statistic, Where
from flexmerge_cli.methods.reductions import flat
from flexmerge_cli.methods.step import CalibrationCall, StepCall


@dataclass(frozen=True, kw_only=True)
class Family:
    """Task vectors of a base that is zero: [M, *shape] float32 by tensor, rows as `tasks`, which are sorted."""

    tasks: tuple[str, ...]
    deltas: Mapping[str, Tensor]
    blocks: Mapping[str, tuple[str, ...]]

    def block_of(self, tensor: str) -> str:
        return next(block for block, tensors in self.blocks.items() if tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a group has of one tensor, float32."""

    unified: Tensor | None
    """The merged delta; None where nothing is merged."""
    tasks: Mapping[str, Tensor]
    """The delta that each task gets back."""


def family_of(deltas: Mapping[str, Any], *, tasks: Sequence[str] = "abcdefgh", blocks: Any = None) -> Family:
    """deltas: [M, *shape] by tensor. One block of everything unless told."""
    tensors = {name: torch.as_tensor(rows, dtype=torch.float32) for name, rows in sorted(deltas.items())}
    num_tasks = len(next(iter(tensors.values())))
    return Family(tasks=tuple(tasks)[:num_tasks], deltas=tensors, blocks=blocks or {"block": tuple(tensors)})


def merge(
    family: Family,
    call: Call,
    *,
    blocks: Iterable[str] | None = None,
    group: Sequence[str] | None = None,
    steps: Sequence[StepCall] = (),
    calibrate: CalibrationCall | None = None,
    chunk: int = 1 << 30,
    bypass: bool = True,
    stored: Callable[[str], torch.dtype] = lambda _tensor: torch.float32,
) -> dict[str, Merged]:
    """One group (all tasks unless told) of each of these blocks (all unless told), by tensor.

    stored: of a tensor, what the unified delta of a masked method is rounded to before it is masked.
    """
    group = tuple(family.tasks if group is None else group)
    rows = [family.tasks.index(task) for task in group]
    run = _Run(family=family, deltas=dict(family.deltas), chunk=chunk)
    for step in steps:
        run = run.after(step)
    merged = {}
    for block in family.blocks if blocks is None else blocks:
        unstepped = {name: family.deltas[name][rows] for name in sorted(family.blocks[block])}
        if bypass and (len(group) == 1 or (call.method.gives_masks and len(group) == 2)):
            merged |= {name: _copies(deltas, group) for name, deltas in unstepped.items()}
            continue
        deltas = {name: run.deltas[name][rows] for name in unstepped}
        results = run.call(call, block, group, deltas, unstepped)
        if calibrate is not None:
            results = {
                name: calibrate(result.double(), unstepped[name], run.where(group, name))
                for name, result in results.items()
            }
        merged |= _per_task(call, results, deltas, unstepped, group, stored)
        for name, deltas_of in unstepped.items():
            if bypass and all(_same_bits(deltas_of[0], row) for row in deltas_of):
                merged[name] = Merged(unified=deltas_of[0], tasks=dict(zip(group, deltas_of)))
    return merged


def ranges(shape: Sequence[int], scope: str, chunk: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the ranges that a tensor is cut into; one empty range for an empty tensor."""
    num_elements = math.prod(shape)
    size = max(1, num_elements)
    if scope == "element":
        size = chunk
    elif scope == "row":
        row = max(1, row_elements(shape))
        size = max(1, chunk // row) * row
    for start in range(0, max(1, num_elements), size):
        yield start, min(start + size, num_elements)


def row_elements(shape: Sequence[int]) -> int:
    """Elements under one index of axis 0; a tensor with 0 or 1 axes is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def measure(statistic: Statistic, deltas: Mapping[str, Tensor], tensors: Iterable[str], tasks: Any, chunk: int) -> Any:
    """All passes of a statistic over these tensors."""
    value: Any = statistic
    while isinstance(value, Statistic):
        total = None
        for name in sorted(tensors):
            for start, end in ranges(deltas[name].shape[1:], "element", chunk):
                where = Where(tasks=tuple(tasks), tensor=name, start=start, shape=tuple(deltas[name].shape[1:]))
                part = value.measure(flat(deltas[name])[:, start:end], where)
                total = part if total is None else value.combine(total, part)
        value = value.finish(total)
    return value


@dataclass(kw_only=True)
class _Run:
    """A family whose deltas have been through steps, and what was measured of them."""

    family: Family
    deltas: dict[str, Tensor]
    chunk: int
    measured: dict[Any, Any] = field(default_factory=dict)

    def where(self, tasks: Sequence[str], tensor: str, start: int = 0) -> Where:
        return Where(tasks=tuple(tasks), tensor=tensor, start=start, shape=tuple(self.deltas[tensor].shape[1:]))

    def after(self, step: StepCall) -> "_Run":
        stepped = {}
        for name, deltas in self.deltas.items():
            scope = step.scope_of(name, tuple(deltas.shape[1:]))
            stats = self.statistic(step.statistics, name, self.family.tasks)
            parts = []
            for start, end in ranges(deltas.shape[1:], scope, self.chunk):
                part = step(_shaped(deltas, scope, start, end), self.where(self.family.tasks, name, start), stats)
                assert part.dtype == torch.float32
                parts.append(flat(part))
            stepped[name] = torch.cat(parts, 1).view(deltas.shape)
        return _Run(family=self.family, deltas=stepped, chunk=self.chunk)

    def statistic(self, statistic: Statistic | None, tensor: str, group: Sequence[str]) -> Any:
        """Return the statistics of the group for this tensor. All statistics of a run are of one method."""
        if statistic is None:
            return None
        scope = statistic.scope
        tensors = {"tensor": (tensor,), "block": self.family.blocks[self.family.block_of(tensor)]}.get(
            scope, tuple(self.deltas)
        )
        rows = [self.family.tasks.index(task) for task in group]
        if tensors not in self.measured:
            if statistic.per == "task":
                deltas, tasks = self.deltas, self.family.tasks
            else:
                deltas, tasks = {name: self.deltas[name][rows] for name in tensors}, tuple(group)
            self.measured[tensors] = measure(statistic, deltas, tensors, tasks, self.chunk)
        value = self.measured[tensors]
        return value.take(rows) if statistic.per == "task" else value

    def call(self, call: Call, block: str, group: Sequence[str], deltas: Any, unstepped: Any) -> dict[str, Any]:
        """Map each tensor to the merged delta, or for masked methods a list of (start, end, Centre)."""
        if call.scope == "block":
            stats = self.statistic(call.statistics, next(iter(deltas)), group)
            return dict(call(deltas, Where(tasks=tuple(group), tensor=block, start=0, shape=()), stats, unstepped))
        results: dict[str, Any] = {}
        for name, rows in deltas.items():
            shape = tuple(rows.shape[1:])
            scope = call.scope_of(name, shape)
            stats = self.statistic(call.statistics, name, group)
            parts = []
            for start, end in ranges(shape, scope, self.chunk):
                part, raw = (_shaped(x, scope, start, end) for x in (rows, unstepped[name]))
                parts.append((start, end, call(part, self.where(group, name, start), stats, raw)))
            if call.method.gives_masks:
                results[name] = parts
            else:
                results[name] = torch.cat([part.flatten() for _, _, part in parts]).view(shape)
        return results


def _shaped(deltas: Tensor, scope: str, start: int, end: int) -> Tensor:
    """A range in the shape that the scope's calls take."""
    if scope == "tensor":
        return deltas
    part = flat(deltas)[:, start:end]
    if scope == "element":
        return part
    row = row_elements(deltas.shape[1:])
    return part.reshape(len(deltas), (end - start) // row if row else 0, row)


def _per_task(
    call: Call, results: Any, deltas: Any, unstepped: Any, group: Any, stored: Callable[[str], torch.dtype]
) -> dict[str, Merged]:
    if not call.method.gives_masks:
        rounded = {name: result.to(torch.float32) + 0.0 for name, result in results.items()}
        return {name: Merged(unified=u, tasks=dict.fromkeys(group, u)) for name, u in rounded.items()}
    unified, masks = {}, {}
    for name, parts in results.items():
        made = torch.cat([centre.delta.to(torch.float32) for _, _, centre in parts])
        unified[name] = made.to(stored(name)).to(torch.float32) + 0.0
        masks[name] = torch.cat([_mask(part, flat(unstepped[name]), unified[name]) for part in parts], 1)
        if call.method.form == "superposed":
            masks[name] = 2.0 * masks[name] - 1.0
    gain = np.ones(len(group))
    if call.gain is not None:
        below = np.stack([(masks[n] * unified[n]).double().abs().sum(1).cpu().numpy() for n in unified], 1)
        above = np.stack([flat(deltas[n]).double().abs().sum(1).cpu().numpy() for n in unified], 1)
        gain = call.gain(above, below, np.array([len(unified[n]) for n in unified]))
    factor = torch.from_numpy(np.asarray(gain, np.float32)).to(next(iter(unified.values())).device)[:, None]
    merged = {}
    for name, centre in unified.items():
        shape = unstepped[name].shape
        taken = (factor * masks[name] * centre + 0.0).view(shape)
        merged[name] = Merged(unified=centre.view(shape[1:]), tasks=dict(zip(group, taken)))
    return merged


def _mask(part: tuple[int, int, Centre], unstepped: Tensor, unified: Tensor) -> Tensor:
    start, end, centre = part
    return centre.mask(unstepped[:, start:end], unified[start:end])


def _copies(deltas: Tensor, group: Sequence[str]) -> Merged:
    return Merged(unified=None if len(group) > 1 else deltas[0], tasks=dict(zip(group, deltas)))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))
