"""Copies to a GPU through pinned buffers, on a stand-in for the calls of CUDA that copies as late as it may."""

import pytest
import torch

from flexmerge_cli.engine import upload
from flexmerge_cli.engine.upload import Uploads

copy = torch.Tensor.copy_


class Late:
    """A GPU whose copies are done when somebody waits for them, from what the pinned memory holds then."""

    type = "cuda"

    def __init__(self, patch):
        self.queue, self.waits, self.pinned = [], 0, []
        patch.setattr(upload, "pinned", self.allocate)
        patch.setattr(upload.torch, "empty", lambda shape, *, dtype, device=None: torch.full(shape, 7, dtype=dtype))
        patch.setattr(torch.Tensor, "copy_", self.copy)
        patch.setattr(torch.cuda, "current_stream", lambda device: device)
        patch.setattr(torch.cuda, "Event", Event)

    def allocate(self, num_bytes):
        self.pinned.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    @property
    def copy(self):
        def copied(into, values, non_blocking=False):
            if non_blocking:
                self.queue.append((into, values))
                return into
            return copy(into, values)

        return copied

    def wait(self, count):
        while len(self.queue) > count:
            copy(*self.queue.pop(0))


class Event:
    """A place in the queue of copies."""

    def record(self, stream):
        self.stream, self.place = stream, stream.queue[-1]

    def synchronize(self):
        self.stream.waits += 1
        places = [id(place) for place in self.stream.queue]
        if id(self.place) in places:
            self.stream.wait(len(places) - 1 - places.index(id(self.place)))


@pytest.fixture
def late(monkeypatch):
    return Late(monkeypatch)


def matrices(count):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(3, 8 + number, generator=made).bfloat16()[:, :8] for number in range(count)]


@pytest.mark.parametrize("most", [48, 8, 6])
def test_a_buffer_is_filled_again_only_when_its_copy_is_done(most, late, monkeypatch):
    """Rows of a matrix, in the dtype of the source, whole or in pieces, whatever becomes of them after the call."""
    monkeypatch.setattr(upload, "PIECE_BYTES", most)
    uploads, expected, found = Uploads(), matrices(5), []
    for values in matrices(5):
        found.append(uploads(values, late))
        values.zero_()
    pieces = 5 * {48: 1, 8: 6, 6: 9}[most]
    assert late.waits == pieces - 2 and late.pinned == [most, most]
    late.wait(0)
    assert all(one.dtype is torch.bfloat16 and torch.equal(one, other) for one, other in zip(found, expected))


def test_the_next_copy_does_not_wait_for_the_one_before(late):
    uploads = Uploads()
    first, second = (uploads(values, late) for values in matrices(2))
    assert late.waits == 0 and bool((first == 7).all()) and bool((second == 7).all())


def test_buffers_grow_and_the_cpu_needs_none(late):
    uploads = Uploads()
    sizes = (10, 10, 1000, 5)
    found = [uploads(torch.arange(size), late) for size in sizes]
    late.wait(0)
    assert [one.tolist() for one in found] == [list(range(size)) for size in sizes]
    assert late.pinned == [80, 80, 8000]
    values = torch.arange(3)
    assert uploads(values, torch.device("cpu")) is values
