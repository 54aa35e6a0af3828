"""A toy form in one file: the average of a group, and for each task what is left, rounded to bfloat16.

`--method tests/stored/toy.py#shifted` stores groups in it.
"""

from dataclasses import dataclass

import torch

from flexmerge_cli.checkpoint.dtypes import from_float32, promote, to_float32
from flexmerge_cli.engine.encode import array, lost_squares
from flexmerge_cli.engine.sources import BASE
from flexmerge_cli.engine.writers.writer import Writer
from flexmerge_cli.methods.method import method
from flexmerge_cli.stored.decoding import ALL, Described, Stored
from flexmerge_cli.stored.form import Array, GroupForm, GroupLayout
from flexmerge_cli.stored.summary import Summary


@method(paper="none", scope="element", form="toy")
def shifted(deltas):
    """Average. [k, n] float32 -> [n]."""
    return deltas.mean(0)


@dataclass(frozen=True)
class ToyTensor(Stored):
    of: Described

    def _parts(self, parts):
        return parts[f"{self.of.tensor}@average"], parts[f"{self.of.tensor}@rest.{self.of.task}"]

    def fits(self, parts):
        return all(part.shape == self.of.shape for part in self._parts(parts))

    def decode(self, parts, read):
        average, rest = (to_float32(read(part, ALL), part.dtype) for part in self._parts(parts))
        return from_float32(average + rest, self.of.dtype).reshape(self.of.shape)


def layout(group):
    average = Array(role="average", dtype=promote(group.dtypes), shape=group.shape)
    rest = Array(role="rest", dtype="BF16", shape=group.shape)
    found = GroupLayout(centre=(average,), base=False, own=tuple(((k,), (rest,)) for k in range(len(group.dtypes))))
    return None if group.copies_bytes <= found.num_bytes else found


def write(encoder, storage, group, raw, piece, _whole):
    worker, start = encoder.worker, raw.span.start
    (dtype,) = set(encoder.dtypes(storage, group))
    average = torch.cat([worker.value(group, raw, *tile)[0] for tile in encoder.tiles(group, raw, None)])
    average = worker.rounded(worker.on_device(raw.bits[BASE]) + average, dtype)
    encoder.emit(array(group, "average"), start, average, piece)
    for part in (part for part in group.parts if part.array.role == "rest"):
        own = worker.on_device(worker.own(raw, part.task))
        rest = (own - average).bfloat16()
        encoder.emit(part, start, rest, piece)
        decoded = average + rest.float()
        encoder.decoded(part.task, decoded, dtype, group, raw, piece)
        piece.errors[part.task] = lost_squares(decoded - own, raw.span.run)


WRITER = Writer(write=write, workspace=lambda work: work.merging + 40 * work.n)
TOY = GroupForm(
    word="toy",
    product="averages",
    layout=layout,
    summary=lambda _call: Summary(parts="average; per task the rest in bfloat16", num_bytes="s·n + k·2·n"),
    decoder=lambda of, _parts: ToyTensor(of),
    writer="tests.stored.toy:WRITER",
)
